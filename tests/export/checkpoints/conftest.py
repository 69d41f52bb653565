"""A tiny SD1.5 UNet, as tensors and as a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from hidiff_export.checkpoints.component import Component
from tests.export.checkpoints.checkpoint_files import Arrays, arrays, write_folder
from tests.export.checkpoints.loading import CONFIG, UNET


@pytest.fixture(scope="module")
def tensors() -> Arrays:
    return arrays(Component.UNET, CONFIG)


@pytest.fixture
def pipeline(tmp_path: Path, tensors: Arrays) -> Path:
    """A pipeline's folder with a tiny SD1.5 UNet in it."""
    write_folder(tmp_path / "pipeline" / "unet", tensors, CONFIG, UNET)
    return tmp_path / "pipeline"
