"""A run whose latents are the host's: each engine takes host arrays and gives them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.denoising.conditioning import Array, guided
from hidiff_runtime.denoising.init_image import MaskBlend
from hidiff_runtime.denoising.run_context import RunContext, engine_errors
from hidiff_runtime.errors import EngineError
from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.format.step_graph import LATENTS, NOISE_PRED
from hidiff_runtime.reused_features import DEEP_FEATURES
from hidiff_runtime.sampling.scheduler_state import SamplerState


def run_on_host(run: RunContext, state: SamplerState, blend: MaskBlend | None = None) -> Array:
    """Takes every step that is left; returns the latents. ``blend`` puts the picture back outside a mask."""
    features: dict[str, Array] = {}
    started = time.perf_counter()
    while not state.done:
        evaluation, output = state.evaluation, None
        if evaluation.computed:
            output = _evaluate(run, state, features)
        else:
            run.skip(evaluation)
        shape = state.latents.shape
        state.advance(output, run.generator.randn(shape) if state.draws_noise else None)
        if blend is not None:
            state.latents = blend(state.latents, state.index)
        if not state.done and state.step == evaluation.step:
            continue
        run.finished(evaluation, np.array(state.latents), time.perf_counter() - started)
        started = time.perf_counter()
    return np.array(state.latents)


def _evaluate(run: RunContext, state: SamplerState, features: dict[str, Array]) -> Array:
    """Returns the UNet's output after guidance; ``features`` are those that a later evaluation takes, or this one."""
    record = run.record(state.evaluation)
    rows = run.bundle.manifest.batch_of(record.phase)
    conditioning = run.conditioning.last(rows)
    inputs: dict[str, NDArray[Any]] = {
        LATENTS: conditioning.model_input(state.model_input(), rows),
        **conditioning.inputs,
        **run.evaluation(state.evaluation),
    }
    # Before the residuals, so that whatever the phase before had open is closed when the ControlNet's engine opens.
    session = run.engine(state.evaluation)
    inputs |= run.residuals(record, state.step, inputs)
    if record.phase.shallow:
        inputs |= features
    where = run.where(state.evaluation)
    with engine_errors(where):
        found = session.run(inputs)
    if DEEP_FEATURES in found and run.plan.rule.reuse is not None:
        features[DEEP_FEATURES] = found[DEEP_FEATURES]
    sound = _sound(run, found.get(NOISE_PRED), record.outputs[0].shape, where)
    return guided(sound, run.scale(record.phase), run.guidance_rescale)


def _sound(run: RunContext, noise: NDArray[Any] | None, shape: tuple[int, ...], where: str) -> Array:
    if noise is None:
        raise EngineError(f"The engine gave no {NOISE_PRED} in {where}.", advice="Build the bundle again.")
    if noise.shape != shape:
        raise EngineError(
            f"The engine gave {NOISE_PRED} of another shape than the manifest's in {where}.",
            given=f"expected shape {list(shape)}, got {list(noise.shape)}",
            advice="Build the bundle again.",
        )
    if bad := count_nonfinite(noise):
        raise run.nonfinite(bad, noise.size, where)
    return noise.astype(np.float32, copy=False)
