"""Who draws: a bundle, or diffusers' own pipeline with HiDiffusion in force or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hidiff_export.errors import CheckpointError, InputError
from hidiff_export.families.family import Family, Task
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.bundle_folder import BundleFolder, LinksOption
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.pipeline import Pipeline
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.pipeline.request_fields import Settings

Array = NDArray[Any]
Stepped = Callable[[], object]
"""Called after each step of each picture."""

_OTHER_SEEDS = 2**20
"""The bit in which another seed differs; turned over, it leaves every seed within its bounds."""

_SHARED = ("steps", "sampler", "guidance_scale", "guidance_rescale")
"""Settings whose defaults are the first bundle's."""

_SETTINGS_OF_DIFFUSERS = frozenset(
    {"negative_prompt", "seed", "steps", "sampler", "guidance_scale", "guidance_rescale", "eta", "clip_skip"}
)
"""What `DiffusersContender` hands on of a shot's settings."""


@dataclass(frozen=True)
class Shot:
    """One picture that every contender draws.

    Args:
        prompt: what it shows.
        seed: of its noise and window shifts.
        settings: further ones, by the names of `hidiff_runtime.Settings`.
    """

    prompt: str
    seed: int
    settings: Mapping[str, Any]

    def with_settings_of(self, request: Request) -> Shot:
        """Returns it with the steps, sampler and guidance that it comes to in a bundle, for others to draw alike."""
        used = {name: getattr(request.settings, name) for name in _SHARED}
        settled = {name: value for name, value in used.items() if value is not None}
        return replace(self, settings={**self.settings, **settled})

    def resolved(self) -> Settings:
        """Returns what a pipeline of the runtime is given."""
        return Settings(**{**self.settings, "seed": self.seed})


class Contender(Protocol):
    """Draws the shots in order."""

    @property
    def name(self) -> str:
        """Of its row and of the folder of its pictures."""
        ...

    @property
    def origin(self) -> str:
        """Where its pictures come from, for people."""
        ...

    def draw(self, shots: Sequence[Shot], stepped: Stepped) -> Iterator[Array]:
        """Yields a uint8 picture ``[height, width, 3]`` for each shot."""
        ...


@dataclass(frozen=True)
class BundleContender:
    """A bundle, drawn by the runtime with the engines of this machine."""

    name: str
    folder: Path
    allow_links: LinksOption = ()
    backend: str | None = None

    @property
    def origin(self) -> str:
        """The bundle's folder."""
        return str(self.folder)

    def draw(self, shots: Sequence[Shot], stepped: Stepped) -> Iterator[Array]:
        """Yields the pictures of the bundle's first place where its batch is more than one.

        Raises what opening and running a bundle raises.
        """
        with Pipeline.open(self.folder, allow_links=self.allow_links, backend=self.backend) as pipe:
            count = pipe.bundle.manifest.batch
            requests = [pipe.request([shot.prompt] * count, shot.resolved()) for shot in shots]
            for result in pipe.run(requests, callback=lambda _info: stepped()):
                yield np.asarray(result.images[0].convert("RGB"))


@dataclass(frozen=True)
class DiffusersContender:
    """Diffusers' own pipeline in float32, loaded by diffusers and run as the bundle would be.

    Args:
        name: as for every contender.
        source: folder, hub id or single file, as diffusers takes it.
        bundle: whose size, sampler, steps and guidance are used.
        hidiffusion: whether it is in force.
        size: width and height in pixels; the bundle's, if left out.
    """

    name: str
    source: str
    bundle: Path
    hidiffusion: bool
    allow_links: LinksOption = ()
    size: tuple[int, int] | None = None

    @property
    def origin(self) -> str:
        """The checkpoint, and whether it is drawn with HiDiffusion."""
        return f"{self.source} in diffusers, {'with' if self.hidiffusion else 'without'} HiDiffusion"

    def draw(self, shots: Sequence[Shot], stepped: Stepped) -> Iterator[Array]:
        """Yields diffusers' pictures.

        Raises:
            CheckpointError: diffusers does not load the source as a text-to-image pipeline.
        """
        import torch

        from hidiff_export.diffusers_api.apply_hidiffusion import apply_hidiffusion

        manifest = BundleFolder(self.bundle, self.allow_links).manifest()
        family = Family(manifest.family)
        pipe = _load(self.source, family)
        requests = resolve(self.bundle, shots, self.allow_links)
        width, height = self.size or (manifest.width, manifest.height)

        def told(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            stepped()
            return {}

        for shot, request in zip(shots, requests, strict=True):
            pipe.scheduler = _scheduler(pipe, request.settings.sampler, manifest)
            used = request.settings
            # Its full run, whatever the bundle leaves out: that is what the bundle's pictures are compared with.
            rule = manifest.rule.whole
            with apply_hidiffusion(pipe, rule=rule, family=family) if self.hidiffusion else nullcontext():
                drawn = pipe(
                    shot.prompt,
                    negative_prompt=shot.settings.get("negative_prompt"),
                    width=width,
                    height=height,
                    num_inference_steps=used.steps,
                    guidance_scale=used.guidance_scale if manifest.guidance else 1.0,
                    guidance_rescale=used.guidance_rescale or 0.0,
                    eta=used.eta,
                    clip_skip=used.clip_skip or None,
                    generator=torch.Generator().manual_seed(shot.seed),
                    callback_on_step_end=told,
                )
            yield np.asarray(drawn.images[0].convert("RGB"))


@dataclass(frozen=True)
class OtherSeeds:
    """A contender that draws again from other seeds: how far apart chance alone puts two sets of pictures."""

    name: str
    drawn_by: Contender

    @property
    def origin(self) -> str:
        """The contender's, and by how much seeds differ."""
        return f"{self.drawn_by.origin}, each seed {_OTHER_SEEDS:,} off"

    def draw(self, shots: Sequence[Shot], stepped: Stepped) -> Iterator[Array]:
        """Yields its pictures of the same prompts."""
        return self.drawn_by.draw([replace(shot, seed=shot.seed ^ _OTHER_SEEDS) for shot in shots], stepped)


def _load(source: str, family: Family) -> Any:
    import diffusers
    import torch

    from hidiff_export.checkpoints.sources import is_single_file, local_path
    from hidiff_export.demo_model import DEMO_SOURCE

    place = local_path(source) if source == DEMO_SOURCE else source  # diffusers looks up what else there is
    _no_progress_bars()
    try:
        if is_single_file(source):
            kind = diffusers.StableDiffusionXLPipeline if family.is_sdxl else diffusers.StableDiffusionPipeline
            pipe = kind.from_single_file(source, dtype=torch.float32)
        else:
            pipe = diffusers.AutoPipelineForText2Image.from_pretrained(place, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            "Diffusers does not load this checkpoint as a text-to-image pipeline.",
            given=f"{source}: {error}",
            advice="Give a whole pipeline's folder, a hub id or a single file.",
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "safety_checker"):
        pipe.safety_checker = None
    return pipe


def _no_progress_bars() -> None:
    """Leaves the terminal to this command's own progress: both libraries draw bars of what loads in a blink."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


def _scheduler(pipe: Any, sampler: str | None, manifest: Manifest) -> Any:
    from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler, corrected

    config = corrected(dict(pipe.scheduler.config), Family(manifest.family), Task(manifest.task))
    recipe = Recipe.from_dict(manifest.recipe, "the recipe in the bundle's manifest")
    return build_scheduler(
        sampler or manifest.default_sampler, config, timesteps=recipe.timesteps, tcd_eta=recipe.tcd_eta
    )


def check_comparable(manifests: Mapping[Path, Manifest], *, across_models: bool = False) -> None:
    """Refuses bundles whose pictures could not be compared: of another size, family, checkpoint or task.

    Args:
        manifests: of the bundles, by their folders.
        across_models: whether bundles of different checkpoints are compared all the same.

    Raises:
        InputError: they differ, or draw something else than pictures from prompts alone.
    """
    first, *others = manifests
    for folder, manifest in manifests.items():
        if manifest.task != "text-to-image" or not manifest.text_encoders or manifest.vae is None:
            raise InputError(
                "Only bundles that make pictures from prompts alone can be compared.",
                given=f"{folder}: {manifest.task}, {_missing(manifest)}",
                advice="Build one with task: text-to-image, and without text: false and vae: false.",
            )
    for what, of in (
        ("size", lambda one: f"{one.width}x{one.height}"),
        ("family", lambda one: one.family),
    ):
        for other in others:
            wanted, found = of(manifests[first]), of(manifests[other])
            if wanted != found:
                raise InputError(
                    f"Pictures of another {what} cannot be compared.",
                    given=f"{first}: {wanted}; {other}: {found}",
                    advice=f"Give bundles of one {what}, or run the command once for each.",
                )
    for other in () if across_models else others:
        wanted, found = _checkpoint(manifests[first]), _checkpoint(manifests[other])
        if wanted != found:
            raise InputError(
                "Pictures of another model differ by more than a setting.",
                given=f"{first}: {wanted}; {other}: {found}",
                advice="Give bundles of one checkpoint with the same LoRA files, or add --across-models.",
            )


def _checkpoint(manifest: Manifest) -> str:
    """Returns the checkpoint and LoRA files that a bundle was built of, as its recipe names them."""
    loras = [f"{lora['path']}:{lora['scale']:g}" for lora in manifest.recipe.get("lora", ())]
    return ", ".join([str(manifest.recipe.get("source")), *loras])


def resolve(folder: Path, shots: Sequence[Shot], allow_links: LinksOption = ()) -> list[Request]:
    """Returns the shots with what a bundle fills in, its own sampler and steps where they say none; runs nothing.

    Raises:
        InputError: the bundle does not take one of them, for example a sampler that it lacks.
    """
    with Pipeline.open(folder, allow_links=allow_links, verify="size") as pipe:
        count = pipe.bundle.manifest.batch
        return [pipe.request([shot.prompt] * count, shot.resolved()) for shot in shots]


def check_settings_of_diffusers(shots: Sequence[Shot]) -> None:
    """Refuses settings that only bundles would be drawn with.

    Raises:
        InputError: a shot has one.
    """
    taken = ", ".join(sorted(_SETTINGS_OF_DIFFUSERS))
    for shot in shots:
        if further := sorted(shot.settings.keys() - _SETTINGS_OF_DIFFUSERS):
            raise InputError(
                "Diffusers is not drawn with every setting here.",
                given=f"{', '.join(further)}, for {shot.prompt!r}",
                advice=f"Leave it out, or leave out --diffusers. Taken are {taken}.",
            )


def _missing(manifest: Manifest) -> str:
    lacks = [name for name, part in (("text encoders", manifest.text_encoders), ("VAE", manifest.vae)) if not part]
    return f"no {' and no '.join(lacks)}" if lacks else "text encoders and VAE"
