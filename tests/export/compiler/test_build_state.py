"""What an interrupted build left, at the sizes of full checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hidiff_export.compiler.build_state import STATE, BuildState, StageRecord
from hidiff_export.engines.tensorrt.built_plans import Built
from hidiff_export.errors import BundleError
from hidiff_runtime.format.manifest import FileDigest

SDXL = FileDigest(10_269_600_000, "a" * 64)
"""Of SDXL's UNet in float32: more bytes than int32 counts."""


def written(folder: Path, state: BuildState) -> BuildState:
    (folder / STATE).write_text(json.dumps(state.to_json()), encoding="utf-8")
    return BuildState.read(folder)


def test_a_build_of_a_full_size_checkpoint_goes_on(tmp_path: Path) -> None:
    state = BuildState({"weights": StageRecord("key", {"unet/weights.safetensors": SDXL}, ("as it was found",))})
    assert written(tmp_path, state) == state


def test_a_plan_of_more_than_two_gigabytes_is_kept(tmp_path: Path) -> None:
    engine = tmp_path / "windowed.tensorrt.json"
    Built("key", {"windowed.tensorrt.plan": SDXL}, {"peak_bytes": 2.0e10}).write(engine)
    read = Built.read(engine)
    assert read is not None
    assert read.files == {"windowed.tensorrt.plan": SDXL}


def test_a_record_without_notices_is_read_and_one_of_no_size_is_not(tmp_path: Path) -> None:
    content = BuildState({"weights": StageRecord("key", {"unet/a": SDXL})}).to_json()
    del content["stages"]["weights"]["notices"]  # type: ignore[index]  # as a version before wrote it
    (tmp_path / STATE).write_text(json.dumps(content), encoding="utf-8")
    assert BuildState.read(tmp_path).files() == {"unet/a": SDXL}
    (tmp_path / STATE).write_text(json.dumps(content).replace("10269600000", "-1"), encoding="utf-8")
    with pytest.raises(BundleError, match="record of the interrupted build is damaged"):
        BuildState.read(tmp_path)
