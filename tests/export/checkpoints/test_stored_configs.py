"""Configurations in a bundle: read as diffusers writes them, and refused where they are damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler

from hidiff_export.checkpoints.stored_configs import SCHEDULER_CONFIG, read_config
from hidiff_export.errors import BundleError


def test_what_diffusers_writes_is_read_infinite_numbers_too(tmp_path: Path) -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.save_pretrained(tmp_path / "scheduler")
    found = read_config(tmp_path / SCHEDULER_CONFIG)
    assert found["lambda_min_clipped"] == -math.inf == scheduler.config.lambda_min_clipped
    assert found == json.loads(scheduler.to_json_string())


@pytest.mark.parametrize(
    ("content", "given"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "it holds a list, expected an object"),
        (b"\xff", "invalid"),
        (b"[" * 20_000, "recursion"),
        (None, "No such file"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_the_bundles_fault(
    content: bytes | None, given: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match="A configuration in the bundle cannot be read") as caught:
        read_config(path)
    assert str(path) in str(caught.value.given)
    assert given in str(caught.value.given)
