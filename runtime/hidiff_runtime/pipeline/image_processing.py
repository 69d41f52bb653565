"""Pillow's pictures as the arrays that the networks take, and back: as diffusers' ``VaeImageProcessor`` has them.

Pillow is imported when it is first needed; it comes with ``pip install 'hidiff-runtime[pictures]'``.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.denoising.conditioning import Array
from hidiff_runtime.denoising.controlnet import nearest
from hidiff_runtime.errors import InputError
from hidiff_runtime.optional_libraries import optional_library

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
"""Files that `read_picture` takes."""

MODES = ("RGB", "L", "RGBA")
"""Pillow's modes that are taken; RGBA only where every pixel is opaque."""

EXIF_IFD, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
"""EXIF's tags: of its own directory, and of the comment in it."""

TRANSPARENCY = "transparency"
"""Pillow's name for the color that is none, in pictures without an alpha channel."""

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
"""What Pillow raises for broken files, whatever their format."""


def pillow() -> ModuleType:
    """Returns ``PIL.Image``.

    Raises:
        EngineError: Pillow is not installed.
    """
    return optional_library("PIL.Image", "Pictures need Pillow", "pip install 'hidiff-runtime[pictures]'")


def read_picture(path: str | Path, name: str = "image") -> Image:
    """Returns the picture in a PNG, JPEG or WebP file, all of it, turned as its EXIF says.

    Args:
        name: what the picture is for, in messages.

    Raises:
        InputError: there is no such file, or it is broken, cut short, of another format or too large to be safe.
        EngineError: Pillow is not installed.
    """
    pillow()
    return decode_picture(_content(path, name), name, where=path)


def decode_picture(
    content: bytes,
    name: str = "image",
    *,
    where: object = None,
    pixels: int | None = None,
    texts: bool = False,
) -> Image:
    """Returns the picture in the bytes of a PNG, JPEG or WebP file, turned as its EXIF says.

    Args:
        name: what the picture is for, in messages.
        where: the bytes come from, in messages.
        pixels: the most it may have, looked at before it is decoded; Pillow's own limit holds besides.
        texts: whether its ``info`` keeps what the file says beside its pixels, megabytes of text in a small file.

    Raises:
        InputError: the bytes are broken, cut short, of another format, or the picture is too large to be safe.
        EngineError: Pillow is not installed.
    """
    image_module = pillow()
    from PIL import ImageOps

    with _picture_errors(name, where or name), warnings.catch_warnings():
        warnings.simplefilter("error", image_module.DecompressionBombWarning)
        with image_module.open(io.BytesIO(content), formats=FORMATS) as checked:
            if pixels is not None and checked.width * checked.height > pixels:
                raise InputError(
                    f"The {name} is too large.",
                    given=f"{checked.width}x{checked.height} pixels",
                    advice=f"Give a picture of at most {pixels} pixels.",
                )
            checked.verify()  # a PNG's checksums, which loading does not look at
        with image_module.open(io.BytesIO(content), formats=FORMATS) as opened:
            opened.load()
            turned: Image = ImageOps.exif_transpose(opened)
    if not texts:
        turned.info = {name: value for name, value in turned.info.items() if name == TRANSPARENCY}
    return turned


def picture_texts(path: str | Path, sought: Collection[str]) -> tuple[dict[str, str], object, object]:
    """Returns what a PNG, JPEG or WebP file says beside its pixels: texts by their keys, EXIF's ``UserComment`` and
    ``MakerNote`` as they are.

    Args:
        sought: keys that end the search where one of them comes before the pixels; else all of the file is read.

    Raises:
        InputError: as `read_picture`.
        EngineError: Pillow is not installed.
    """
    image_module = pillow()
    content = _content(path, "picture")
    with _picture_errors("picture", path), warnings.catch_warnings():
        warnings.simplefilter("error", image_module.DecompressionBombWarning)
        with image_module.open(io.BytesIO(content), formats=FORMATS) as opened:
            if not opened.info.keys() & set(sought):
                opened.load()
            texts = {key: str(value) for key, value in opened.info.items() if isinstance(value, str)}
            exif = opened.getexif().get_ifd(EXIF_IFD)
            return texts, exif.get(USER_COMMENT), exif.get(MAKER_NOTE)


def fitted_pictures(
    images: Any, size: tuple[int, int], name: str, *, batch: int = 1, resize: bool = False
) -> list[Image]:
    """Returns pictures, one or as many as the batch has, checked and of one size.

    Args:
        images: a Pillow image, or a sequence of ``batch`` of them.
        size: width and height that they must have.
        name: what they are for, in messages.
        resize: resizes others to ``size`` with Lanczos, as diffusers does.

    Raises:
        InputError: not Pillow images, of another size or mode, broken, or of another number.
    """
    return [_fitted(image, size, name, resize) for image in _listed(images, name, batch)]


def image_array(pictures: Sequence[Image]) -> Array:
    """Returns pictures for the VAE's encoder: float32 ``[pictures, 3, height, width]``, -1 to 1."""
    return np.asarray(control_array(pictures) * np.float32(2) - np.float32(1), np.float32)


def control_array(pictures: Sequence[Image]) -> Array:
    """Returns pictures for a ControlNet: float32 ``[pictures, 3, height, width]``, 0 to 1."""
    colours = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return np.ascontiguousarray(colours.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


def mask_array(pictures: Sequence[Image]) -> Array:
    """Returns masks: float32 ``[pictures, 1, height, width]``, 1 where one is at least half white, else 0."""
    grey = np.stack([np.asarray(mask.convert("L")) for mask in pictures])[:, None].astype(np.float32) / np.float32(255)
    return np.asarray(grey >= 0.5, np.float32)


def latent_mask(mask: Array, latent: tuple[int, int, int]) -> Array:
    """Returns a mask's nearest pixels at the latents' size, ``[…, 1, latent height, latent width]``, as diffusers."""
    return np.ascontiguousarray(nearest(mask, *latent[1:]))


def to_pictures(images: Array) -> list[Image]:
    """Makes Pillow images from float32 ``[batch, 3, height, width]``, about -1 to 1; what is beyond is clipped."""
    bright = np.clip(images * np.float32(0.5) + np.float32(0.5), 0, 1)
    return from_bytes((bright * np.float32(255)).round().astype(np.uint8).transpose(0, 2, 3, 1))


def from_bytes(colours: NDArray[np.uint8]) -> list[Image]:
    """Makes Pillow images from uint8 ``[batch, height, width, 3]``."""
    image_module = pillow()
    return [image_module.fromarray(np.ascontiguousarray(colour)) for colour in colours]


def _listed(images: Any, name: str, batch: int) -> list[Image]:
    """Returns one picture for all, or one for each of the batch."""
    given = list(images) if isinstance(images, Sequence) and not isinstance(images, (str, bytes)) else [images]
    image_type = pillow().Image
    for image in given:
        if not isinstance(image, image_type):
            raise InputError(
                f"{name} must be a Pillow image.", given=type(image).__name__, advice="Open a file by PIL.Image.open."
            )
    if len(given) not in (1, batch):
        raise InputError(
            f"{name} must be one picture, or one for each of the batch.",
            given=f"{len(given)} pictures, batch {batch}",
            advice="Give one picture to use it for the whole batch.",
        )
    return given


def _fitted(image: Image, size: tuple[int, int], name: str, resize: bool) -> Image:
    """Returns the picture without transparency, of this size."""
    if image.mode not in MODES:
        raise InputError(
            f"The {name} has a mode that is not taken.",
            given=f"mode {image.mode}",
            advice=f"Convert it to RGB or L (image.convert('RGB')); {', '.join(MODES)} are taken, RGBA where opaque.",
        )
    if 0 in image.size:  # which no file holds, and an array may
        raise InputError(
            f"The {name} has no pixels.", given=f"{image.width}x{image.height}", advice="Give a picture with some."
        )
    with _picture_errors(name, getattr(image, "filename", "") or name):
        image.load()
    if image.mode == "RGBA":
        if image.getchannel("A").getextrema()[0] != 255:
            raise InputError(
                f"The {name} is transparent in places.",
                given="mode RGBA, with alpha below 255",
                advice="Put it on a background and convert it to RGB; a mask is a picture of its own.",
            )
        image = image.convert("RGB")
    if image.size == size:
        return image
    if not resize:
        raise InputError(
            f"The {name} is not of the bundle's size.",
            given=f"{image.width}x{image.height}, the bundle is for {size[0]}x{size[1]}",
            advice="Give resize=True (--resize on the command line) to resize it, or crop it to that size first.",
        )
    return image.resize(size, resample=pillow().Resampling.LANCZOS)


@contextmanager
def _picture_errors(name: str, path: object) -> Iterator[None]:
    """Says what is wrong with a picture that does not load."""
    module = pillow()
    try:
        yield
    except (module.DecompressionBombError, module.DecompressionBombWarning) as error:
        raise InputError(
            f"The {name} is too large to be opened safely.",
            given=_reason(path, error),
            advice=f"Give a picture of at most {module.MAX_IMAGE_PIXELS} pixels.",
        ) from error
    except module.UnidentifiedImageError as error:
        raise InputError(
            f"The {name} is no picture that can be read.", given=path, advice=f"Give a whole {', '.join(FORMATS)} file."
        ) from error
    except _UNREADABLE as error:
        raise InputError(
            f"The {name} is broken or cut short.", given=_reason(path, error), advice="Export or download it again."
        ) from error


def _content(path: str | Path, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"The {name} cannot be read.", given=_reason(path, error), advice="Give a file.") from error


def _reason(path: object, error: Exception) -> str:
    told = (error.strerror if isinstance(error, OSError) else "") or str(error)
    return f"{path}: {told}"
