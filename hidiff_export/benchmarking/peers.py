"""What a bundle is compared with: PyTorch in several ways, the published package, and other engines' UNets.

Each peer is either a contender or a line that says why it is left out and how to get it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.workload import Workload
from hidiff_export.errors import InputError
from hidiff_export.families.family import Task, Width
from hidiff_export.families.hidiffusion_rules import phase_rule
from hidiff_export.recipe import Recipe

PRECISIONS = ("float32", "bfloat16")
"""What peers may be told to compute in."""

DEFAULT = ("diffusers", "hidiffusion", "eager")
"""The peers that are measured where none are named: those that start without a compilation."""

REFERENCES = {True: "eager", False: "diffusers"}
"""What outputs with HiDiffusion and without are compared with: PyTorch's, in float32."""


@dataclass(frozen=True)
class Peer:
    """A kind of contender that is no bundle.

    Args:
        kind: of its evaluator.
        origin: what it is, for people.
        hidiffusion: whether it computes phases.
        modules: what has to be importable in its interpreter.
        advice: how to get them.
        unfit: why it cannot compute a recipe; empty where it can.
    """

    kind: str
    origin: str
    hidiffusion: bool
    modules: tuple[str, ...] = ()
    advice: str = ""
    unfit: Callable[[Recipe], str] = lambda _recipe: ""


def _residuals(recipe: Recipe) -> str:
    return "a phase with a ControlNet's residuals has no counterpart in it" if recipe.task.has_control else ""


def _unpublished(recipe: Recipe) -> str:
    published = phase_rule(recipe.family, recipe.task, recipe.width, recipe.height)
    if not recipe.hidiffusion.windows or recipe.phase_rule() != published:
        return "the package has the published thresholds alone, and the recipe has others"
    return _residuals(recipe)


def _one_chunk(recipe: Recipe) -> str:
    return _residuals(recipe) or ("it takes prompts of 77 tokens" if recipe.prompt_chunks > 1 else "")


def _whole_pipeline(recipe: Recipe) -> str:
    if recipe.task is not Task.TEXT_TO_IMAGE or recipe.unet_width is not Width.FULL or not (recipe.text and recipe.vae):
        return "it draws whole pictures from prompts alone, with networks of full width, text encoders and a VAE"
    return _one_chunk(recipe)


PEERS = {
    "diffusers": Peer("stock", "diffusers' UNet2DConditionModel, without HiDiffusion", False, unfit=_residuals),
    "optimum-intel": Peer(
        "optimum-intel",
        "the UNet of optimum-intel's OpenVINO pipelines, without HiDiffusion",
        False,
        ("optimum.intel", "openvino", "diffusers"),
        "In an environment of its own: pip install optimum-intel diffusers, then "
        "--peer-python optimum-intel=FOLDER/bin/python.",
        _one_chunk,
    ),
    "stable-diffusion.cpp": Peer(
        "stable-diffusion.cpp",
        "stable-diffusion.cpp, without HiDiffusion, with its flash attention: steps of a picture of its own",
        False,
        ("stable_diffusion_cpp", "numpy", "PIL"),
        "pip install stable-diffusion-cpp-python, which compiles it.",
        _whole_pipeline,
    ),
    "hidiffusion": Peer(
        "published",
        "the published package hidiffusion on diffusers",
        True,
        ("hidiffusion",),
        "pip install hidiffusion==0.1.10.",
        _unpublished,
    ),
    "eager": Peer("eager", "this project's PhaseUNet in PyTorch", True),
    "compile": Peer("compile", "this project's PhaseUNet under torch.compile", True),
}
"""Every peer by name, in the order that they are shown, from the UNet as it was published on."""


@dataclass(frozen=True)
class WantedPeer:
    """A peer that was asked for, and what it is to compute in."""

    name: str
    precision: str

    @property
    def row(self) -> str:
        """Its name in tables: ``eager``, ``eager:bfloat16``."""
        return self.name if self.precision == PRECISIONS[0] else f"{self.name}:{self.precision}"


def wanted_peers(text: str, precisions: Sequence[str]) -> tuple[WantedPeer, ...]:
    """Reads ``all``, ``none``, or names with commas, of which some have a precision of their own behind a colon.

    Raises:
        InputError: there is no such peer or precision, or one is named twice.
    """
    names = {"all": tuple(PEERS), "none": (), "default": DEFAULT}.get(text) or [
        name.strip() for name in text.split(",") if text != "none"
    ]
    found: list[WantedPeer] = []
    for given in names:
        name, colon, precision = given.partition(":")
        if name not in PEERS or (colon and precision not in PRECISIONS):
            raise InputError(
                "There is no such peer.",
                given=given,
                advice=f"There are {', '.join(PEERS)}, each also with {' or '.join(':' + one for one in PRECISIONS)}; "
                "or all, or none.",
            )
        found += [WantedPeer(name, one) for one in ((precision,) if colon else precisions)]
    if twice := {one.row for one in found if found.count(one) > 1}:
        raise InputError("A peer is named twice.", given=", ".join(sorted(twice)), advice="Name each once.")
    order = list(PEERS)
    return tuple(sorted(found, key=lambda one: (order.index(one.name), PRECISIONS.index(one.precision))))


def interpreters(assignments: Iterable[str]) -> dict[str, str]:
    """Reads ``PEER=PYTHON`` texts.

    Raises:
        InputError: there is no such peer or interpreter.
    """
    found = {}
    for text in assignments:
        name, _, python = text.partition("=")
        if name not in ("optimum-intel", "stable-diffusion.cpp") or not Path(python).is_file():
            raise InputError(
                "Expected PEER=PYTHON of optimum-intel or stable-diffusion.cpp, and an interpreter that is there.",
                given=text,
                advice="Write --peer-python optimum-intel=/path/to/venv/bin/python.",
            )
        found[name] = python
    return found


def competitor(
    wanted: WantedPeer, work: Workload, store: Path, pythons: Mapping[str, str], threads: int, *, profile: bool
) -> Competitor | str:
    """Returns a peer as a contender, or why it is left out.

    Args:
        wanted: which.
        work: what it is to compute.
        store: the weight store, its configuration beside it.
        pythons: interpreters by peer; this one where it has none of its own.
        threads: of an evaluation.
        profile: whether its operators are told.
    """
    peer = PEERS[wanted.name]
    python = pythons.get(wanted.name, sys.executable)
    if why := peer.unfit(work.recipe):
        return why
    if wanted.name == "stable-diffusion.cpp" and not (store.parents[1] / "text_encoder").is_dir():
        return "it needs a bundle's text encoders and VAE; of a recipe there is the UNet alone"
    if missing := _missing(peer, python):
        return f"{missing} is not installed for {python if wanted.name in pythons else 'this Python'}. {peer.advice}"
    settings: dict[str, Any] = {
        "store": str(store.resolve()),
        "recipe": work.recipe.to_dict(),
        "precision": wanted.precision,
        "threads": threads,
        "profile": profile,
        "guidance": work.recipe.guidance,
        "steps": work.steps,
        "phase_steps": {planned.phase.name: work.step_of(planned.phase) for planned in work.phases},
        "shapes": {spec.name: list(spec.shape) for spec in work.phases[0].inputs},
    }
    return Competitor(wanted.row, peer.kind, peer.origin, wanted.precision, peer.hidiffusion, settings, python)


def _missing(peer: Peer, python: str) -> str:
    """Returns the first module that an interpreter lacks; empty where it has all."""
    if python == sys.executable:
        return next((name for name in peer.modules if not _found(name)), "")
    code = (
        "import sys; from importlib.util import find_spec\n"
        "for name in sys.argv[1:]:\n"
        "    try: found = find_spec(name)\n"
        "    except ImportError: found = None\n"
        "    if found is None: print(name)"
    )
    asked = subprocess.run([python, "-c", code, *peer.modules], capture_output=True, text=True, check=False)
    return "a working Python" if asked.returncode else asked.stdout.partition("\n")[0]


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
