"""Pictures as PNG, JPEG or WebP files that say how they were made.

JPEG and WebP have no text chunks: there EXIF's ``UserComment`` holds the web UIs' text, in the form that web UIs write
and read, and ``MakerNote`` holds the JSON of the chunk ``hidiff``, in UTF-8.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hidiff_runtime.pipeline.image_processing import EXIF_IFD, MAKER_NOTE, USER_COMMENT, pillow
from hidiff_runtime.pipeline.png_metadata import HIDIFF, PARAMETERS, encoded

if TYPE_CHECKING:
    from PIL.Image import Image

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
        """Returns the text as EXIF. Where a JPEG file cannot hold all of it, the JSON is left out, or else
        everything.
        """
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
