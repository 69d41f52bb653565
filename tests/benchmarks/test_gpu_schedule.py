"""Every job is there, has its turn once, and tells how it ended even if its process does not."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.gpu.cases import BACKENDS, CASES, PRECISIONS, recipe_of, steps_of
from benchmarks.gpu.record import ABSENT, DONE, FAILED, REHEARSAL, Job, Record
from benchmarks.gpu.schedule import PARTS, WAYS, Schedule, jobs, needs
from benchmarks.gpu.work import arrays_of, bundle_of
from hidiff_export.errors import RecipeError

ENDS = """
import sys
from pathlib import Path
from benchmarks.gpu.record import Job, Record
record, folder, part, case, precision, by = sys.argv[1:7]
Record(Path(record)).end(Job(part, case, precision, by), "done")
"""


@dataclass(frozen=True)
class Fake(Schedule):
    """Each job is a line of Python instead; by default it ends as it should."""

    programs: dict[str, str] = field(default_factory=dict)

    def command(self, job: Job) -> list[str]:
        words = [str(self.record.path), str(self.folder), job.part, job.case, job.precision, job.by]
        return [sys.executable, "-c", self.programs.get(job.part, ENDS), *words]


def schedule(folder: Path, *wanted: Job, limit: float = 60, **programs: str) -> Fake:
    record = Record(folder / "out.json")
    if not record.path.exists():
        record.create(REHEARSAL, "abc")
    return Fake(record, folder, wanted, True, limit, False, lambda _text: None, programs)


def statuses(made: Schedule) -> dict[str, str]:
    return {job["part"]: job["status"] for job in made.record.read()["jobs"].values()}


def test_every_case_backend_and_part_is_there() -> None:
    all_ = list(jobs())
    assert len({job.name for job in all_}) == len(all_)
    assert {job.part for job in all_} == set(PARTS)
    for case in CASES:
        for precision in PRECISIONS:
            for backend in BACKENDS:
                assert {Job(part, case, precision, backend) for part in ("build", "parity")} <= set(all_)
        timed = [Job("run", case, "float16", by) for by in (*WAYS, *BACKENDS)]
        timed += [Job("speed", case, "float16", by) for by in ("pytorch", *BACKENDS)]
        assert set(timed) <= set(all_)


def test_a_job_comes_after_what_it_needs() -> None:
    order = list(jobs())
    for index, job in enumerate(order):
        assert set(needs(job)) <= set(order[:index])


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsal_has_the_phases_of_the_full_size(case: str) -> None:
    full, tiny = (recipe_of(case, "float16", rehearse) for rehearse in (False, True))
    assert steps_of(full) == steps_of(tiny)
    assert (full.width, full.unet_width.value, tiny.unet_width.value) == (int(case.split("-")[1]), "full", "tiny")


def test_a_precision_that_the_backend_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match="bfloat16"):
        recipe_of("sd15-1024", "bfloat16", True, "onnxruntime")


BUILD, PARITY = Job("build", "sd15-1024", "float16", "tensorrt"), Job("parity", "sd15-1024", "float16", "tensorrt")
REFERENCE, TESTS = Job("reference", "sd15-1024", "float16"), Job("tests")


def test_a_crash_is_recorded_and_the_next_job_has_its_turn(tmp_path: Path) -> None:
    crash = "import os, signal; print('at work', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    made = schedule(tmp_path, Job("environment"), TESTS, environment=crash)
    made.run()
    assert statuses(made) == {"environment": FAILED, "tests": DONE}
    reason = made.record.read()["jobs"]["environment"]["reason"]
    assert "SIGSEGV" in reason
    assert "at work" in reason


def test_a_job_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    made = schedule(tmp_path, TESTS, limit=0.5, tests="import time; time.sleep(60)")
    made.run()
    assert "more than 0.5 s" in made.record.read()["jobs"]["tests"]["reason"]


def test_what_waits_for_a_failed_job_says_so(tmp_path: Path) -> None:
    made = schedule(tmp_path, REFERENCE, BUILD, PARITY, build="raise SystemExit(3)")
    made.run()
    assert statuses(made) == {"reference": DONE, "build": FAILED, "parity": ABSENT}
    assert "exit code 3" in made.record.read()["jobs"][PARITY.name]["reason"]


def test_a_job_is_done_once_and_a_failed_one_again(tmp_path: Path) -> None:
    schedule(tmp_path, Job("environment"), TESTS, tests="raise SystemExit(3)").run()
    again = schedule(tmp_path, Job("environment"), TESTS, environment="raise SystemExit(4)")
    again.run()
    assert statuses(again) == {"environment": DONE, "tests": DONE}


def test_a_bundle_is_built_again_for_a_job_that_lacks_it_and_removed_after(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, BUILD)
    make = f"from pathlib import Path; p = Path({str(bundle)!r}); p.mkdir(); (p / 'manifest.json').touch()\n{ENDS}"
    arrays_of(tmp_path, REFERENCE, "run").parent.mkdir()
    schedule(tmp_path, REFERENCE, BUILD, PARITY, build=make, parity="raise SystemExit(3)").run()
    assert not bundle.exists()
    again = schedule(tmp_path, REFERENCE, BUILD, PARITY, build=make)
    again.run()
    assert statuses(again) == {"reference": DONE, "build": DONE, "parity": DONE}
    assert not bundle.exists()


def test_without_a_device_every_job_says_so(tmp_path: Path) -> None:
    made = schedule(tmp_path, REFERENCE, BUILD, TESTS)
    made.run("no CUDA device")
    assert set(statuses(made).values()) == {ABSENT}
    assert {job["reason"] for job in made.record.read()["jobs"].values()} == {"no CUDA device"}
