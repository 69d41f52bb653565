"""Pictures as web UIs write them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def png(path: Path | str, **texts: str) -> Path:
    """A small PNG with these text chunks."""
    chunks = PngInfo()
    for name, value in texts.items():
        chunks.add_text(name, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return Path(path)


def text(prompt: str = "a boat", **settings: str) -> str:
    told = {
        "Steps": "4",
        "Sampler": "Euler",
        "CFG scale": "7",
        "Seed": "5",
        "Size": "64x48",
        "Model": "toy",
        **settings,
    }
    return f"{prompt}\n" + ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in told.items())
