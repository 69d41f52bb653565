"""A run whose latents, embeddings and sampler state stay on the device from the first step to the last.

For each evaluation the host sends what only it knows: timestep, window shifts and the sampler's coefficients, less than
a kilobyte, and noise where the sampler takes some. Nothing comes back, so that the host runs ahead of the device, until
a callback wants the latents or the run ends. NaN are counted on the device and looked at then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.device_tensors import DeviceTensors
from hidiff_runtime.backends.protocol import DeviceArray
from hidiff_runtime.denoising.conditioning import Array
from hidiff_runtime.denoising.controlnet import ControlNet
from hidiff_runtime.denoising.run_context import RunContext, engine_errors
from hidiff_runtime.format.specs import GraphRecord, TensorSpec
from hidiff_runtime.format.step_graph import (
    CHANNELS,
    GUIDANCE_RESCALE,
    GUIDANCE_SCALE,
    INPUT_SCALE,
    LATENTS,
    NEXT_SAMPLE,
    NEXT_STATE,
    NEXT_UNSOUND,
    NOISE,
    ROWS,
    SAMPLE,
    STATE,
    UNGUIDED_LATENTS,
    UNSOUND,
    padded_rows,
)
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampling.scheduler_state import Evaluation, SamplerState, Schedule

_NEXT = {SAMPLE: NEXT_SAMPLE, STATE: NEXT_STATE, UNSOUND: NEXT_UNSOUND}
"""What a step makes of what the last one left."""

_FLIPPING = {**{name: name for name in _NEXT}, **{after: name for name, after in _NEXT.items()}}
"""The two names of what a step changes, by the one before."""

_CALLED = {UNGUIDED_LATENTS: LATENTS}
"""What phases call that which a step graph calls otherwise; it is of their batch."""


class DeviceLoop:
    """The run while it goes on; ``step`` is the record of the bundle's step graph, which follows guided phases."""

    def __init__(self, run: RunContext, schedule: Schedule, tensors: DeviceTensors, step: GraphRecord) -> None:
        self._run = run
        self._evaluations = schedule.evaluations
        self._tensors = tensors
        self._record = step
        self._specs = {spec.name: spec for spec in (*step.inputs, *step.outputs)}
        run.bundle.step_engine()  # before the first evaluation, since it is part of what a run needs at all

    def finish(self, state: SamplerState) -> Array:
        """Takes every step from ``state``, which is left as it is; returns the latents.

        Raises:
            BundleError: the step graph holds fewer states than the sampler.
            EngineError: an engine is missing, failed, or gave NaN.
            Cancelled: the callback ended the run.
        """
        run = self._run
        self._begin(state)
        started = time.perf_counter()
        for index, evaluation in enumerate(self._evaluations):
            if evaluation.computed:
                self._evaluate(evaluation)
            else:
                run.skip(evaluation)
            self._advance(index, evaluation)
            following = self._evaluations[index + 1 : index + 2]
            if following and following[0].step == evaluation.step:
                continue
            if run.callback is not None:
                latents = self._latents(index + 1)
                run.finished(evaluation, latents, time.perf_counter() - started)
                started = time.perf_counter()
        return self._latents(len(self._evaluations))

    def _begin(self, state: SamplerState) -> None:
        """Uploads what the run starts from and what stays. Noise and state are zero until something is there."""
        run, specs = self._run, self._specs
        arrays: dict[str, NDArray[Any]] = {NOISE: np.zeros(specs[NOISE].shape, np.float32)}
        if run.guidance_scale is not None:
            arrays[GUIDANCE_SCALE] = np.array([run.guidance_scale], np.float32)
            arrays[GUIDANCE_RESCALE] = np.array([run.guidance_rescale], np.float32)
        if run.conditioning.channels is not None:
            arrays[CHANNELS] = run.conditioning.channels
        self._tensors.put(self._record.inputs, arrays)
        for phase in {phase.unguided: phase for phase in run.plan.phases}.values():
            self._begin_phase(phase, state)
        self._tensors.memory.upload(state.latents, self._flipping(SAMPLE, 0))
        for name in (STATE, UNSOUND):
            zeros = np.zeros(specs[name].shape, specs[name].dtype)
            self._tensors.memory.upload(zeros, self._flipping(name, 0))

    def _begin_phase(self, phase: Phase, state: SamplerState) -> None:
        """Uploads what the phases with guidance take all through the run, or those without."""
        run = self._run
        manifest, record = run.bundle.manifest, run.bundle.manifest.phase(phase)
        rows = manifest.batch_of(phase)
        conditioning = run.conditioning.last(rows)
        latents = conditioning.model_input(state.model_input(), rows)
        self._tensors.put(record.inputs, {LATENTS: latents, **conditioning.inputs})
        pred = record.outputs[0]  # a step that is forecast multiplies it by zero, even before there is any
        self._tensors.put((pred,), {pred.name: np.zeros(pred.shape, np.float32)})
        if isinstance(run.control, ControlNet) and phase.unguided in run.control.records:
            inputs = run.control.records[phase.unguided].inputs
            self._tensors.put(inputs, run.control.own(unguided=phase.unguided))

    def _flipping(self, name: str, index: int) -> DeviceArray:
        """Returns what a step changes, after ``index`` evaluations: of two tensors one is read, the other written."""
        return self._tensors.get(self._specs[name], f"{name} {index % 2}")

    def _evaluate(self, evaluation: Evaluation) -> None:
        run, step, tensors = self._run, evaluation.step, self._tensors
        record = run.record(evaluation)
        phase = record.phase
        given = run.evaluation(evaluation)
        tensors.put(record.inputs, given)
        session, inputs = run.engine(evaluation), tensors.pick(record.inputs)
        if isinstance(run.control, ControlNet):
            if phase.control:
                run.control.execute(tensors.pick, step, run.plan.steps, unguided=phase.unguided)
        else:
            known = run.conditioning.last(run.bundle.manifest.batch_of(phase)).inputs
            seen = _Inputs({**known, **given}, lambda: tensors.memory.download(inputs[LATENTS]))
            tensors.put(record.residuals, run.residuals(record, step, seen))
        with engine_errors(run.where(evaluation)):
            session.execute(inputs, tensors.pick(record.outputs))

    def _advance(self, index: int, evaluation: Evaluation) -> None:
        run, tensors = self._run, self._tensors
        phase = run.phase(evaluation)
        record = run.bundle.manifest.step_of(phase)
        assert record is not None  # by `hidiff_runtime.format.validation`: with one step graph there is the other
        following = self._evaluations[min(index + 1, len(self._evaluations) - 1)]
        given: dict[str, NDArray[Any]] = {
            ROWS: padded_rows(evaluation.rows, self._specs[STATE].shape[0]),
            INPUT_SCALE: np.array([following.input_scale], np.float32),
        }
        if evaluation.draws_noise:
            given[NOISE] = run.generator.randn(self._specs[NOISE].shape)
        tensors.put(record.inputs, given)
        session = run.bundle.step_engine(unguided=phase.unguided)
        with engine_errors(run.where(evaluation)):
            session.execute(
                {spec.name: self._of_step(spec, index) for spec in record.inputs},
                {spec.name: self._of_step(spec, index + 1) for spec in record.outputs},
            )

    def _of_step(self, spec: TensorSpec, index: int) -> DeviceArray:
        """Returns a tensor of a step graph's, after ``index`` evaluations where they change it."""
        if spec.name in _FLIPPING:
            return self._flipping(_FLIPPING[spec.name], index)
        return self._tensors.get(spec, _CALLED.get(spec.name))

    def _latents(self, index: int) -> Array:
        """Returns the sample after ``index`` evaluations, once none of them is found unsound. Waits for the device."""
        memory = self._tensors.memory
        with engine_errors(self._run.where(self._evaluations[index - 1])):
            _, first, bad = memory.download(self._flipping(UNSOUND, index)).tolist()
            latents = memory.download(self._flipping(SAMPLE, index))
        if first:
            evaluation = self._evaluations[first - 1]
            pred = self._run.record(evaluation).outputs[0]
            raise self._run.nonfinite(bad, math.prod(pred.shape), self._run.where(evaluation))
        return latents


class _Inputs(Mapping[str, NDArray[Any]]):
    """An evaluation's inputs as a caller's control sees them; the latents are downloaded when they are read."""

    def __init__(self, known: Mapping[str, NDArray[Any]], latents: Callable[[], Array]) -> None:
        self._known = known
        self._download = latents
        self._latents: Array | None = None

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name != LATENTS:
            return self._known[name]
        if self._latents is None:
            self._latents = self._download()
        return self._latents

    def __iter__(self) -> Iterator[str]:
        return iter((LATENTS, *self._known))

    def __len__(self) -> int:
        return 1 + len(self._known)
