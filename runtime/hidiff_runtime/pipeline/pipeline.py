"""From prompts to pictures with a bundle alone: text encoders, the denoising run, the VAE."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hidiff_runtime import bundle as bundles
from hidiff_runtime.denoising.conditioning import Array, takes_channels
from hidiff_runtime.denoising.run_context import StepInfo
from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.specs import VaeRecord
from hidiff_runtime.pipeline import vae
from hidiff_runtime.pipeline.batching import batches, counted, together
from hidiff_runtime.pipeline.image_metadata import describe
from hidiff_runtime.pipeline.image_processing import from_bytes, latent_mask, pillow, to_pictures
from hidiff_runtime.pipeline.prompt_encoding import encode_prompts
from hidiff_runtime.pipeline.request import LateStartWarning, Request, late_start, repeated
from hidiff_runtime.pipeline.request_fields import SETTINGS, Settings, Size
from hidiff_runtime.sampling.torch_rng import RandomStream

if TYPE_CHECKING:
    from PIL.Image import Image

    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.format.manifest import Manifest


@dataclass(frozen=True)
class PictureStep(StepInfo):
    """A finished step, as a pipeline's callback sees it; with the record of the bundle's VAE."""

    vae: VaeRecord

    def preview(self, index: int = 0) -> Image:
        """Returns what picture ``index`` of the batch looks like so far: one pixel for each latent, in a millisecond
        or so, without the VAE.
        """
        return from_bytes(vae.preview(self.vae, self.latents[index : index + 1]))[0]


PictureCallback = Callable[[PictureStep], object]
"""Called after each step; returning False, or raising, cancels the run."""


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run.

    Args:
        request: what was asked.
        images: Pillow images, RGB, one for each of the batch; their ``info`` tells how they were made.
        cut: the ends of its prompts that had no place among the text encoder's tokens.
        seconds: that denoising and decoding took, or its share where several were drawn together.
    """

    request: Request
    images: list[Image]
    cut: tuple[str, ...]
    seconds: float


class Pipeline:
    """Makes pictures from prompts. A context manager: leaving it closes every engine.

    Args:
        bundle: an open one, with text encoders and a VAE; closed with the pipeline.

    Raises:
        BundleError: the bundle lacks something that pictures need.
        EngineError: Pillow is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        require_text_and_vae(bundle.manifest, bundle.root)
        pillow()
        self.bundle = bundle

    @classmethod
    def open(cls, folder: str | Path, **options: Any) -> Pipeline:
        """Opens the bundle in ``folder``; the options are those of :func:`hidiff_runtime.open`.

        Raises:
            BundleError: it is no bundle, is broken, or lacks text encoders or the VAE.
            EngineError: the backend, or Pillow, is not installed.
            InputError: an option is not one there is.
        """
        opened = bundles.open(folder, **options)
        try:
            return cls(opened)
        except BaseException:
            opened.close()
            raise

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int = 0,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        full_run: bool = False,
        sampler: str | None = None,
        eta: float = 0.0,
        image: Any = None,
        mask: Any = None,
        control_image: Any = None,
        strength: float | None = None,
        conditioning_scale: float = 1.0,
        clip_skip: int = 0,
        long_prompt: str = "truncate",
        original_size: Size | None = None,
        crops: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops: Size | None = None,
        negative_target_size: Size | None = None,
        resize: bool = False,
        num_images: int | None = None,
        callback: PictureCallback | None = None,
    ) -> Any:
        """Makes one picture, or one for each of the bundle's batch, or ``num_images``. The same seed gives diffusers'
        picture.

        Args:
            prompt: what the picture shows; a list for a batch, of as many as the bundle was built for.
            negative_prompt: and all that follow it: see `hidiff_runtime.Settings`.
            num_images: how many pictures of one prompt, whose seeds count up from ``seed``: by the batches that the
                bundle has of the size, else one by one, with the same pictures but for rounding.
            callback: called after each step with a `PictureStep`; returning False, or raising, cancels the run.

        Returns:
            A Pillow image, RGB; a list of them for a list of prompts, with ``num_images``, or where the bundle's batch
            is more than one.
            ``image.info`` tells how it was made, and `save_png` writes that into the file.

        Warns:
            LateStartWarning: so few steps begin where the UNet expects a picture, and give noise.
            TruncationWarning: the end of a prompt was cut.

        Raises:
            InputError: a value is not one this bundle takes; nothing was run.
            Cancelled: the callback ended the run.
            EngineError: an engine is missing, failed, or gave NaN.
        """
        given = locals()
        settings = Settings(**{name: given[name] for name in SETTINGS})
        requests = [self.request(prompt, settings)]
        if num_images is not None:
            requests = counted(
                requests[0], num_images, self.bundle.sized(width, height, len(requests[0].prompts)).manifest
            )
        if told := late_start(self.bundle, requests[0]):
            warnings.warn(told, LateStartWarning, stacklevel=2)
        images = [image for result in self.run(requests, callback=callback) for image in result.images]
        return images[0] if isinstance(prompt, str) and num_images is None and len(images) == 1 else images

    def request(self, prompt: str | Sequence[str], settings: Settings | None = None) -> Request:
        """Checks what is asked and fills in what is left out; opens no engine. Takes what the call takes.

        Raises:
            InputError: something is missing, not one this bundle takes, or does not fit the rest.
        """
        return Request.of(self.bundle, prompt, settings or Settings())

    def run(
        self,
        requests: Sequence[Request],
        *,
        callback: PictureCallback | None = None,
        progress: vae.Progress | None = None,
    ) -> Iterator[Result]:
        """Makes the pictures of many requests: encodes all prompts first, then gives each request's pictures as they
        are done.

        Requests of one picture each that are neighbors and alike are drawn together where the bundle has a batch for
        them; see `batches`.

        Args:
            callback: called after each step of each run.
            progress: told of each tile that is decoded.

        Raises:
            Cancelled: the callback ended the run.
            EngineError: an engine is missing, failed, or gave NaN.
        """
        encoded = iter(self._encode(requests))
        for run in self.batches(requests):
            started = time.perf_counter()
            texts = [next(encoded) for _ in run]
            request = together(run)
            bundle = self.bundle.sized(*request.size, len(request.prompts))
            embeds = {name: np.concatenate([own[name] for own, _ in texts]) for name in texts[0][0]}
            latents = _denoise(bundle, request, embeds, callback)
            images = iter(to_pictures(vae.decode(bundle, latents, progress=progress)))
            table = bundle.sampler(request.settings.sampler)
            seconds = (time.perf_counter() - started) / len(run)
            for one, (_, cut) in zip(run, texts, strict=True):
                own = [next(images) for _ in one.prompts]
                for index, image in enumerate(own):
                    image.info.update(describe(bundle.manifest, table, one, index, cut))
                yield Result(one, own, cut, seconds)

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Returns the requests in their order, those together that `run` draws in one run; opens no engine."""
        return batches(self.bundle.manifest, requests)

    def close(self) -> None:
        """Closes every engine; waits for a run in progress."""
        self.bundle.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bundle.__exit__(*exception)

    def _encode(self, requests: Sequence[Request]) -> list[tuple[dict[str, Array], tuple[str, ...]]]:
        """Returns each request's embeddings and what was cut; text encoders open once for all of equal options."""
        found: dict[int, tuple[dict[str, Array], tuple[str, ...]]] = {}
        groups: dict[tuple[int, str, bool], list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.settings
            key = (settings.clip_skip, settings.long_prompt, request.negative_prompts is None)
            groups.setdefault(key, []).append(number)
        for (clip_skip, long_prompt, without), numbers in groups.items():
            prompts = [text for number in numbers for text in requests[number].prompts]
            negative = [text for number in numbers for text in requests[number].negative_prompts or ()]
            bundle = self.bundle.sized(*requests[0].size)  # whose first engine may stay open beside the text encoders
            embeds, cut = encode_prompts(
                bundle, prompts, None if without else negative, clip_skip=clip_skip, long_prompt=long_prompt
            )
            end = 0
            for number in numbers:
                first, end = end, end + len(requests[number].prompts)
                own = {name: array[first:end] for name, array in embeds.items()}
                texts = (*requests[number].prompts, *(requests[number].negative_prompts or ()))
                found[number] = (own, tuple(dict.fromkeys(cut[text] for text in texts if text in cut)))
        return [found[number] for number in range(len(requests))]


def _denoise(bundle: Bundle, request: Request, embeds: dict[str, Array], callback: PictureCallback | None) -> Array:
    settings = request.settings
    assert settings.steps is not None
    generator = request.stream()
    given: dict[str, Any] = {**embeds, **_pictures(bundle, request, generator)}
    if request.time_ids is not None:
        given |= {"time_ids": request.time_ids, "negative_time_ids": request.negative_time_ids}
    return bundle.denoiser().denoise(
        **given,
        steps=settings.steps,
        seed=generator,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        full_run=settings.full_run,
        sampler=settings.sampler,
        eta=settings.eta,
        control_image=request.control_image,
        conditioning_scale=settings.conditioning_scale,
        callback=None if callback is None else _with_preview(bundle, callback),
    )


def _pictures(bundle: Bundle, request: Request, generator: RandomStream) -> dict[str, Array | float | None]:
    """Returns what the denoiser takes of image and mask.

    Draws from the stream what comes before the first step, in the order of diffusers' pipelines: the image's
    latents, the noise, and with a mask the masked image's latents, which pipelines with a UNet of four channels
    draw and leave unused.
    """
    image, mask = request.image, request.mask
    if image is None:
        return {}
    manifest, strength = bundle.manifest, request.settings.strength
    if len(request.seeds) > 1:  # each draws its own noise for the encoder
        image = repeated(image, manifest.batch)
        mask = None if mask is None else repeated(mask, manifest.batch)
    if mask is None:
        found = repeated(vae.encode(bundle, image, generator), manifest.batch)
        return {"image_latents": found, "strength": strength}
    given: dict[str, Array | float | None] = {}
    channels = takes_channels(manifest)
    if not channels or strength != 1:
        found = vae.encode(bundle, image, generator)
        given |= {"image_latents": repeated(found, manifest.batch), "strength": strength}
    given["latents"] = generator.randn((manifest.batch, *manifest.latent))
    given["mask"] = repeated(latent_mask(mask, manifest.latent), manifest.batch)
    masked = image * (mask < 0.5)
    if channels:
        found = vae.encode(bundle, np.asarray(masked, np.float32), generator)
        given["masked_image_latents"] = repeated(found, manifest.batch)
    else:
        generator.randn((len(masked), *manifest.latent))
    return given


def _with_preview(bundle: Bundle, callback: PictureCallback) -> Callable[[StepInfo], object]:
    record = vae.vae_of(bundle)
    return lambda info: callback(PictureStep(**vars(info), vae=record))


def require_text_and_vae(manifest: Manifest, root: Path) -> None:
    """Refuses a bundle that cannot make pictures from prompts; ``root`` is its folder, for messages.

    Raises:
        BundleError: it has no text encoder or no VAE, or takes residuals of a ControlNet that it does not hold.
    """
    lacking = [name for name, found in (("text encoder", manifest.text_encoders), ("VAE", manifest.vae)) if not found]
    if lacking:
        recipe = " and ".join({"text encoder": "text: true", "VAE": "vae: true"}[name] for name in lacking)
        raise BundleError(
            f"The bundle has no {' and no '.join(lacking)}, which prompts and pictures need.",
            given=root,
            advice=f"Build it with {recipe} in the recipe, or denoise embeddings to latents.",
        )
    if manifest.controlnet is None and any(record.phase.control for record in manifest.phases):
        raise BundleError(
            "The bundle takes the residuals of a ControlNet that it does not hold.",
            given=root,
            advice="Build it with controlnet in the recipe, or use its denoiser with control=.",
        )
