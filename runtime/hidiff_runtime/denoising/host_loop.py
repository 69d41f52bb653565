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
from hidiff_runtime.sampling.scheduler_state import SamplerState


def run_on_host(run: RunContext, state: SamplerState, blend: MaskBlend | None = None) -> Array:
    """Takes every step that is left; returns the latents. ``blend`` puts the picture back outside a mask."""
    started = time.perf_counter()
    while not state.done:
        step, timestep = state.step, state.timestep
        output = None
        if state.computed:
            output = _evaluate(run, state)
        else:
            run.skip()
        shape = state.latents.shape
        state.advance(output, run.generator.randn(shape) if state.draws_noise else None)
        if blend is not None:
            state.latents = blend(state.latents, state.index)
        if not state.done and state.step == step:
            continue
        run.finished(step, timestep, np.array(state.latents), time.perf_counter() - started)
        started = time.perf_counter()
    return np.array(state.latents)


def _evaluate(run: RunContext, state: SamplerState) -> Array:
    """Returns the UNet's output after guidance."""
    record = run.bundle.manifest.phase(run.plan.phase_at(state.step))
    inputs: dict[str, NDArray[Any]] = {
        LATENTS: run.conditioning.model_input(state.model_input(), run.repeat),
        **run.conditioning.inputs,
        **run.evaluation(state.timestep),
    }
    # Before the residuals, so that whatever the phase before had open is closed when the ControlNet's engine opens.
    session = run.engine(state.step)
    inputs |= run.residuals(record, state.step, inputs)
    where = run.where(state.step)
    with engine_errors(where):
        noise = session.run(inputs).get(NOISE_PRED)
    sound = _sound(run, noise, record.outputs[0].shape, where)
    return guided(sound, run.guidance_scale, run.guidance_rescale)


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
