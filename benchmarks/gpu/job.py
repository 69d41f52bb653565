"""One job, in a process of its own: does its work, adds its results to the record, and says how it ended."""

from __future__ import annotations

import argparse
import ctypes
import signal
import time
import traceback
from pathlib import Path

from benchmarks.gpu.record import DONE, Job, Record
from benchmarks.gpu.work import Work, check_available, reason_of, status_of

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def do(work: Work) -> None:
    """The job's work. Raises whatever it meets; results added before stay."""
    part = work.job.part
    if part in ("environment", "tests"):
        from benchmarks.gpu import environment

        (environment.environment if part == "environment" else environment.suite)(work)
        return
    if part == "build":
        _build(work)
        return
    from benchmarks.gpu import machine, parity, speed

    machine.prepare()
    actions = {
        "reference": parity.reference,
        "parity": parity.engine_parity,
        "speed": speed.phases,
        "run": speed.whole_run,
    }
    actions[part](work)


def _build(work: Work) -> None:
    detail = check_available(work.job.by)
    recipe = work.recipe(work.job.by)
    from benchmarks.gpu import engines  # torch and all: not for a backend that is not here

    result = engines.build_bundle(recipe, work.bundle)
    files = [path for path in work.bundle.rglob("*") if path.is_file()]
    stages = {stage.title: round(stage.seconds, 1) for stage in result.stages}
    weights = (work.bundle / "unet/weights.safetensors").stat().st_size
    sizes = {"bundle_bytes": sum(path.stat().st_size for path in files), "weights_bytes": weights}
    work.add({"what": "bundle", "backend": detail, "seconds_of_stages": stages, **sizes})


def main() -> None:
    """Reads the command line that the schedule wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("record", "folder"):
        parser.add_argument(name, type=Path)
    for name in ("part", "case", "precision", "by"):
        parser.add_argument(name)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # else it would go on writing into the record
    job = Job(given.part, given.case, given.precision, given.by)
    work = Work(job, Record(given.record), given.folder, given.rehearse)
    started = time.monotonic()
    try:
        do(work)
    except Exception as error:  # whatever it is, the record says so and the next job has its turn
        traceback.print_exc()
        status, reason = status_of(error), reason_of(error)
    else:
        status, reason = DONE, ""
    work.record.end(job, status, reason, time.monotonic() - started)


if __name__ == "__main__":
    main()
