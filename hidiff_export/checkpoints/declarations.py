"""What a safetensors file says of itself: what its UNet predicts, its noise schedule, and that it is for few steps.

Files say it in two places. Marker tensors lie beside the weights: ComfyUI and the trainers after it write ``v_pred``,
``ztsnr`` and ``edm_vpred.sigma_max``. The header has text: ``modelspec.*`` (Stability AI's model specification, with
ComfyUI's ``predict_key``) and ``ss_*`` (kohya's sd-scripts).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.checkpoint_file import open_weights
from hidiff_export.errors import CheckpointError
from hidiff_runtime.format.safetensors import SafetensorsFile

PREDICTION, ZERO_SNR = "prediction_type", "rescale_betas_zero_snr"
"""Keys of diffusers' scheduler configurations that files speak of."""

_NO_PICTURE = 1e-5
"""What a schedule of zero terminal SNR leaves of a picture's power at its end; Stable Diffusion's own leaves 0.0047."""

FLOW = "flow_prediction"
"""What diffusers calls the prediction of models of flow matching."""

_VELOCITY, _EPSILON = "v_prediction", "epsilon"
_EDM_SIGMAS = {"edm_vpred.sigma_max": "sigma_max", "edm_vpred.sigma_min": "sigma_min"}
_EDM_NORMALIZED = ("edm_mean", "edm_std")
_PREDICTIONS = {
    "v": _VELOCITY,
    "velocity": _VELOCITY,
    "v_prediction": _VELOCITY,
    "v-prediction": _VELOCITY,
    "vpred": _VELOCITY,
    "v_pred": _VELOCITY,
    "eps": _EPSILON,
    "epsilon": _EPSILON,
    "sample": "sample",
    "x0": "sample",
    **dict.fromkeys(("flow", "flow_matching", "flow-matching", "rectified_flow", "rectified flow"), FLOW),
}
_PREDICTION_LINES = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
"""Lines of a header that name the prediction."""

_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_VELOCITY_FLAGS = {text: _VELOCITY if flag else _EPSILON for text, flag in _FLAGS.items()}
_BASES = dict.fromkeys(("sd_v2_v", "sd_2_v"), _VELOCITY)
"""kohya's names of SD2 with v-parameterization; without it the names are given to epsilon and to others alike."""


@dataclass(frozen=True)
class Statement:
    """One thing that a file says of itself.

    Args:
        key: of diffusers' scheduler configurations.
        value: of the key.
        where: the marker or the header's line, as people would find it.
    """

    key: str
    value: Any
    where: str


@dataclass(frozen=True)
class Declarations:
    """Everything that a file says of its noise schedule.

    Args:
        path: of the file.
        statements: what it says, several of one key where it says it in several places.
        sigmas: of an EDM noise schedule: ``sigma_max`` and ``sigma_min`` where the file has them; None where its
            schedule is not EDM's.
        unread: lines of the header about the prediction whose word is none that is known.
        texts: what the header says in words, by key: titles, descriptions, base models.
    """

    path: Path
    statements: tuple[Statement, ...] = ()
    sigmas: Mapping[str, float] | None = None
    unread: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)

    def of(self, key: str) -> tuple[Statement, ...]:
        """Returns what it says of one key."""
        return tuple(statement for statement in self.statements if statement.key == key)


def read_declarations(path: Path, what: str = "checkpoint") -> Declarations:
    """Returns what a ``.safetensors`` file says of its noise schedule; reads the header and tensors of a few bytes.

    Args:
        path: of the file.
        what: it is, in messages.

    Raises:
        CheckpointError: it is missing or damaged, or says that its latents are normalized as EDM checkpoints' of
            Playground v2.5 are, which no family here has.
    """
    if not path.exists():
        raise CheckpointError(
            f"There is no {what} at this path.",
            given=path,
            advice="Check the path: it is looked up from the folder that you are in. Get the file first, if it is not "
            "there yet.",
        )
    with open_weights(path) as file:
        names = frozenset(file.names())
        if any(name in names for name in _EDM_NORMALIZED):
            raise CheckpointError(
                "The checkpoint is of the kind of Playground v2.5: its latents are normalized by a mean and a "
                "spread of their own.",
                given=f"{path.name}: tensors {' and '.join(name for name in _EDM_NORMALIZED if name in names)}",
                advice="Give a checkpoint of Stable Diffusion 1.5, 2.1, SDXL, SDXL-Turbo or Playground v2.",
            )
        sigmas = {key: _last(file, name) for name, key in _EDM_SIGMAS.items() if name in names}
        return Declarations(
            path,
            (*_markers(names), *_buffers(file), *_header(file.metadata)),
            {key: sigma for key, sigma in sigmas.items() if sigma is not None} if sigmas else None,
            _unread(file.metadata),
            {key: text for key, text in file.metadata.items() if key in _TEXTS},
        )


_TEXTS = (
    "modelspec.title",
    "modelspec.description",
    "modelspec.tags",
    "modelspec.usage_hint",
    "modelspec.merged_from",
    "modelspec.architecture",
    "ss_output_name",
    "ss_training_comment",
)


def _markers(names: Set[str]) -> list[Statement]:
    markers = {"v_pred": (PREDICTION, _VELOCITY), "ztsnr": (ZERO_SNR, True)}
    found = [Statement(*says, f"the tensor {name}") for name, says in markers.items() if name in names]
    if _EDM_SIGMAS.keys() & names:
        found.append(Statement(PREDICTION, _VELOCITY, "the tensor edm_vpred.sigma_max"))
    return found


def _buffers(file: SafetensorsFile) -> list[Statement]:
    """Returns what the training schedule says, which whole checkpoints hold as a buffer: no more than where it ends."""
    name = "alphas_cumprod"
    last = _last(file, name) if name in file.names() else None
    if last is None or last >= _NO_PICTURE:
        return []
    return [Statement(ZERO_SNR, True, f"the tensor {name}, which ends at {last:.2g}")]


def _last(file: SafetensorsFile, name: str) -> float | None:
    """Returns a tensor's last value; None where it has none, or is of a type that numpy has not."""
    info = file.info(name)
    return float(file.array(name).reshape(-1)[-1]) if info.nbytes and info.dtype in ("F64", "F32", "F16") else None


def _header(metadata: Mapping[str, str]) -> list[Statement]:
    """Returns what the header says; unknown values are passed over, as trainers write empty ones."""
    found = []
    for key, (says, read) in _LINES.items():
        value = read(metadata[key].strip().lower()) if key in metadata else None
        if value is not None:
            found.append(Statement(says, value, f"{key}: {metadata[key]}"))
    return found


def _unread(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Returns lines that name a prediction which is none that is known; trainers write empty ones and "None"."""
    words = {key: metadata[key].strip() for key in _PREDICTION_LINES if key in metadata}
    known = ("", "none", "null", *_PREDICTIONS)
    return tuple(f"{key}: {word[:60]}" for key, word in words.items() if word.lower() not in known)


def _of_architecture(text: str) -> str | None:
    """Stability AI's names end in what SD2's larger model predicts; no other architecture's name says it."""
    return {"stable-diffusion-v2-768-v": _VELOCITY, "stable-diffusion-v2-512": _EPSILON}.get(text.split("/")[0])


_LINES: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    **dict.fromkeys(_PREDICTION_LINES, (PREDICTION, _PREDICTIONS.get)),
    "modelspec.architecture": (PREDICTION, _of_architecture),
    "ss_v_parameterization": (PREDICTION, _VELOCITY_FLAGS.get),
    "ss_v_prediction": (PREDICTION, _VELOCITY_FLAGS.get),
    "ss_base_model_version": (PREDICTION, _BASES.get),
    "ss_zero_terminal_snr": (ZERO_SNR, _FLAGS.get),
    "modelspec.zero_terminal_snr": (ZERO_SNR, _FLAGS.get),
}
"""What each line of a header speaks of, and how it is read."""


@dataclass(frozen=True)
class Distillation:
    """A way of distilling for a few steps, and how its checkpoints are drawn.

    They were trained on few timesteps, the first of which is the last training timestep; with the leading spacing that
    most checkpoints come with, a run of 4 steps would begin at timestep 751 instead of 999.

    Args:
        name: as its authors call it.
        pattern: by which names and descriptions are recognized.
        spacing: of the timesteps, None where the samplers have their own.
        samplers: that its authors draw with.
    """

    name: str
    pattern: str
    spacing: str | None
    samplers: tuple[str, ...]


DISTILLATIONS = (
    Distillation("SDXL-Lightning", r"lightning", "trailing", ("euler",)),
    Distillation("Hyper-SD", r"hyper[-_ ]?(sd|xl)", "trailing", ("ddim", "tcd", "euler")),
    Distillation("DMD2", r"(?<![a-z])dmd2?(?![a-z])", "trailing", ("lcm", "euler")),
    Distillation("Turbo", r"turbo", "trailing", ("euler_ancestral", "euler")),
    Distillation("LCM", r"(?<![a-z])lcm(?![a-z])", None, ("lcm",)),
    Distillation("TCD", r"(?<![a-z])tcd(?![a-z])", None, ("tcd",)),
)
"""Papers: arXiv 2402.13929, 2404.13686, 2405.14867, 2311.17042, 2310.04378, 2402.19159."""

_STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")


@dataclass(frozen=True)
class FewStep:
    """What a name or a header says of a distilled file.

    Args:
        distillation: by which it was made.
        steps: how many steps it is for; None where it does not say.
        where: it is said.
    """

    distillation: Distillation
    steps: int | None
    where: str


def recognize(name: str, texts: Mapping[str, str]) -> FewStep | None:
    """Recognizes a distilled checkpoint or LoRA; None where nothing speaks of one.

    Args:
        name: of the file, or the hub's id.
        texts: of the header, by key, as `Declarations` has them.
    """
    lines = {"its name": name, **{f"{key}: {text[:60]}": text for key, text in texts.items()}}
    for where, text in lines.items():
        lowered = text.lower()
        for distillation in DISTILLATIONS:
            if re.search(distillation.pattern, lowered):
                steps = _STEPS.search(lowered)
                return FewStep(distillation, int(steps[1]) if steps else None, where)
    return None
