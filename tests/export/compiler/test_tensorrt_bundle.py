"""A bundle with TensorRT-RTX engines, by the commands that its users give, on a machine that may have no GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_runtime import backends, cli
from hidiff_runtime.backends.tensorrt.mapped_parts import map_parts
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import Manifest

BACKEND = "tensorrt-rtx"
pytestmark = pytest.mark.slow

without_gpu = pytest.mark.skipif(
    backends.get(BACKEND).available().usable, reason="this machine runs TensorRT-RTX engines"
)


@pytest.fixture
def own(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(tensorrt_bundle, tmp_path / "own"))


def records(folder: Path) -> dict[str, Path]:
    """The plan record of each phase."""
    return {phase.phase.name: folder / phase.engines[BACKEND] for phase in Manifest.read(folder).phases}


def test_every_phase_has_a_plan_for_the_targets(tensorrt_bundle: Path) -> None:
    found = {name: PlanRecord.read(path) for name, path in records(tensorrt_bundle).items()}
    assert set(found) == {"strided-control", "windowed-control"}
    for record in found.values():
        assert record.targets == ("sm89", "sm120")
        assert record.backend == BACKEND


def test_the_weights_of_the_plans_are_stored_once(tensorrt_bundle: Path) -> None:
    parts = [PlanRecord.read(path).paths(path) for path in records(tensorrt_bundle).values()]
    heads = {files[0] for files in parts}
    tails = {files[-1] for files in parts}
    assert len(heads) == len(parts)
    assert len(tails) == 1
    whole = sum(path.stat().st_size for files in parts for path in files)
    stored = sum(path.stat().st_size for path in heads | tails)
    store = (tensorrt_bundle / Manifest.read(tensorrt_bundle).weights["unet"]).stat().st_size
    assert whole - stored >= 0.75 * store  # of these few weights, a fifth lies in stretches too short to be shared


def test_a_plan_reads_as_one_piece(tensorrt_bundle: Path) -> None:
    for path in records(tensorrt_bundle).values():
        files = PlanRecord.read(path).paths(path)
        assert bytes(map_parts(files)) == b"".join(file.read_bytes() for file in files)


def test_inspect_shows_both_backends(tensorrt_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tensorrt_bundle), "--json"])
    assert result.exit_code == 0, result.output
    for phase in json.loads(result.output)["phases"]:
        assert set(phase["engines"]) == {BACKEND, "onnxruntime"}
        assert phase["engines"][BACKEND] > 1_000_000


@without_gpu
def test_check_takes_the_backend_that_runs_here(tensorrt_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tensorrt_bundle), "--json"]) == 0, capsys.readouterr()


@without_gpu
def test_the_gpu_s_engines_say_what_is_missing(tensorrt_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tensorrt_bundle), "--backend", BACKEND]) == 5
    said = capsys.readouterr().err
    assert "driver" in said
    assert "next:" in said
    assert "Traceback" not in said


def test_a_changed_plan_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(iter(records(own).values()))
    tail = PlanRecord.read(path).paths(path)[-1]
    content = bytearray(tail.read_bytes())
    content[len(content) // 2] ^= 1
    tail.write_bytes(content)
    assert cli.main(["check", str(own)]) == 4
    assert tail.name in capsys.readouterr().err
