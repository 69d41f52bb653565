"""The command line: makes or goes on with a record, runs the schedule, and says what came of the goals."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks import gpu
from benchmarks.gpu import environment
from benchmarks.gpu.cases import CASES, PRECISIONS
from benchmarks.gpu.goals import faults, goals
from benchmarks.gpu.record import FORMAT, MEASURED, REHEARSAL, Record
from benchmarks.gpu.schedule import PARTS, Schedule, jobs

_NO_GPU, _INTERRUPTED = 5, 130


def main() -> int:
    """Runs what was asked for.

    Exit codes: 0 what could run is in order · 1 a job failed or a bound was missed · 2 wrong use · 5 no GPU ·
    130 interrupted.
    """
    given = _arguments()
    record = Record(given.out.absolute())
    fault = _open(record, given.rehearse)
    if fault:
        print(fault, file=sys.stderr)
        return 2
    folder = (given.folder or given.out.with_suffix(".work")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = tuple(job for job in jobs(given.cases, given.precisions) if job.part in given.parts)
    signal.signal(signal.SIGTERM, _interrupt)
    schedule = Schedule(record, folder, wanted, given.rehearse, given.limit, given.keep, _say)
    fault = "" if given.rehearse else environment.fault_of_gpu()
    try:
        schedule.run(fault)
    except KeyboardInterrupt:
        _say(f"Interrupted. {record.path} holds what was done; the same command goes on from there.")
        return _INTERRUPTED
    finally:
        record.set("goals", goals(record.read()))
    code = _conclude(record)
    if fault:
        _say(f"There is no GPU to measure on.\n  given: {fault}\n  next:  --rehearse runs the same code on the CPU.")
    return _NO_GPU if fault else code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("gpu.json"), help="gpu.json if left out")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU: shows that it runs")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--limit", type=float, default=3600, metavar="SECONDS", help="that a job may take")
    parser.add_argument("--folder", type=Path, help="for bundles, arrays and logs; OUT.work if left out")
    parser.add_argument("--keep", action="store_true", help="leave bundles in the folder")
    return parser.parse_args()


def _open(record: Record, rehearse: bool) -> str:
    """Begins the record, or goes on with one; says what is wrong with that one."""
    kind, commit = REHEARSAL if rehearse else MEASURED, environment.commit()
    if not record.path.exists():
        record.path.parent.mkdir(parents=True, exist_ok=True)
        record.create(kind, commit)
        return ""
    try:
        found = record.read()
        same = (found["format"], found["kind"], found["commit"]) == (FORMAT, kind, commit)
    except (ValueError, KeyError, TypeError):
        return f"{record.path} is no record of this benchmark.\n  next:  Give another name."
    if same:
        return ""
    told = f"  given: {found['kind']}, commit {found['commit']}\n  next:  Remove it, or give another name."
    return f"{record.path} is of another kind or commit.\n{told}"


def _conclude(record: Record) -> int:
    data = record.read()
    for goal in data["goals"]:
        where = ", ".join(goal[key] for key in ("case", "phase", "by") if key in goal)
        figure = f"{goal['figure']:g} (bound {goal['bound']:g})" if "figure" in goal else goal["reason"].splitlines()[0]
        _say(f"{goal['verdict']}: {goal['goal']}: {where}: {figure}")
    wrong = faults(data)
    for fault in wrong:
        _say(f"WRONG: {fault.splitlines()[0]}")
    if data["kind"] == REHEARSAL:
        _say("This was a rehearsal: no GPU, and no figure that means anything.")
    return 1 if wrong else 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
