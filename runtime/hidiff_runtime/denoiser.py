"""The denoising run: at each step the phase's engine, the step's window shifts, and the sampler's update.

Everything random comes from one stream, in this order: the latents, unless given; then for every evaluation one
uniform per windowed block for the shifts, and the sampler's noise if it takes some there. PyTorch with a CPU generator
of the same seed draws the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.conditioning import Conditioning, check_array, check_guidance, guided
from hidiff_runtime.controlnet import ControlNet, check_scale
from hidiff_runtime.errors import Cancelled, EngineError, InputError
from hidiff_runtime.phases import Phase, PhasePlan
from hidiff_runtime.rng import TorchGenerator
from hidiff_runtime.shifts import draw_window_shifts

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.manifest import Manifest
    from hidiff_runtime.sampler import SamplerState

Array = NDArray[np.float32]

OUTPUT = "noise_pred"


@dataclass(frozen=True)
class StepInfo:
    """A finished step, as a callback sees it.

    Args:
        step: logical step, from 0.
        steps: logical steps of the run.
        timestep: of the step's last evaluation.
        phase: that the step ran in.
        latents: float32 ``[batch, channels, height, width]`` after the step; a copy.
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
        inputs: the evaluation's graph inputs, the scaled ``latents`` and the ``timestep`` among them.
    """

    step: int
    steps: int
    inputs: Mapping[str, NDArray[Any]]


Callback = Callable[[StepInfo], object]
"""Called after each step; returning False, or raising, cancels the run."""

Control = Callable[[ControlRequest], Mapping[str, Array]]
"""Gives the ControlNet's residuals by graph input name: ``down_residual_00``, …, ``mid_residual``."""


class Denoiser:
    """Runs a bundle's engines through a whole denoising run.

    Runs on one bundle follow each other: a second thread waits for the first one's run.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def denoise(
        self,
        prompt_embeds: Array,
        negative_prompt_embeds: Array | None = None,
        *,
        steps: int,
        seed: int,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        latents: Array | None = None,
        text_embeds: Array | None = None,
        negative_text_embeds: Array | None = None,
        time_ids: Array | None = None,
        negative_time_ids: Array | None = None,
        mask: Array | None = None,
        masked_image_latents: Array | None = None,
        control_image: Array | None = None,
        conditioning_scale: float = 1.0,
        control: Control | None = None,
        callback: Callback | None = None,
    ) -> Array:
        """Denoises one batch; every array is float32 and has the bundle's batch first.

        Args:
            prompt_embeds: ``[batch, tokens, width]``.
            negative_prompt_embeds: the same; needed with guidance.
            steps: one of the bundle's tabulated step counts.
            seed: of the random stream, as torch takes it.
            guidance_scale: needed with guidance; else left out.
            sampler: one of the bundle's; its default if left out.
            eta: of DDIM: 0 is deterministic, 1 is DDPM's noise.
            latents: ``[batch, channels, height, width]`` standard normal, instead of drawing them.
            text_embeds: SDXL's pooled ``[batch, width]``.
            negative_text_embeds: the same; needed with guidance.
            time_ids: SDXL's ``[batch, 6]``; left out, those of an uncropped picture of the bundle's size.
            negative_time_ids: left out, the same as ``time_ids``.
            mask: inpainting's ``[batch, 1, height, width]`` at the latents' size, 1 where to paint.
            masked_image_latents: inpainting's ``[batch, 4, height, width]``, scaled as the VAE's.
            control_image: what the bundle's ControlNet sees, ``[batch, 3, picture height, picture width]``, 0 to 1.
            conditioning_scale: what the ControlNet's residuals are multiplied by.
            control: asked for residuals at each step that takes them, in place of the bundle's ControlNet.
            callback: called after each step.

        Returns:
            float32 ``[batch, channels, height, width]``, to be decoded by the VAE.

        Raises:
            InputError: a value is not one this bundle takes; nothing was run.
            Cancelled: the callback ended the run.
            EngineError: an engine is missing, failed, or gave NaN.
        """
        manifest = self._bundle.manifest
        embeddings = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "text_embeds": text_embeds,
            "negative_text_embeds": negative_text_embeds,
            "time_ids": time_ids,
            "negative_time_ids": negative_time_ids,
            "mask": mask,
            "masked_image_latents": masked_image_latents,
        }
        conditioning = Conditioning.of(manifest, embeddings)
        scale = check_guidance(manifest, guidance_scale)
        schedule = self._bundle.sampler(sampler).schedule(steps, eta=eta)
        plan = PhasePlan(manifest.rule, schedule.steps)
        control = self._control(plan, control, control_image, conditioning_scale)
        generator = TorchGenerator(seed)
        shape = (manifest.batch, *manifest.latent)
        start = generator.randn(shape) if latents is None else check_array("latents", latents, shape)
        with self._bundle.lock:
            run = _Run(self._bundle, plan, conditioning, scale, generator, control)
            return run.finish(schedule.start(start), callback)

    def _control(
        self, plan: PhasePlan, control: Control | None, image: Array | None, conditioning_scale: float
    ) -> Control | None:
        """What gives the residuals: the caller's own, the bundle's ControlNet, or nothing where none are taken."""
        manifest = self._bundle.manifest
        for phase in plan.phases:
            manifest.phase(phase)
        takes = any(record.phase.control for record in manifest.phases)
        if control is not None and not takes:
            raise InputError(
                "This bundle takes no ControlNet's residuals.", given="control", advice="Leave control out."
            )
        if control is not None and image is not None:
            raise InputError(
                "The residuals come from one place.",
                given="both control and control_image",
                advice="Leave one of them out.",
            )
        if image is not None:
            if manifest.controlnet is None:
                advice = "Give control=, a function that returns its residuals." if takes else "Leave it out."
                raise InputError("This bundle has no ControlNet.", given="control_image", advice=advice)
            return ControlNet(self._bundle, manifest.controlnet, image, conditioning_scale)
        if check_scale(conditioning_scale) != 1:
            raise InputError(
                "conditioning_scale is for the bundle's ControlNet, which does not run.",
                given=f"{conditioning_scale}, and no control_image",
                advice="Give control_image too, or leave conditioning_scale out.",
            )
        if control is None and any(phase.control for phase in plan.phases):
            raise _control_missing(manifest)
        return control


def _control_missing(manifest: Manifest) -> InputError:
    if manifest.controlnet is None:
        return InputError(
            "This bundle takes a ControlNet's residuals.",
            given="no control",
            advice="Give control=, a function that returns them for each step that asks.",
        )
    return InputError(
        "control_image is missing.",
        advice=f"This bundle's ControlNet needs it: float32 of shape "
        f"{[manifest.batch, 3, manifest.height, manifest.width]}, 0 to 1.",
    )


@dataclass(frozen=True)
class _Run:
    """One run: what stays the same from step to step."""

    bundle: Bundle
    plan: PhasePlan
    conditioning: Conditioning
    guidance_scale: float | None
    generator: TorchGenerator
    control: Control | None

    def finish(self, state: SamplerState, callback: Callback | None) -> Array:
        """Takes every step that is left; returns the latents."""
        started = time.perf_counter()
        while not state.done:
            step, timestep = state.step, state.timestep
            phase = self.plan.phase_at(step)
            noise = guided(self._evaluate(phase, state), self.guidance_scale)
            shape = state.latents.shape
            state.advance(noise, self.generator.randn(shape) if state.draws_noise else None)
            if not state.done and state.step == step:
                continue
            if callback is not None:
                seconds = time.perf_counter() - started
                latents = np.array(state.latents, dtype=np.float32)
                _call(callback, StepInfo(step, self.plan.steps, timestep, phase, latents, seconds))
            started = time.perf_counter()
        return np.array(state.latents, dtype=np.float32)

    def _evaluate(self, phase: Phase, state: SamplerState) -> Array:
        record = self.bundle.manifest.phase(phase)
        repeat = 1 if self.guidance_scale is None else 2
        latents = np.asarray(state.model_input(), dtype=np.float32)
        inputs: dict[str, NDArray[Any]] = {
            "latents": self.conditioning.model_input(latents, repeat),
            "timestep": np.array([state.timestep], dtype=np.float32),
            **self.conditioning.inputs,
        }
        blocks = len(self.bundle.manifest.windowed_blocks)
        if blocks:
            inputs["window_shifts"] = draw_window_shifts(self.generator, blocks)
        # Before the residuals, so that whatever the phase before had open is closed when the ControlNet's engine opens.
        session = self.bundle.engine(phase)
        if phase.control and self.control is not None:
            residuals = self.control(ControlRequest(state.step, self.plan.steps, inputs))
            given = {
                spec.name: check_array(spec.name, residuals.get(spec.name), spec.shape) for spec in record.residuals
            }
            inputs |= given
        where = f"phase {phase.name}, step {state.step + 1} of {self.plan.steps}"
        try:
            noise = session.run(inputs).get(OUTPUT)
        except EngineError as error:
            raise EngineError(f"{error.summary} ({where})", given=error.given, advice=error.advice) from error
        return self._sound(noise, record.outputs[0].shape, where)

    def _sound(self, noise: NDArray[Any] | None, shape: tuple[int, ...], where: str) -> Array:
        if noise is None:
            raise EngineError(f"The engine gave no {OUTPUT} in {where}.", advice="Build the bundle again.")
        if noise.shape != shape:
            raise EngineError(
                f"The engine gave {OUTPUT} of another shape than the manifest's in {where}.",
                given=f"{list(noise.shape)} where {list(shape)} is due",
                advice="Build the bundle again.",
            )
        bad = int(noise.size - np.isfinite(noise).sum())
        if bad:
            raise EngineError(
                f"The engine gave NaN or infinite values in {where}.",
                given=f"{bad} of {noise.size} values, backend {self.bundle.backend}",
                advice=f"Run 'hidiff-run check {self.bundle.root}'; half precision may overflow, float32 does not.",
            )
        return noise.astype(np.float32, copy=False)


def _call(callback: Callback, info: StepInfo) -> None:
    where = f"after step {info.step + 1} of {info.steps}"
    try:
        answer = callback(info)
    except Cancelled:
        raise
    except Exception as error:
        raise Cancelled(f"The step callback ended the run {where}.", given=repr(error)) from error
    if answer is False:
        raise Cancelled(f"The step callback cancelled the run {where}.")
