"""The record is whole at every moment, and what follows from it is what its figures say."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.goals import faults, goals
from benchmarks.gpu.record import DONE, FAILED, FULL, MEASURED, NOT_BEGUN, REHEARSAL, Job, Record
from benchmarks.gpu.table import markdown

SPEED = Job("speed", "sdxl-2048", "float16", "tensorrt")
RUN = Job("run", "sdxl-2048", "float16", "tensorrt")
PUBLISHED = Job("run", "sdxl-2048", "float16", "eager published package")
BUILD = Job("build", "sdxl-2048", "float16", "tensorrt")
PARITY = Job("parity", "sdxl-2048", "float16", "tensorrt")


def phase(contender: str, median: float, **more: Any) -> dict[str, Any]:
    spread = {f"{key}_ms": median for key in ("median", "p25", "p75", "min", "max")}
    return {
        "what": "phase",
        "phase": "strided",
        "contender": contender,
        **spread,
        "n": 5,
        "clock": "x",
        "how": "y",
        **more,
    }


def run(median: float, peak: int) -> dict[str, Any]:
    spread = {f"{key}_s": median for key in ("median", "p25", "p75", "min", "max")}
    memory = {"peak_bytes": peak, "peak_of": "device", "peak_allocated_bytes": None}
    return {"what": "run", "steps": 50, **spread, "n": 3, **memory}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A run of SDXL with one engine a little faster than compiled, and every goal reached."""
    made = Record(tmp_path / "out.json")
    made.create(MEASURED, "abc")
    made.add(SPEED, phase("engine", 99.0, to_compiled=0.99))
    made.add(SPEED, phase("compiled PhaseUNet", 100.0))
    made.add(SPEED, {"what": "activation", "phase": "strided", "largest_bytes": 100})
    made.add(RUN, run(10.0, 1300))
    made.add(PUBLISHED, run(15.0, 3000))
    sizes = {
        "bundle_bytes": 2000,
        "weights_bytes": 1000,
        "seconds_of_stages": {"engines": 3.0},
        "backend": "TensorRT 11",
    }
    made.add(BUILD, {"what": "bundle", **sizes})
    made.add(
        PARITY, {"what": "call", "phase": "strided", "snr_db": 56.0, "bound_db": 45.0, "control": False, "ok": True}
    )
    for job in (SPEED, RUN, PUBLISHED, BUILD, PARITY):
        made.end(job, DONE, seconds=1.0)
    return made


def test_a_new_attempt_forgets_the_last_one_and_nothing_else(record: Record) -> None:
    before = record.read()
    record.begin(SPEED)
    after = record.read()
    assert record.status(SPEED) == ""
    assert record.status(RUN) == DONE
    assert after["results"] == [result for result in before["results"] if result["part"] != "speed"]


def test_jobs_to_come_are_named_and_finished_ones_stay(record: Record) -> None:
    later = Job("tests")
    record.plan([SPEED, later])
    assert record.status(later) == ""
    assert record.read()["jobs"]["tests"]["status"] == NOT_BEGUN
    assert record.status(SPEED) == DONE
    assert "tests: not begun" in markdown(record.read())


def test_infinities_are_texts(record: Record) -> None:
    record.add(PARITY, {"what": "picture", "psnr_db": math.inf, "bound_db": 30.0, "control": False, "ok": True})
    assert record.read()["results"][-1]["psnr_db"] == "inf"
    assert "| inf |" in markdown(record.read())


def test_a_failure_while_writing_leaves_the_old_file(record: Record) -> None:
    before = record.path.read_bytes()
    with pytest.raises(TypeError):
        record.add(RUN, {"what": object()})
    assert record.path.read_bytes() == before
    assert list(record.path.parent.iterdir()) == [record.path]


def test_goals_that_are_reached(record: Record) -> None:
    found = goals(record.read())
    assert [goal["verdict"] for goal in found] == ["reached"] * 3
    assert [goal["figure"] for goal in found] == [0.99, 1.5, 1.0]
    assert not faults(record.read())


@pytest.mark.parametrize(
    ("index", "change", "missed"),
    [(0, {"to_compiled": 1.01}, 0), (3, {"median_s": 10.01}, 1), (3, {"peak_bytes": 1301}, 2)],
    ids=["phase", "run", "memory"],
)
def test_a_goal_just_missed(record: Record, index: int, change: dict[str, float], missed: int) -> None:
    data = copy.deepcopy(record.read())
    data["results"][index] |= change
    found = [goal["verdict"] for goal in goals(data)]
    assert found == ["missed" if place == missed else "reached" for place in range(3)]


def test_a_rehearsal_decides_no_goal(record: Record) -> None:
    assert {goal["verdict"] for goal in goals({**record.read(), "kind": REHEARSAL})} == {"rehearsed"}


def test_a_goal_without_figures_says_why(record: Record) -> None:
    record.begin(RUN)
    record.end(RUN, FULL, "There is too little memory on the GPU.")
    found = goals(record.read())
    assert [goal["verdict"] for goal in found] == ["reached", "not measured", "not measured"]
    assert {goal["reason"] for goal in found[1:]} == {"There is too little memory on the GPU."}
    assert f"{RUN.name}: {FULL}: There is too little memory" in markdown(record.read())


def test_what_failed_is_a_fault_and_in_the_table(record: Record) -> None:
    bound = {"bound_db": 45.0, "control": True, "ok": False}
    record.add(PARITY, {"what": "call", "phase": "strided", "candidate": "other shifts", "snr_db": 50.0, **bound})
    record.add(SPEED, {"what": "phase", "phase": "pooled", "contender": "engine", "reason": "no plan"}, FAILED)
    record.end(BUILD, FAILED, "The process ended with signal SIGSEGV.")
    found = "\n".join(faults(record.read()))
    for told in ("other shifts: beyond its bound", "pooled, engine: no plan", "SIGSEGV"):
        assert told in found
        assert told in markdown(record.read())
    assert "| < 45 | FAILED |" in markdown(record.read())


def test_the_table_of_a_rehearsal_says_so(tmp_path: Path) -> None:
    record = Record(tmp_path / "out.json")
    record.create(REHEARSAL, "")
    assert markdown(record.read()).startswith("# Rehearsal: no GPU\n\nTiny width, on the CPU")
