"""Live pipelines with HiDiffusion in force, and the ways their runs end."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from hidiff_export import apply_hidiffusion
from hidiff_export.families.family import Family, Task
from tests.parity.pipelines import SD15_NAME, Case, arguments, build, trajectory

SD15 = Case("StableDiffusionPipeline", Family.SD15, name=SD15_NAME, scheduler="DDIMScheduler", height=8, width=8)
# A ControlNet sees latents of 128 at the longer side, so a small square would make it work on a large one.
CONTROLNET = Case(
    "StableDiffusionControlNetPipeline", Family.SD15, Task.CONTROLNET, SD15_NAME, "DDIMScheduler", height=16, width=192
)


@functools.cache
def hidiffused(case: Case, seed: int = 1, **options: Any) -> list[torch.Tensor]:
    """The trajectory of a fresh pipeline."""
    with apply_hidiffusion(pipe := build(case), **options):
        return trajectory(pipe, arguments(case), seed)


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class CancelError(Exception):
    """Raised by a callback."""


def cancel(pipe: Any, call: Mapping[str, Any], step: int) -> None:
    def stop(_pipe: Any, at: int, _timestep: Any, _given: Any) -> dict[str, Any]:
        if at == step:
            raise CancelError
        return {}

    with pytest.raises(CancelError):
        pipe(**call, callback_on_step_end=stop)
