"""Loads tiny checkpoints, and says what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load as load_component
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width
from tests.export.checkpoints.checkpoint_files import Arrays, tiny

CONFIG = tiny(Family.SD15)
TEXT = Task.TEXT_TO_IMAGE
UNET = "UNet2DConditionModel"


def load(source: Path | str, family: Family = Family.SD15, task: Task = TEXT) -> Any:
    return load_component(Component.UNET, str(source), family, task, Width.TINY)


def holds(found: Any, expected: Arrays) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name].numpy(), array) for name, array in expected.items()
    )


def refused(source: Path | str, family: Family = Family.SD15, task: Task = TEXT) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load(source, family, task)
    assert caught.value.exit_code == 3
    assert caught.value.advice
    return str(caught.value)


def edit(pipeline: Path, **changed: Any) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
