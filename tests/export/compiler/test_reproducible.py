"""The same recipe gives the same bytes: in another process, under another name, and however often it is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hidiff_runtime.format.manifest import Manifest
from tests.export.compiler.killing import different

pytestmark = pytest.mark.slow


def test_a_build_of_another_process_that_is_killed_again_and_again_is_the_same_byte_for_byte(
    sd15_bundle: Path, tmp_path: Path
) -> None:
    kills = 3
    command = [
        sys.executable,
        "-m",
        "tests.export.compiler.killing",
        str(tmp_path / "elsewhere"),
        "--like",
        str(sd15_bundle),
    ]
    # Sets have another order there; without a seed of their own, processes hardly ever agree in it.
    other = {**os.environ, "PYTHONHASHSEED": str((int(os.environ.get("PYTHONHASHSEED", "0") or 0) + 1) % 4294967295)}
    done = subprocess.run(
        [*command, "--kills", str(kills), "--seed", "1", "--events", "40"],
        capture_output=True,
        text=True,
        check=True,
        env=other,
    )
    found = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert sum(len(build["killed_at"]) for build in found) == kills
    for build in found:
        assert build["different"] == []
        assert build["beside"] == ["killed"]


def test_a_fresh_bundle_has_the_digest_that_its_readers_find(sd15_bundle: Path) -> None:
    written = json.loads((sd15_bundle / "manifest.json").read_text())
    assert Manifest.read(sd15_bundle).digest == written["digest"]
    assert Manifest.read(sd15_bundle).to_json() == written


def test_a_difference_would_be_found(tmp_path: Path) -> None:
    """The control of the comparison."""
    for name in ("one", "other"):
        (tmp_path / name / "unet").mkdir(parents=True)
        for file in ("same", "changed"):
            (tmp_path / name / "unet" / file).write_text("same")
    (tmp_path / "other" / "unet" / "changed").write_text("Same")
    (tmp_path / "one" / "gone").write_text("")
    assert different(tmp_path / "one", tmp_path / "other") == ["gone", "unet/changed"]
