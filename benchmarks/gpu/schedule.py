"""Which jobs there are, in what order, and what each waits for; runs each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.cases import BACKENDS, CASES, PRECISIONS, PYTORCH
from benchmarks.gpu.record import ABSENT, DONE, FAILED, Job, Record
from benchmarks.gpu.work import arrays_of, bundle_of
from hidiff_runtime.format.manifest import MANIFEST

PARTS = ("environment", "reference", "build", "parity", "speed", "run", "tests")
WAYS = ("eager published package", "eager PhaseUNet", "eager stock")
_TAIL = 1500


def jobs(cases: Sequence[str] = tuple(CASES), precisions: Sequence[str] = PRECISIONS) -> Iterator[Job]:
    """All jobs. A case's bundles are built one after another, each just before what needs it."""
    yield Job("environment")
    for case in cases:
        for precision in precisions:
            timed = precision == PRECISIONS[0]
            yield Job("reference", case, precision)
            if timed:
                yield Job("speed", case, precision, PYTORCH)
                yield from (Job("run", case, precision, way) for way in WAYS)
            for backend in BACKENDS:
                parts = ("build", "parity", *(("speed", "run") if timed else ()))
                yield from (Job(part, case, precision, backend) for part in parts)
    yield Job("tests")


def needs(job: Job) -> tuple[Job, ...]:
    """The jobs whose files it reads."""
    found = []
    if job.by in BACKENDS and job.part != "build":
        found.append(Job("build", job.case, job.precision, job.by))
    if job.part == "parity":
        found.append(Job("reference", job.case, job.precision))
    return tuple(found)


@dataclass(frozen=True)
class Schedule:
    """A run of all jobs; what the record already holds as done is left as it is.

    Args:
        record: where results go.
        folder: where jobs leave bundles, arrays and logs.
        wanted: the jobs to run, in order.
        rehearse: tiny, and on the CPU.
        limit: seconds a job may take.
        keep: leave bundles in the folder; else each is removed when its last job has ended.
        say: told what goes on.
    """

    record: Record
    folder: Path
    wanted: tuple[Job, ...]
    rehearse: bool
    limit: float
    keep: bool
    say: Callable[[str], None]

    def run(self, fault: str = "") -> None:
        """Runs what is left to do.

        Args:
            fault: why no job can run here; recorded for each.
        """
        self.record.plan(self.wanted)
        for index, job in enumerate(self.wanted):
            if self._left(job):
                reason = fault or self._hindrance(job)
                if reason:
                    self.record.begin(job)
                    self.record.end(job, ABSENT, reason)
                    self.say(f"{job.name}: cannot run: {_first_line(reason)}")
                else:
                    self._run(job)
            self._clean(self.wanted[index + 1 :], job)

    def _left(self, job: Job) -> bool:
        if self.record.status(job) != DONE:
            return True
        waiting = any(job in needs(other) and self.record.status(other) != DONE for other in self.wanted)
        return waiting and not self._has_files(job)

    def _has_files(self, job: Job) -> bool:
        if job.part == "build":
            return (bundle_of(self.folder, job) / MANIFEST).is_file()
        return job.part != "reference" or arrays_of(self.folder, job, "run").parent.is_dir()

    def _hindrance(self, job: Job) -> str:
        for needed in needs(job):
            status = self.record.status(needed)
            if status != DONE or not self._has_files(needed):
                reason = self.record.read()["jobs"].get(needed.name, {}).get("reason", "")
                return f"{needed.name} {'ended: ' + status if status else 'was not run'}. {reason}".strip()
        return ""

    def _run(self, job: Job) -> None:
        """Runs a job to its end, which it records itself unless it is killed, crashes or takes too long."""
        self.record.begin(job)
        self.say(f"{job.name} ...")
        log = self.folder / "logs" / f"{job.name.replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command(job), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(self.limit)
                fault = "" if self.record.status(job) else f"The process ended with {_ending(code)}."
            except subprocess.TimeoutExpired:
                fault = f"Took more than {self.limit:g} s."
            finally:
                _end_group(process)
        seconds = time.monotonic() - started
        if fault:
            self.record.end(job, FAILED, f"{fault} {_tail(log)}".strip(), seconds)
        entry = self.record.read()["jobs"][job.name]
        reason = f": {_first_line(entry['reason'])}" if entry["reason"] else ""
        self.say(f"{job.name}: {entry['status']}{reason} ({seconds:.0f} s)")

    def command(self, job: Job) -> list[str]:
        """What does the job, in a process of its own."""
        words = [str(self.record.path), str(self.folder), job.part, job.case, job.precision, job.by]
        return [sys.executable, "-m", "benchmarks.gpu.job", *words, *(["--rehearse"] if self.rehearse else [])]

    def _clean(self, later: Sequence[Job], job: Job) -> None:
        """Removes the job's bundle when no later job opens it."""
        same = (job.case, job.precision, job.by)
        if self.keep or job.by not in BACKENDS or any(same == (o.case, o.precision, o.by) for o in later):
            return
        bundle = bundle_of(self.folder, job)
        for folder in (bundle, bundle.with_name(f"{bundle.name}.partial"), bundle.with_name(f"{bundle.name}.cache")):
            shutil.rmtree(folder, ignore_errors=True)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the job and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return f"The log ends: {text[-_TAIL:]}" if text else ""


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
