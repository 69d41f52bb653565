"""The file of results: JSON, written whole beside itself and renamed at every result, so that it is never half a file.

One process writes at a time: the schedule, or the job that it waits for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_export.files import write_json

FORMAT = 1
REHEARSAL = "rehearsal: no GPU"
MEASURED = "measured on a GPU"

DONE, FAILED, ABSENT, FULL = "done", "failed", "cannot run", "out of memory"
"""How a job or one of its results ended: as it should, with a fault, not begun for want of something, or for want of
memory."""
ENDED = (DONE, FAILED, ABSENT, FULL)
NOT_BEGUN, NOT_ENDED = "not begun", "begun, and not ended"
"""What is known of jobs whose turn has not come, and of one that was interrupted."""


@dataclass(frozen=True)
class Job:
    """One process's work.

    Args:
        part: ``environment``, ``reference``, ``build``, ``parity``, ``speed``, ``run`` or ``tests``.
        case: the recipe's name; empty where there is none.
        precision: of the weights and the engines.
        by: who computes: a backend, or a way of PyTorch's.
    """

    part: str
    case: str = ""
    precision: str = ""
    by: str = ""

    @property
    def name(self) -> str:
        """In the file, and in the names of logs."""
        return "-".join(word for word in (self.part, self.case, self.precision, self.by) if word)

    @property
    def fields(self) -> dict[str, str]:
        """What every result of the job says."""
        named = {"part": self.part, "case": self.case, "precision": self.precision, "by": self.by}
        return {key: value for key, value in named.items() if value}


class Record:
    """The results in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, kind: str, commit: str) -> None:
        """Begins an empty record. Raises OSError when it cannot be written."""
        write_json(self.path, {"format": FORMAT, "kind": kind, "commit": commit, "jobs": {}, "results": []})

    def read(self) -> dict[str, Any]:
        """All of it."""
        data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return data

    def status(self, job: Job) -> str:
        """How the job ended; empty if it has not yet."""
        found = self.read()["jobs"].get(job.name, {}).get("status", "")
        return found if found in ENDED else ""

    def plan(self, jobs: Iterable[Job]) -> None:
        """Names jobs that are to come, so that none is missing in silence if they never do."""
        data = self.read()
        for job in jobs:
            data["jobs"].setdefault(job.name, {**job.fields, "status": NOT_BEGUN, "reason": ""})
        write_json(self.path, data)

    def begin(self, job: Job) -> None:
        """Forgets what an earlier attempt at the job left."""
        data = self.read()
        data["jobs"][job.name] = {**job.fields, "status": NOT_ENDED, "reason": ""}
        data["results"] = [result for result in data["results"] if result["job"] != job.name]
        write_json(self.path, data)

    def add(self, job: Job, result: Mapping[str, Any], status: str = DONE) -> None:
        """Adds a result of a job in progress."""
        data = self.read()
        data["results"].append({"job": job.name, **job.fields, "status": status, **plain(dict(result))})
        write_json(self.path, data)

    def end(self, job: Job, status: str, reason: str = "", seconds: float = 0.0) -> None:
        """Says how the job ended."""
        data = self.read()
        data["jobs"][job.name] = {**job.fields, "status": status, "reason": reason, "seconds": round(seconds, 1)}
        write_json(self.path, data)

    def set(self, key: str, value: Any) -> None:
        """Replaces what follows from all results."""
        write_json(self.path, {**self.read(), key: plain(value)})


def plain(value: Any) -> Any:
    """The value as JSON types; JSON has no infinities, so they are texts."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
