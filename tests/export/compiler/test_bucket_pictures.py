"""A bundle of several sizes and batches draws, byte for byte, what bundles of one size and batch draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hidiff_export.compiler.compile import build
from hidiff_export.recipe import Recipe
from hidiff_runtime import Pipeline, Settings
from hidiff_runtime.verification.replay import check
from tests.conftest import NoDisplay

SHARED: dict[str, Any] = {"source": "random:0", "unet_width": "tiny", "sampler": "euler_ancestral", "steps": [2]}
TASKS: dict[str, dict[str, Any]] = {
    "inpainting": {"batches": [1, 2]},
    "controlnet": {"batches": [1], "controlnet": "random:1"},
}
SIZES = ((128, 128), (192, 128))


def painting(width: int, height: int) -> Image.Image:
    levels = np.random.RandomState(5).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(levels)


def drawn(pipe: Pipeline, task: str, shape: tuple[int, int, int]) -> list[bytes]:
    """Two pictures of their seeds, by the batch that is asked for, and their pixels."""
    width, height, batch = shape
    sized = Pipeline(pipe.bundle.sized(width, height, batch))
    assert (sized.bundle.manifest.width, sized.bundle.manifest.height, sized.bundle.manifest.batch) == shape
    given: dict[str, Any] = {}
    if task == "inpainting":
        mask = painting(width, height).convert("L").point(lambda level: 255 * (level > 128))
        given |= {"image": painting(width, height), "mask": mask}
    if task == "controlnet":
        given |= {"control_image": painting(width, height)}
    request = sized.request("a lighthouse", Settings(steps=2, **given))
    requests = [request.seeded(7, 8)] if batch == 2 else [request.seeded(7), request.seeded(8)]
    return [image.tobytes() for one in requests for result in sized.run([one]) for image in result.images]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_pictures_are_those_of_bundles_of_one_size_and_batch(tmp_path: Path, task: str) -> None:
    shared = {**SHARED, "family": "sd15", "task": task, **TASKS[task]}
    batches = shared.pop("batches")
    every = {"sizes": [f"{width}x{height}" for width, height in SIZES], "batches": batches}
    build(Recipe.from_dict({**shared, **every}), tmp_path / "all", NoDisplay())
    assert check(tmp_path / "all").ok
    with Pipeline.open(tmp_path / "all") as pipe:
        pictures = {(*size, batch): drawn(pipe, task, (*size, batch)) for size in SIZES for batch in batches}
    last = (*SIZES[-1], batches[-1])
    alone = dict(zip(("width", "height", "batch"), last, strict=True))
    build(Recipe.from_dict({**shared, **alone}), tmp_path / "alone", NoDisplay())
    with Pipeline.open(tmp_path / "alone") as pipe:
        assert drawn(pipe, task, last) == pictures[last]
    for size in SIZES:
        first, *others = (pictures[(*size, batch)] for batch in batches)
        assert first[0] != first[1]
        for other in others:
            for one, two in zip(first, other, strict=True):
                levels = (np.frombuffer(content, np.uint8).astype(int) for content in (one, two))
                assert np.abs(np.subtract(*levels)).max() <= 1
