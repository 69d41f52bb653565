"""What is measured: the models and sizes, at full width or as a rehearsal, and how often. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hidiff_export.recipe import Recipe
from hidiff_runtime.phases import Phase, PhasePlan, StepRange

CASES: Mapping[str, int] = {"sd15-1024": 128, "sd15-2048": 128, "sdxl-2048": 256, "sdxl-4096": 256}
"""The shipped recipes that are measured, and the pixels a side of their rehearsals."""

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
PRECISIONS = ("float16", "bfloat16")
PYTORCH = "pytorch"

CALL_SNR_DB: Mapping[str, float] = {"float16": 45.0, "bfloat16": 32.0}
"""Least signal-to-noise ratio of one evaluation, engine beside float32 PyTorch on the same weights."""

PICTURE_PSNR_DB = 30.0
"""Least peak signal-to-noise ratio of the decoded picture."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Args:
        device: torch's name of where everything runs.
        warm_up: evaluations before the first that counts.
        rounds: evaluations of each contender that count; fewer where `seconds` are over, but never below 5.
        seconds: after which no further round of a phase begins.
        parity_steps: of the runs that are compared; enough for every phase to take part.
        run_steps: of the runs that are timed.
        runs: runs that count, after one that does not.
        vae_widths: channels of the decoder's levels.
        compiler: backend of torch.compile.
    """

    device: str
    warm_up: int
    rounds: int
    seconds: float
    parity_steps: int
    run_steps: int
    runs: int
    vae_widths: tuple[int, ...]
    compiler: str


FULL = Scale("cuda", 3, 20, 90.0, 10, 50, 3, (128, 256, 512, 512), "inductor")
REHEARSAL = Scale("cpu", 1, 2, 5.0, 10, 10, 1, (8, 8, 16, 16), "eager")


def scale_of(rehearse: bool) -> Scale:
    """Everything on the GPU, or next to nothing on the CPU."""
    return REHEARSAL if rehearse else FULL


def recipe_of(case: str, precision: str, rehearse: bool, backend: str | None = None) -> Recipe:
    """The shipped recipe with fabricated weights; in a rehearsal tiny, with the phases of the full size.

    Args:
        case: one of `CASES`.
        precision: of the weights and of our engines.
        rehearse: tiny, and for the CPU.
        backend: what builds the engines; ``None`` for PyTorch alone.

    Raises:
        RecipeError: the backend or the target does not take this precision, or is not one there is.
    """
    shipped = Recipe.load(case)
    scale = scale_of(rehearse)
    changes: dict[str, Any] = {
        "source": "random:0",
        "precision": precision,
        "sampler": ["ddim"],
        "steps": sorted({scale.parity_steps, scale.run_steps}),
    }
    if backend is not None:
        changes |= {"backend": backend, "targets": scale.device}
    else:
        changes |= {"targets": "cuda"}  # so that no precision is refused
    changes |= {"text": False, "vae": False}  # what is measured are the UNet's evaluations and runs
    if rehearse:
        rule = shipped.phase_rule()
        thresholds = {"strided": _fractions(rule.strided), "pooled": _fractions(rule.pooled)}
        changes |= {"unet_width": "tiny", "width": CASES[case], "height": CASES[case]}
        changes["hidiffusion"] = {"thresholds": {key: value for key, value in thresholds.items() if value is not None}}
    data = {key: value for key, value in shipped.to_dict().items() if key not in ("backend", "targets", "parity")}
    return Recipe.from_dict({**data, **changes}, case)


def _fractions(span: StepRange | None) -> dict[str, float] | None:
    return None if span is None else {"start": span.start, "end": span.end}


def extreme(case: str) -> bool:
    """Whether the published package has thresholds of its own for this size, which a rehearsal's is too small for."""
    return case in ("sd15-2048", "sdxl-4096")


@dataclass(frozen=True)
class Step:
    """A phase, and a step of a run of ``steps`` that it runs at."""

    phase: Phase
    step: int
    steps: int

    @property
    def timestep(self) -> float:
        """The timestep that an even spacing gives the step."""
        return float(round(999 * (1 - self.step / self.steps)))


def steps_of(recipe: Recipe, steps: int = 50) -> tuple[Step, ...]:
    """Every phase of the recipe, at the first step it has in a run of 50."""
    return tuple(Step(span.phase, span.first, steps) for span in PhasePlan(recipe.phase_rule(), steps).spans)
