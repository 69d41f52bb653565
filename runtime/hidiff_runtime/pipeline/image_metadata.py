"""Picture files that say how their picture was made.

A PNG file's chunk ``parameters`` is the text that web UIs for Stable Diffusion write, which common metadata viewers
read; its chunk ``hidiff`` is JSON with everything. Text beyond Latin-1 goes into iTXt chunks. JPEG and WebP have no
text chunks: there EXIF's ``UserComment`` holds the web UIs' text, in the form that web UIs write and read, and
``MakerNote`` holds the JSON, in UTF-8.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hidiff_runtime.errors import InputError, StorageError
from hidiff_runtime.format.atomic_write import atomic_write
from hidiff_runtime.format.left_out import left_out
from hidiff_runtime.pipeline.image_processing import EXIF_IFD, MAKER_NOTE, USER_COMMENT, pillow
from hidiff_runtime.pipeline.infotext import VERSION, write_infotext
from hidiff_runtime.pipeline.webui_names import sampler_name, schedule_name
from hidiff_runtime.text_safety import encodable, json_text
from hidiff_runtime.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from hidiff_runtime.format.manifest import Manifest
    from hidiff_runtime.pipeline.request import Request
    from hidiff_runtime.sampling.scheduler_table import SamplerTable

PARAMETERS, HIDIFF = "parameters", "hidiff"
"""Keys of the chunks, and of a picture's ``info`` until it is saved."""

FormatName = Literal["png", "jpeg", "webp"]

FORMAT_NAMES: tuple[FormatName, ...] = ("png", "jpeg", "webp")

LARGEST_EXIF = 65533
"""Bytes of EXIF that a JPEG file can hold."""

FULL_COLOR = 90
"""From this quality on a JPEG file keeps a color for each pixel, not for each 2 x 2 of them."""


@dataclass(frozen=True)
class FileFormat:
    """How a picture becomes a file.

    Args:
        name: of the format.
        quality: 0 to 100, of JPEG and WebP, which are lossy: 100 is the best and the largest.
    """

    name: FormatName = "png"
    quality: int = 100

    def encode(self, image: Image) -> bytes:
        """Encodes a picture with the text in its ``info``: the same bytes for the same picture and text."""
        if self.name == "png":
            return encoded(image)
        options = {"subsampling": 0 if self.quality >= FULL_COLOR else 2} if self.name == "jpeg" else {}
        content = io.BytesIO()
        image.save(content, self.name.upper(), quality=self.quality, exif=self._exif(image), **options)
        return content.getvalue()

    def _exif(self, image: Image) -> bytes:
        """Returns the text as EXIF; without the JSON, or else empty, where a JPEG file cannot hold all of it."""
        text, exact = (image.info.get(key) for key in (PARAMETERS, HIDIFF))
        for comment, note in ((text, exact), (text, None)):
            content = _exif_of(comment, note)
            if self.name != "jpeg" or len(content) <= LARGEST_EXIF:
                return content
        return b""


def _exif_of(comment: str | None, note: str | None) -> bytes:
    tags: dict[int, bytes] = {}
    if comment is not None:
        tags[USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be")
    if note is not None:
        tags[MAKER_NOTE] = note.encode()
    if not tags:
        return b""
    exif = pillow().Exif()
    exif.endian = ">"  # a comment's UTF-16 has the byte order of the whole
    exif.get_ifd(EXIF_IFD).update(tags)
    content: bytes = exif.tobytes()
    return content


def describe(
    manifest: Manifest, table: SamplerTable, request: Request, index: int, cut: tuple[str, ...]
) -> dict[str, str]:
    """Returns the chunks by key, of one picture of a request's batch; ``cut`` was cut from its prompts."""
    facts = _facts(manifest, table, request, index)
    exact = {**facts, "cut": list(cut)} if cut else facts
    return {PARAMETERS: encodable(write_infotext(facts, sampler_name(table))), HIDIFF: json_text(exact)}


def save_png(image: Image, path: str | Path) -> None:
    """Writes a picture with the text in its ``info``, beside its final name, and renames it.

    Raises:
        InputError: the name does not end in ``.png``.
        StorageError: the disk refuses; nothing is left.
    """
    path = Path(path)
    check_name(path)
    write_whole(path, encoded(image))


def encoded(image: Image) -> bytes:
    """Returns the bytes of the PNG file: the same for the same picture and text."""
    pillow()
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key in (PARAMETERS, HIDIFF):
        if key in image.info:
            chunks.add_text(key, encodable(image.info[key]))  # becomes iTXt by itself where it is not Latin-1
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=chunks)
    return content.getvalue()


def check_name(path: Path) -> None:
    """Refuses what does not end in ``.png``."""
    if path.suffix.lower() != ".png":
        raise InputError("Pictures are written as PNG.", given=path, advice="Choose a name that ends in .png.")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        StorageError: the disk refuses.
    """
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise StorageError(
            "A picture could not be written; nothing of it was kept.",
            given=f"{path}: {error.strerror or error}",
            advice="Free space on the disk, or choose a folder that can be written to.",
        ) from error


def _facts(manifest: Manifest, table: SamplerTable, request: Request, index: int) -> dict[str, Any]:
    """Returns what the picture was made from, what was not asked for left out."""
    settings = request.settings
    assert settings.steps is not None
    # Pictures with seeds of their own have nothing to do with their neighbors.
    coupled = len(request.prompts) > 1 and len(request.seeds) == 1
    phases = {span.phase.name: [span.first, span.last] for span in request.phases(manifest).spans}
    facts: dict[str, Any] = {
        "prompt": request.prompts[index],
        "negative_prompt": None if request.negative_prompts is None else request.negative_prompts[index],
        "seed": request.seeds[0 if coupled else index],
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_rescale": settings.guidance_rescale or None,
        **({} if settings.full_run else left_out(manifest)),
        "sampler": settings.sampler,
        "schedule": schedule_name(table, settings.steps),
        "eta": settings.eta or None,
        "strength": settings.strength,
        "conditioning_scale": settings.conditioning_scale if "control_image" in request.given else None,
        "clip_skip": settings.clip_skip or None,
        "long_prompt": settings.long_prompt if settings.long_prompt != "truncate" else None,
        "time_ids": None if request.time_ids is None else request.time_ids[index].tolist(),
        "negative_time_ids": None if request.negative_time_ids is None else request.negative_time_ids[index].tolist(),
        "given": list(request.given) or None,
        "batch": len(request.prompts) if coupled else None,
        "index": index if coupled else None,
        "width": manifest.width,
        "height": manifest.height,
        "family": manifest.family,
        "task": manifest.task,
        "precision": manifest.precision,
        "phases": phases,
        "model": model_name(manifest),
        "lora": fused_loras(manifest) or None,
        "model_sha256": manifest.files[manifest.weights["unet"]].sha256,
        "weights": other_weights(manifest) or None,
        "version": f"{VERSION} {__version__}",
    }
    return {name: value for name, value in facts.items() if value is not None}


def model_name(manifest: Manifest) -> str:
    """Returns what the bundle was built from, by its name; its family where it does not say."""
    return _name(str(manifest.recipe.get("source", manifest.family)))


def fused_loras(manifest: Manifest) -> list[dict[str, Any]]:
    """Names and scales of the LoRA files that were fused into the weights; not where they lay."""
    given = manifest.recipe.get("lora") or []
    known = [lora for lora in given if isinstance(lora, Mapping)] if isinstance(given, list) else []
    return [{"name": _name(str(lora.get("path", ""))), "scale": lora.get("scale")} for lora in known]


def other_weights(manifest: Manifest) -> dict[str, str]:
    """Returns the beginning of the SHA-256 of each network's weights but the UNet's."""
    return {name: manifest.files[path].sha256[:10] for name, path in manifest.weights.items() if name != "unet"}


def _name(source: str) -> str:
    """Returns the last part of a path or of a hub's id."""
    return source.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].removesuffix(".safetensors")
