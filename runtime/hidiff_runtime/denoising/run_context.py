"""One denoising run: what is told of it, and what stays the same from its first step to its last.

Everything random comes from one stream, or from one for each picture, in this order: the noise, unless given; then for
every evaluation one uniform per windowed block for the shifts, and the sampler's noise if it takes some there. PyTorch
with a CPU generator of the same seed draws the same, or with a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.denoising.conditioning import Array, Conditioning, check_array
from hidiff_runtime.denoising.window_shifts import graph_shifts
from hidiff_runtime.errors import Cancelled, EngineError
from hidiff_runtime.format.specs import PhaseRecord
from hidiff_runtime.format.validation import WINDOW_SHIFTS
from hidiff_runtime.phases import Phase, PhasePlan
from hidiff_runtime.sampling.torch_rng import RandomStream, draw_window_shifts

if TYPE_CHECKING:
    from hidiff_runtime.backends.device_tensors import DeviceTensors
    from hidiff_runtime.backends.protocol import Session
    from hidiff_runtime.format.manifest import Manifest
    from hidiff_runtime.sampling.scheduler_state import Evaluation
    from hidiff_runtime.sampling.scheduler_table import SamplerTable


class EngineSource(Protocol):
    """An open bundle as a run sees it: what it holds, and its engines; `hidiff_runtime.bundle.Bundle` is one."""

    @property
    def root(self) -> Path:
        """The bundle's folder, for messages."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle holds."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held by a run, since engines are shared by all runs."""

    @property
    def backend(self) -> str:
        """The name of the backend whose engines run."""

    def sampler(self, name: str | None = None) -> SamplerTable:
        """Returns a sampler's table; the default sampler's without a name."""

    def engine(self, phase: Phase, *, upcoming: Phase | None = None) -> Session:
        """Returns a phase's session; ``upcoming`` will be asked for next."""

    def controlnet_engine(self, *, unguided: bool = False) -> Session:
        """Returns the ControlNet's session, for phases with or without guidance."""

    def step_engine(self, *, unguided: bool = False) -> Session:
        """Returns the step graph's session, after phases with or without guidance."""

    def tensors(self) -> DeviceTensors | None:
        """Returns what runs keep on the device; None where the host keeps it."""


@dataclass(frozen=True)
class StepInfo:
    """A finished step, as a callback sees it.

    Args:
        step: logical step, from 0.
        steps: logical steps of the run.
        timestep: of the step's last evaluation.
        phase: that the step ran in.
        latents: float32 ``[batch, channels, height, width]`` after the step and a mask's blend; a copy.
        seconds: the step took, the callback's own time left out.
    """

    step: int
    steps: int
    timestep: float
    phase: Phase
    latents: Array
    seconds: float


@dataclass(frozen=True)
class ControlRequest:
    """What residuals are asked for.

    Args:
        step: logical step, from 0.
        steps: logical steps of the run.
        inputs: the evaluation's graph inputs, the scaled ``latents`` and the ``timestep`` among them. Where the latents
            stay on a device, reading them waits for the device.
        unguided: whether the inputs, and so the residuals, are for the prompts alone, where the bundle has guidance.
    """

    step: int
    steps: int
    inputs: Mapping[str, NDArray[Any]]
    unguided: bool = False


Callback = Callable[[StepInfo], object]
"""Called after each step; returning False, or raising, cancels the run."""

Control = Callable[[ControlRequest], Mapping[str, Array]]
"""Gives the ControlNet's residuals by graph input name: ``down_residual_00``, …, ``mid_residual``."""


@dataclass(frozen=True)
class RunContext:
    """What stays the same from step to step.

    Args:
        bundle: whose engines run; its lock is held.
        plan: which phase each step is in.
        conditioning: what every evaluation is given.
        guidance_scale: None where the bundle has no guidance.
        guidance_rescale: 0 to 1; 0 leaves guidance as it is.
        generator: of everything random.
        control: gives the residuals; None where no step takes any.
        callback: called after each step.
    """

    bundle: EngineSource
    plan: PhasePlan
    conditioning: Conditioning
    guidance_scale: float | None
    guidance_rescale: float
    generator: RandomStream
    control: Control | None
    callback: Callback | None

    def phase(self, evaluation: Evaluation) -> Phase:
        """Returns the phase that an evaluation is in, with the layers that it computes."""
        return replace(self.plan.phase_at(evaluation.step), shallow=evaluation.shallow)

    def record(self, evaluation: Evaluation) -> PhaseRecord:
        """Returns the record of the graph that an evaluation takes."""
        return self.bundle.manifest.phase(self.phase(evaluation))

    def scale(self, phase: Phase) -> float | None:
        """Returns the guidance scale in a phase; None where its output has no negative half."""
        return None if phase.unguided else self.guidance_scale

    def engine(self, evaluation: Evaluation) -> Session:
        """Returns the engine that an evaluation takes; tells the bundle which phase follows."""
        following = (span.phase for span in self.plan.spans if span.first > evaluation.step)
        return self.bundle.engine(self.phase(evaluation), upcoming=next(following, None))

    def evaluation(self, evaluation: Evaluation) -> dict[str, NDArray[Any]]:
        """Returns the inputs of an evaluation that change each time, the latents aside; draws the window shifts."""
        return {"timestep": np.array([evaluation.timestep], dtype=np.float32), **self._window_shifts(evaluation)}

    def skip(self, evaluation: Evaluation) -> None:
        """Draws the window shifts of an evaluation that is forecast, so that those after it have the ones they had."""
        self._window_shifts(evaluation)

    def _window_shifts(self, evaluation: Evaluation) -> dict[str, NDArray[Any]]:
        spec = self.record(evaluation).input(WINDOW_SHIFTS)
        if spec is None:
            return {}
        return {WINDOW_SHIFTS: graph_shifts(draw_window_shifts(self.generator, spec.shape[-1]), spec.shape)}

    def residuals(self, record: PhaseRecord, step: int, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
        """Returns what ``control`` gives for these graph inputs, checked; empty where the phase takes none."""
        if not record.phase.control or self.control is None:
            return {}
        found = self.control(ControlRequest(step, self.plan.steps, inputs, record.phase.unguided))
        return {spec.name: check_array(spec.name, found.get(spec.name), spec.shape) for spec in record.residuals}

    def where(self, evaluation: Evaluation) -> str:
        """Returns an evaluation's phase and step, for messages."""
        return f"phase {self.phase(evaluation).name}, step {evaluation.step + 1} of {self.plan.steps}"

    def finished(self, evaluation: Evaluation, latents: Array, seconds: float) -> None:
        """Tells the callback of the step that an evaluation ended. Raises Cancelled when it ends the run."""
        if self.callback is None:
            return
        step, phase = evaluation.step, self.phase(evaluation)
        where = f"after step {step + 1} of {self.plan.steps}"
        try:
            answer = self.callback(StepInfo(step, self.plan.steps, evaluation.timestep, phase, latents, seconds))
        except Cancelled:
            raise
        except Exception as error:
            raise Cancelled(f"The step callback ended the run {where}.", given=repr(error)) from error
        if answer is False:
            raise Cancelled(f"The step callback cancelled the run {where}.")

    def nonfinite(self, bad: int, size: int, where: str) -> EngineError:
        """Returns the error for ``bad`` of ``size`` values that are NaN or infinite."""
        return EngineError(
            f"The engine gave NaN or infinite values in {where}.",
            given=f"{bad} of {size} values, backend {self.bundle.backend}",
            advice=f"Run 'hidiff-run check {self.bundle.root}'; half precision may overflow, float32 does not.",
        )


@contextmanager
def engine_errors(where: str) -> Iterator[None]:
    """Says in which evaluation an engine failed."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{error.summary} ({where})", given=error.given, advice=error.advice) from error
