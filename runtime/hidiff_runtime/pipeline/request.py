"""What is asked of a pipeline, and what that comes to for a bundle: checked, with diffusers' defaults filled in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hidiff_runtime.denoising.conditioning import (
    Array,
    check_guidance,
    check_rescale,
    check_steps,
    is_whole,
    takes_channels,
)
from hidiff_runtime.denoising.controlnet import check_conditioning_scale
from hidiff_runtime.errors import InputError
from hidiff_runtime.finite_values import is_finite
from hidiff_runtime.phases import PhasePlan
from hidiff_runtime.pipeline.image_processing import control_array, fitted_pictures, image_array, mask_array
from hidiff_runtime.pipeline.prompt_encoding import check_not_empty, check_options, check_text
from hidiff_runtime.pipeline.request_fields import ORDERS, PICTURES, SETTINGS, STEPS, Settings, Size
from hidiff_runtime.sampling.planned_schedule import planned_schedule
from hidiff_runtime.sampling.torch_rng import PictureGenerators, RandomStream, TorchGenerator

if TYPE_CHECKING:
    from PIL.Image import Image

    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.format.manifest import Manifest

MOST_PIXELS = 2**24
"""The largest size and crop: float32, which SDXL is told them in, holds no larger ones exactly."""

MOST_PICTURE = 0.7
"""The largest part of a picture, of the length of picture and noise, in what a run from noise may begin as. A run of 2
steps with leading timesteps begins at 0.53 and still draws; one of 1 step begins at 1, and gives noise."""


class LateStartWarning(UserWarning):
    """A run will give noise instead of a picture: the UNet is told of little noise, and given noise alone."""


@dataclass(frozen=True, eq=False)
class Request:
    """One run of a bundle.

    Args:
        prompts: one for each picture of the batch.
        negative_prompts: as many; None where none were given.
        settings: as they were asked for, all that were left out filled in but the pictures', which are of the bundle's
            size.
        steps: that the run takes: fewer than ``settings.steps`` where it starts from an image.
        size: width and height of the pictures.
        seeds: of the random stream: one for the whole batch, or one for each of its pictures.
        time_ids: SDXL's sizes and crop, float32 ``[batch, 6]``; None where the UNet takes none.
        negative_time_ids: the same; None without guidance.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    settings: Settings
    steps: int
    size: Size
    seeds: tuple[int, ...]
    time_ids: Array | None
    negative_time_ids: Array | None

    @classmethod
    def of(cls, bundle: Bundle, prompt: str | Sequence[str], settings: Settings) -> Request:
        """Checks what is asked against the bundle and fills in what was left out. Opens no engine.

        Raises:
            InputError: something is missing, not one this bundle takes, or does not fit the rest.
        """
        listed = isinstance(prompt, Sequence) and not isinstance(prompt, str)
        bundle = bundle.sized(settings.width, settings.height, len(prompt) if listed else None)
        manifest = bundle.manifest
        prompts = _prompts("prompt", prompt, manifest.batch)
        for text in prompts:
            check_not_empty(text)
        negative = _negative_prompts(manifest, settings.negative_prompt)
        filled = _filled(bundle, settings)
        times, table = _time_ids(manifest, filled), bundle.sampler(filled.sampler)
        assert filled.steps is not None
        schedule, _ = planned_schedule(
            manifest, table, filled.steps, strength=filled.strength, eta=filled.eta, full_run=filled.full_run
        )
        return cls(
            prompts=prompts,
            negative_prompts=negative,
            steps=schedule.steps,
            # Fitted pictures alone are kept: those that were given may be larger by far, and requests may wait.
            settings=replace(filled, **{name: _fitted(manifest, filled, name) for name in _given(filled)}),
            size=(manifest.width, manifest.height),
            seeds=(filled.seed,),
            time_ids=times[0],
            negative_time_ids=times[1] if manifest.guidance else None,
        )

    @property
    def given(self) -> tuple[str, ...]:
        """Which of ``image``, ``mask`` and ``control_image`` there are."""
        return _given(self.settings)

    @property
    def held(self) -> dict[int, int]:
        """The bytes of the pictures that the request holds, by what tells the pictures of several requests apart."""
        held = {}
        for pictures in (getattr(self.settings, name) for name in self.given):
            sizes = (one.width * one.height * len(one.getbands()) for one in _listed(pictures))
            held[id(pictures)] = sum(sizes)
        return held

    @property
    def image(self) -> Array | None:
        """The image, float32 ``[1 or batch, 3, height, width]``, -1 to 1; made anew each time, as large arrays are."""
        return _array(self.settings.image, image_array)

    @property
    def mask(self) -> Array | None:
        """The mask, float32 ``[1 or batch, 1, height, width]``, 0 or 1; made anew each time."""
        return _array(self.settings.mask, mask_array)

    @property
    def control_image(self) -> Array | None:
        """The control image, float32 ``[batch, 3, height, width]``, 0 to 1; made anew each time."""
        found = _array(self.settings.control_image, control_array)
        return None if found is None else repeated(found, len(self.prompts))

    def seeded(self, *seeds: int) -> Request:
        """Returns the request with another seed for its batch, or one for each of its pictures."""
        return replace(self, settings=replace(self.settings, seed=seeds[0]), seeds=seeds)

    def stream(self) -> RandomStream:
        """Returns what the run draws from, at its beginning."""
        return TorchGenerator(self.seeds[0]) if len(self.seeds) == 1 else PictureGenerators(self.seeds)

    def phases(self, manifest: Manifest) -> PhasePlan:
        """Returns which phase each step of the run is in."""
        return PhasePlan(manifest.rule.whole if self.settings.full_run else manifest.rule, self.steps)


def late_start(bundle: Bundle, request: Request) -> str | None:
    """Returns what is wrong with where a run begins, in a line; None where nothing is."""
    settings = request.settings
    if settings.strength is not None or settings.steps is None:
        return None
    first = bundle.sampler(settings.sampler).schedule(settings.steps, eta=settings.eta).evaluations[0]
    picture, noise = first.noising
    if picture <= MOST_PICTURE * math.hypot(picture, noise):
        return None
    return (
        f"{settings.steps} step{'s' * (settings.steps != 1)} of {settings.sampler} begin at timestep "
        f"{first.timestep:g}, where the UNet expects a picture, and give noise: take more steps, or a bundle built "
        "with timestep_spacing: trailing"
    )


def _given(settings: Settings) -> tuple[str, ...]:
    return tuple(name for name in PICTURES if getattr(settings, name) is not None)


def _fitted(manifest: Manifest, settings: Settings, name: str) -> Any:
    """Returns the pictures of this name at the bundle's size; one for all instead of a list of it."""
    size, images = (manifest.width, manifest.height), getattr(settings, name)
    pictures = fitted_pictures(images, size, name, batch=manifest.batch, resize=settings.resize)
    return pictures[0] if len(pictures) == 1 else pictures


def _array(pictures: Any, convert: Callable[[Sequence[Image]], Array]) -> Array | None:
    return None if pictures is None else convert(_listed(pictures))


def _listed(pictures: Any) -> Sequence[Image]:
    return pictures if isinstance(pictures, Sequence) else [pictures]


def repeated(array: Array, batch: int) -> Array:
    """Returns one picture's array for the whole batch; any other as it is."""
    return array if len(array) == batch else np.concatenate([array] * batch)


def _prompts(name: str, given: str | Sequence[str], batch: int) -> tuple[str, ...]:
    """Returns a text for each picture: one for all, or as many as the batch has."""
    texts = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,) * batch
    for text in texts:
        check_text(name, text)
    if len(texts) != batch:
        raise InputError(
            f"This bundle makes {batch} picture{'s' * (batch > 1)} a run.",
            given=f"{len(texts)} {name}s",
            advice=f"Give one {name} for all, or {batch} of them; use Pipeline.run for more runs.",
        )
    return texts


def _negative_prompts(manifest: Manifest, given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    if not manifest.guidance:
        raise InputError(
            "This bundle was built without guidance: it takes no negative prompt.",
            given=repr(given),
            advice="Leave the negative prompt out.",
        )
    return _prompts("negative prompt", given, manifest.batch)


def _filled(bundle: Bundle, settings: Settings) -> Settings:
    """Returns the settings with everything that was left out, all of it checked."""
    manifest = bundle.manifest
    _check_pictures(manifest, settings)
    TorchGenerator(settings.seed)
    if not is_finite(settings.eta):
        raise InputError("eta must be a number.", given=repr(settings.eta), advice="Give 0, or up to 1 with DDIM.")
    most = min((encoder.clip_skip for encoder in manifest.text_encoders), default=0)
    check_options(settings.clip_skip, most, settings.long_prompt)
    table = bundle.sampler(settings.sampler)
    tabulated = table.steps.tolist()
    steps = (
        min(tabulated, key=lambda count: abs(count - STEPS)) if settings.steps is None else check_steps(settings.steps)
    )
    table.schedule(steps, eta=settings.eta)
    guidance = settings.guidance_scale
    if guidance is None and manifest.guidance:
        # Defaults of diffusers' pipelines: 5 for SDXL, except for inpainting without a ControlNet, and 7.5 for others.
        inpainting = settings.mask is not None and settings.control_image is None
        guidance = 5.0 if takes_sizes(manifest) and not inpainting else 7.5
    return replace(
        settings,
        seed=int(settings.seed),
        steps=int(steps),
        width=manifest.width,
        height=manifest.height,
        eta=float(settings.eta),
        guidance_scale=check_guidance(manifest, guidance),
        guidance_rescale=check_rescale(manifest, settings.guidance_rescale),
        sampler=table.sampler if settings.sampler is None else settings.sampler,
        strength=None if settings.image is None else _strength(manifest, settings),
        conditioning_scale=check_conditioning_scale(settings.conditioning_scale),
        clip_skip=int(settings.clip_skip),
    )


def _check_pictures(manifest: Manifest, settings: Settings) -> None:
    """Whether image, mask and control image are there that must be, and no others."""
    if settings.mask is not None and settings.image is None:
        raise InputError("A mask needs an image.", given="a mask alone", advice="Give the image to be painted in too.")
    if takes_channels(manifest) and settings.mask is None:
        raise InputError(
            "This bundle is for inpainting: it needs an image and a mask.",
            given="no mask",
            advice="Give both; the mask is white where to paint.",
        )
    if settings.strength is not None and settings.image is None:
        raise InputError(
            "strength is for runs that start from an image.",
            given=f"strength {settings.strength}, and no image",
            advice="Give an image too, or leave strength out.",
        )
    if manifest.controlnet is None and settings.control_image is not None:
        raise InputError(
            "This bundle has no ControlNet.",
            given="a control image",
            advice="Leave it out, or build a bundle with controlnet in the recipe.",
        )
    if manifest.controlnet is not None and settings.control_image is None:
        raise InputError(
            "This bundle's ControlNet needs a control image.",
            given="none",
            advice="Give control_image (--control on the command line).",
        )
    if manifest.controlnet is None and check_conditioning_scale(settings.conditioning_scale) != 1:
        raise InputError(
            "conditioning_scale is for a ControlNet, which this bundle does not have.",
            given=settings.conditioning_scale,
            advice="Leave it out.",
        )


def _strength(manifest: Manifest, settings: Settings) -> float:
    """Returns the strength, or the default of the diffusers pipeline for this task."""
    if settings.strength is not None:
        return float(settings.strength) if is_finite(settings.strength) else settings.strength
    if settings.mask is not None:
        return 0.9999 if takes_sizes(manifest) else 1.0
    return 0.3 if takes_sizes(manifest) and settings.control_image is None else 0.8


def _time_ids(manifest: Manifest, settings: Settings) -> tuple[Array | None, Array | None]:
    """Returns SDXL's conditioning on sizes (height, width) and crop (top, left), for prompts and negative prompts."""
    own = (settings.original_size, settings.target_size)
    negative = (settings.negative_original_size, settings.negative_crops, settings.negative_target_size)
    if not takes_sizes(manifest):
        if any(value is not None for value in (*own, *negative)) or _pair("crops", settings.crops, (0, 0)) != (0, 0):
            raise InputError(
                "Sizes and crops condition SDXL alone.",
                given=f"a bundle of {manifest.family}",
                advice="Leave original_size, crops and target_size out.",
            )
        return None, None
    picture = (manifest.height, manifest.width)
    original = _pair("original_size", settings.original_size, picture)
    crops = _pair("crops", settings.crops, (0, 0))
    target = _pair("target_size", settings.target_size, picture)
    others = (
        *_pair("negative_original_size", negative[0], original),
        *_pair("negative_crops", negative[1], crops if _keeps_crops(settings) else (0, 0)),
        *_pair("negative_target_size", negative[2], target),
    )
    rows = [np.array([row], np.float32) for row in ((*original, *crops, *target), others)]
    return repeated(rows[0], manifest.batch), repeated(rows[1], manifest.batch)


def _keeps_crops(settings: Settings) -> bool:
    """Returns whether diffusers' pipeline for this task takes the crop for negative prompts without one too."""
    if settings.image is not None:
        return settings.mask is not None and settings.control_image is not None
    return settings.negative_original_size is None or settings.negative_target_size is None


def _pair(name: str, given: Any, default: Size) -> Size:
    if given is None:
        return default
    pair = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(pair) != 2 or not all(is_whole(value) and 0 <= value <= MOST_PIXELS for value in pair):
        raise InputError(
            f"{name} must be {ORDERS[SETTINGS[name].kind]} in pixels, whole numbers from 0 to {MOST_PIXELS}.",
            given=repr(given),
            advice=f"Give {default}.",
        )
    return int(pair[0]), int(pair[1])


def takes_sizes(manifest: Manifest) -> bool:
    """Returns whether the UNet is SDXL's, which is conditioned on sizes and crops."""
    return manifest.phases[0].input("time_ids") is not None
