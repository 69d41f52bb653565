"""What a comparison in time found, as JSON, and the folder of its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from hidiff_export.benchmarking.bench_tables import markdown
from hidiff_export.benchmarking.timings import ContenderTimes, PhaseTimes, SizeTimes
from hidiff_export.files import storage_errors, write_json
from hidiff_runtime.format.atomic_write import atomic_write

REPORT, MARKDOWN, PLOTS = "bench.json", "bench.md", "plots"
FILES = (REPORT, MARKDOWN, PLOTS)
"""What a report's folder holds."""

FORMAT = 1
"""Of the JSON."""


@dataclass(frozen=True)
class BenchReport:
    """Everything measured.

    Args:
        machine: what `machine_facts` says.
        settings: steps, rounds and timesteps.
        sizes: from the smallest on.
        peaks: operations a second of matrix products, by precision; none where they were not measured.
        plots: names of pictures beside the page, in its folder `PLOTS`.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    sizes: tuple[SizeTimes, ...]
    peaks: dict[str, float] = field(default_factory=dict)
    plots: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns JSON types: seconds, bytes, decibels, and operations in 10^12 (``tflops``) or 10^9 a second."""
        return {
            "format": FORMAT,
            "machine": self.machine,
            "settings": self.settings,
            "peak_gflops": {name: round(peak / 1e9, 1) for name, peak in self.peaks.items()},
            "sizes": [self._size(size) for size in self.sizes],
        }

    def save(self, folder: Path) -> None:
        """Writes JSON and Markdown into the folder that the plots are in already.

        Raises:
            StorageError: one of them cannot be written.
        """
        with storage_errors(folder):
            write_json(folder / REPORT, self.to_json())
            with atomic_write(folder / MARKDOWN) as file:
                page = markdown(self.machine, self.settings, self.sizes, self.peaks, self.plots)
                file.write(page.encode())

    def _size(self, size: SizeTimes) -> dict[str, Any]:
        work, recipe = size.work, size.work.recipe
        phases = [
            {"phase": planned.phase.name, "steps": planned.count, "tflops": planned.flops / 1e12}
            for planned in work.phases
        ]
        return {
            "width": recipe.width,
            "height": recipe.height,
            "batch": recipe.batch,
            "model_batch": recipe.model_batch,
            "phases": phases,
            "stock_tflops": work.stock_flops / 1e12,
            "base": size.base,
            "left_out": dict(size.left_out),
            "contenders": [self._contender(size, one) for one in size.contenders],
        }

    def _contender(self, size: SizeTimes, one: ContenderTimes) -> dict[str, Any]:
        who = one.competitor
        told: dict[str, Any] = {
            "name": who.name,
            "origin": who.origin,
            "precision": who.precision,
            "hidiffusion": who.hidiffusion,
            "bundle": who.bundle,
            "failure": one.failure or None,
            "profile_failure": one.profile_failure or None,
            "started_seconds": one.started,
            "peak_memory_bytes": one.memory,
            "phases": {name: _phase(times) for name, times in one.phases.items()},
            "decibels": one.decibels,
        }
        if one.failure:
            return told
        for name, phase in told["phases"].items():
            phase |= self._speed(size.flops(one, name), median(phase["wall"]), who.precision)
            phase["median_processor"] = median(phase["processor"])
            phase["ratio"] = _ratio(size.phase_ratio(one, name))
        run: dict[str, Any] = {**self._speed(size.run_flops(one), size.run_seconds(one), who.precision)}
        run["evaluations"] = sum(size.counts(one).values())
        run["median_processor"] = size.run_seconds(one, "processor")
        run["ratio"] = _ratio(size.run_ratio(one))
        told["savings"] = [asdict(saved) for saved in size.savings(one)]
        return {**told, "ready_seconds": one.ready, "run": run}

    def _speed(self, flops: int, seconds: float, precision: str) -> dict[str, float | None]:
        """Returns seconds beside those of the operations at the measured peak; none where that was not measured."""
        peak = self.peaks.get(precision)
        floor = None if peak is None else flops / peak
        return {
            "median_wall": seconds,
            "tflops": flops / 1e12,
            "gflops_a_second": flops / seconds / 1e9,
            "floor_seconds": floor,
            "times_the_floor": None if floor is None else seconds / floor,
        }


def _phase(times: PhaseTimes) -> dict[str, Any]:
    """Returns what was measured in a phase; of operators a list, whose order JSON keeps."""
    total = sum(times.operators.values())
    operators = [
        {"operator": name, "seconds": seconds, "share": seconds / total} for name, seconds in times.operators.items()
    ]
    return {**asdict(times), "operators": operators}


def _ratio(found: Any) -> dict[str, float] | None:
    return None if found is None else asdict(found)
