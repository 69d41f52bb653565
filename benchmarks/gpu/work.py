"""What a job has at hand: its recipe, the folder that jobs hand files on in, and the record it adds to."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hidiff_runtime
from benchmarks.gpu.cases import Scale, Step, recipe_of, scale_of, steps_of
from benchmarks.gpu.record import ABSENT, DONE, FAILED, FULL, Job, Record
from hidiff_export.errors import HidiffError, RecipeError
from hidiff_export.recipe import Recipe
from hidiff_runtime import backends

_FULL = ("outofmemory", "out of memory", "too little memory", "memoryerror")


class Missing(Exception):  # noqa: N818 - a reason, not a fault
    """Something that a job needs is not on this machine."""


@dataclass(frozen=True)
class Work:
    """One job in its process.

    Args:
        job: which.
        record: where its results go.
        folder: where jobs leave bundles and arrays for each other.
        rehearse: tiny, and on the CPU.
    """

    job: Job
    record: Record
    folder: Path
    rehearse: bool

    @property
    def scale(self) -> Scale:
        """How much is measured."""
        return scale_of(self.rehearse)

    @property
    def device(self) -> str:
        """torch's name of where everything runs."""
        return self.scale.device

    def recipe(self, backend: str | None = None) -> Recipe:
        """The job's recipe, for a backend's engines or for PyTorch alone."""
        return recipe_of(self.job.case, self.job.precision, self.rehearse, backend)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every phase, at its first step."""
        return steps_of(self.recipe())

    @property
    def bundle(self) -> Path:
        """The bundle of the job's case, precision and backend."""
        return bundle_of(self.folder, self.job)

    def arrays(self, name: str) -> Path:
        """A file of arrays that belongs to the job's case and precision."""
        return arrays_of(self.folder, self.job, name)

    def save(self, name: str, **arrays: Any) -> None:
        """Leaves arrays for later jobs of this case and precision."""
        path = self.arrays(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"tmp-{path.name}")
        np.savez(beside, **arrays)
        beside.replace(path)

    def load(self, name: str) -> dict[str, Any]:
        """What :meth:`save` left."""
        with np.load(self.arrays(name)) as file:
            return dict(file)

    def add(self, result: Mapping[str, Any], status: str = DONE) -> None:
        """Adds a result to the record."""
        self.record.add(self.job, result, status)

    @contextmanager
    def attempt(self, **what: Any) -> Iterator[None]:
        """Records a failure inside as the result of ``what``, and goes on after it."""
        try:
            yield
        except Exception as error:
            self.add({**what, "reason": reason_of(error)}, status_of(error))
        else:
            return
        free_memory()  # once the error, and with it all that it holds, is gone


def bundle_of(folder: Path, job: Job) -> Path:
    """Where a job's bundle lies."""
    return folder / f"{job.case}-{job.precision}-{job.by}"


def arrays_of(folder: Path, job: Job, name: str) -> Path:
    """Where a file of arrays of a case and precision lies."""
    return folder / f"{job.case}-{job.precision}-reference" / f"{name}.npz"


def check_available(backend: str) -> str:
    """The backend's own description of itself here.

    Raises:
        Missing: its library or a device is not here, or this version knows no such backend.
    """
    if backend not in backends.NAMES:
        raise Missing(f"hidiff-runtime {hidiff_runtime.__version__} knows no backend {backend}")
    availability = backends.get(backend).available()
    if not availability.usable:
        raise Missing(f"{availability.detail} {availability.advice}".strip())
    return availability.detail


def reason_of(error: BaseException) -> str:
    """What went wrong, in the project's own words or with the place where it did."""
    if isinstance(error, (HidiffError, Missing)):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def status_of(error: BaseException) -> str:
    """Whether something is not here, did not fit into memory, or failed."""
    if isinstance(error, (Missing, RecipeError)):
        return ABSENT
    said = f"{type(error).__name__} {error}".lower()
    return FULL if any(sign in said for sign in _FULL) else FAILED


def free_memory() -> None:
    """Gives the device back what nothing refers to any more."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
