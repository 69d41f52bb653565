"""The denoising run: at each step the phase's engine, the step's window shifts, and the sampler's update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hidiff_runtime.denoising.conditioning import (
    Array,
    Conditioning,
    check_array,
    check_guidance,
    check_rescale,
    check_steps,
)
from hidiff_runtime.denoising.controlnet import ControlNet, check_conditioning_scale
from hidiff_runtime.denoising.device_loop import DeviceLoop
from hidiff_runtime.denoising.host_loop import run_on_host
from hidiff_runtime.denoising.init_image import InitImage
from hidiff_runtime.denoising.run_context import Callback, Control, ControlRequest, EngineSource, RunContext, StepInfo
from hidiff_runtime.denoising.window_shifts import own_seeds_refused
from hidiff_runtime.errors import InputError
from hidiff_runtime.format.step_graph import GUIDANCE_RESCALE
from hidiff_runtime.format.step_graph import NOISE_PRED as OUTPUT
from hidiff_runtime.format.validation import WINDOW_SHIFTS
from hidiff_runtime.phases import PhasePlan
from hidiff_runtime.sampling.planned_schedule import planned_schedule
from hidiff_runtime.sampling.torch_rng import PictureGenerators, RandomStream, TorchGenerator

if TYPE_CHECKING:
    from hidiff_runtime.format.manifest import Manifest

__all__ = ["OUTPUT", "Callback", "Control", "ControlRequest", "Denoiser", "StepInfo"]


class Denoiser:
    """Runs a bundle's engines through a whole denoising run.

    Runs on one bundle follow each other: a second thread waits for the first one's run.
    """

    def __init__(self, bundle: EngineSource) -> None:
        self._bundle = bundle

    def denoise(
        self,
        prompt_embeds: Array,
        negative_prompt_embeds: Array | None = None,
        *,
        steps: int,
        seed: int | Sequence[int] | RandomStream,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        latents: Array | None = None,
        image_latents: Array | None = None,
        strength: float | None = None,
        text_embeds: Array | None = None,
        negative_text_embeds: Array | None = None,
        time_ids: Array | None = None,
        negative_time_ids: Array | None = None,
        mask: Array | None = None,
        masked_image_latents: Array | None = None,
        control_image: Array | None = None,
        conditioning_scale: float = 1.0,
        full_run: bool = False,
        control: Control | None = None,
        callback: Callback | None = None,
    ) -> Array:
        """Denoises one batch; every array is float32 and has the bundle's batch first.

        Args:
            prompt_embeds: ``[batch, tokens, width]``.
            negative_prompt_embeds: the same; needed with guidance.
            steps: one of the bundle's tabulated step counts.
            seed: of the random stream, as torch takes it; or the stream, to go on from where it is. A seed for each
                picture gives each what it has by itself, as diffusers does with a list of generators.
            guidance_scale: needed with guidance; else left out.
            guidance_rescale: 0 to 1, how far the guided noise is brought back to the standard deviation of the noise
                for the prompt alone; the bundle's own if left out. Only with guidance.
            sampler: one of the bundle's; its default if left out.
            eta: of DDIM: 0 is deterministic, 1 is DDPM's noise.
            latents: the run's noise, ``[batch, channels, height, width]``, standard normal, instead of drawing it.
            image_latents: a picture to start from, ``[batch, channels, height, width]``, scaled as the VAE's.
            strength: with ``image_latents``, how much of the run the picture goes through, above 0 to 1: the last
                ``int(steps * strength)`` steps are run, and phases are fractions of these.
            text_embeds: SDXL's pooled ``[batch, width]``.
            negative_text_embeds: the same; needed with guidance.
            time_ids: SDXL's ``[batch, 6]``; left out, those of an uncropped picture of the bundle's size.
            negative_time_ids: left out, the same as ``time_ids``.
            mask: inpainting's ``[batch, 1, height, width]`` at the latents' size, 1 where to paint. A UNet with
                channels for it takes ``masked_image_latents`` besides. Any other takes ``image_latents`` besides,
                which are put back outside the mask after each evaluation, as noisy as the sample is there.
            masked_image_latents: inpainting's ``[batch, 4, height, width]``, scaled as the VAE's.
            control_image: what the bundle's ControlNet sees, ``[batch, 3, picture height, picture width]``, 0 to 1.
            conditioning_scale: what the ControlNet's residuals are multiplied by.
            full_run: whether every evaluation is computed, guided and of all layers, where the bundle leaves some out.
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
        source = InitImage.of(manifest, image_latents, strength, embeddings)
        conditioning = Conditioning.of(manifest, embeddings)
        scale, rescale = check_guidance(manifest, guidance_scale), check_rescale(manifest, guidance_rescale)
        schedule, plan = planned_schedule(
            manifest, self._bundle.sampler(sampler), check_steps(steps), strength=strength, eta=eta, full_run=full_run
        )
        control = self._control(plan, control, control_image, conditioning_scale)
        generator = _stream(manifest, seed)
        shape = (manifest.batch, *manifest.latent)
        if latents is not None:
            check_array("latents", latents, shape)
        with self._bundle.lock:
            # First of all, since an open engine has compared its sizes with those that noise is drawn at.
            self._bundle.engine(plan.phase_at(0))
            noise = generator.randn(shape) if latents is None else latents
            state = schedule.start(noise) if source is None else source.start(schedule, noise)
            blend = None if source is None else source.blend(schedule, noise)
            run = RunContext(self._bundle, plan, conditioning, scale, rescale, generator, control, callback)
            tensors, step = self._bundle.tensors(), manifest.step
            older = step is not None and rescale > 0 and step.input(GUIDANCE_RESCALE) is None
            # The blend is the host's: two small copies an evaluation cost nothing beside it, and the step graph stays
            # what every run needs.
            if tensors is None or step is None or older or blend is not None:
                return run_on_host(run, state, blend)
            return DeviceLoop(run, schedule, tensors, step).finish(state)

    def _control(
        self, plan: PhasePlan, control: Control | None, image: Array | None, conditioning_scale: float
    ) -> Control | None:
        """Returns what gives the residuals: the caller's function, the bundle's ControlNet, or None for none."""
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
        if check_conditioning_scale(conditioning_scale) != 1:
            raise InputError(
                "conditioning_scale is for the bundle's ControlNet, which does not run.",
                given=f"{conditioning_scale}, and no control_image",
                advice="Give control_image too, or leave conditioning_scale out.",
            )
        if control is None and any(phase.control for phase in plan.phases):
            if manifest.controlnet is None:
                raise InputError(
                    "This bundle takes a ControlNet's residuals.",
                    given="no control",
                    advice="Give control=, a function that returns them for each step that asks.",
                )
            shape = [manifest.batch, 3, manifest.height, manifest.width]
            advice = f"This bundle's ControlNet needs it: float32 of shape {shape}, 0 to 1."
            raise InputError("control_image is missing.", advice=advice)
        return control


def _stream(manifest: Manifest, seed: int | Sequence[int] | RandomStream) -> RandomStream:
    """Returns what a run draws from. Raises InputError for what is no seed, or no seeds for this bundle's pictures."""
    if isinstance(seed, TorchGenerator):
        return seed
    if not isinstance(seed, PictureGenerators):
        if not isinstance(seed, Sequence) or isinstance(seed, str):
            return TorchGenerator(seed)
        seed = PictureGenerators(seed)
    if len(seed.each) != manifest.batch:
        raise InputError(
            f"This bundle makes {manifest.batch} picture{'s' * (manifest.batch > 1)} a run.",
            given=f"{len(seed.each)} seeds",
            advice="Give one seed for all, or as many as there are pictures.",
        )
    shifts = manifest.phases[0].input(WINDOW_SHIFTS)
    if manifest.batch > 1 and shifts is not None and len(shifts.shape) == 1:
        raise own_seeds_refused()
    return seed
