"""The request that Triton makes before a model is ready: the shortest run, with grey pictures for what needs some."""

from __future__ import annotations

import io
import struct

from hidiff_runtime.denoising.conditioning import takes_channels
from hidiff_runtime.format.manifest import Manifest


def warm_up(manifest: Manifest) -> dict[str, bytes]:
    """Returns one value for each input that the request has, by its name, as Triton reads it from a file."""
    values = {"prompt": _text(b"warm-up"), "steps": struct.pack("<q", manifest.steps[0])}
    pictures = (("image", "mask") if takes_channels(manifest) else ()) + (
        ("control_image",) if manifest.controlnet is not None else ()
    )
    if pictures:
        grey = _text(_grey(manifest.width, manifest.height))
        values |= dict.fromkeys(pictures, grey)
    return values


def _text(value: bytes) -> bytes:
    """Returns a tensor of one text: its length, then itself."""
    return struct.pack("<I", len(value)) + value


def _grey(width: int, height: int) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.new("L", (width, height), 128).save(content, "PNG")
    return content.getvalue()
