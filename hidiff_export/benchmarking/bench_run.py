"""A whole comparison in time: every size of a line-up, its operators and the machine's peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hidiff_export.benchmarking import bench_plots
from hidiff_export.benchmarking.bench_report import PLOTS, BenchReport
from hidiff_export.benchmarking.interleaved import measure, profile, steps_of, thread_environment
from hidiff_export.benchmarking.lineup import Lineup, Size
from hidiff_export.benchmarking.machine import machine_facts
from hidiff_export.benchmarking.matrix_peaks import measured_peaks
from hidiff_export.benchmarking.timings import SizeTimes
from hidiff_export.benchmarking.workload import TIMESTEPS
from hidiff_export.compiler.compile import BuildProgress
from hidiff_export.compiler.stages.stage import Report
from hidiff_export.errors import InputError


@dataclass(frozen=True)
class BenchSettings:
    """How a line-up is measured.

    Args:
        rounds: evaluations of each phase that count.
        base: the row that others are compared with; each size's first, if left out.
        operators: whether those that take the time are told.
        peaks: whether matrix products are timed.
    """

    rounds: int = 5
    base: str | None = None
    operators: bool = False
    peaks: bool = True


def run(lineup: Lineup, settings: BenchSettings, folder: Path, display: BuildProgress) -> BenchReport:
    """Measures a line-up and draws the plots of its report, where matplotlib is installed.

    Args:
        lineup: who is measured.
        settings: and how.
        folder: of the report, which `BenchReport.save` completes.
        display: shows how far it is.

    Raises:
        EngineError: matrix products cannot be timed.
        InputError: there is nothing to measure, or no such row to compare with.
    """
    _check(lineup, settings)
    peaks: Mapping[str, float] = {}
    if settings.peaks:
        with display.stage("matrix products", reused=False):
            peaks = measured_peaks(lineup.threads, thread_environment(lineup.threads))
    sizes = []
    for size in lineup.sizes:
        with display.stage(f"{size[0]}x{size[1]}", reused=False) as report:
            sizes.append(_measured(lineup, size, settings, report))
    plots: tuple[str, ...] = ()
    if bench_plots.available():
        plots = bench_plots.save_plots(sizes, folder / PLOTS)
    else:
        display.notice(bench_plots.MISSING)
    told = {"steps": lineup.steps, "rounds": settings.rounds, "timesteps": list(TIMESTEPS)}
    return BenchReport(machine_facts(lineup.threads), told, tuple(sizes), dict(peaks), plots)


def _check(lineup: Lineup, settings: BenchSettings) -> None:
    """Refuses what would fail after hours of measuring."""
    found = {size: lineup.competitors(size) for size in lineup.sizes}
    names = {one.name for competitors, _ in found.values() for one in competitors}
    if not names:
        left_out = {name: why for _, lacking in found.values() for name, why in lacking.items()}
        raise InputError(
            "There is nothing to measure.",
            given="; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no bundle and no peer",
            advice="Give a bundle, or a recipe with peers.",
        )
    if settings.base is not None and settings.base not in names:
        raise InputError(
            "There is no such row to compare with.",
            given=settings.base,
            advice=f"Give --base one of {', '.join(sorted(names))}.",
        )


def _measured(lineup: Lineup, size: Size, settings: BenchSettings, report: Report) -> SizeTimes:
    work = lineup.work(size)
    competitors, left_out = lineup.competitors(size)
    count = steps_of(len(competitors), len(work.phases), settings.rounds)
    total = count + settings.operators * len(competitors) * len(work.phases)
    begun = -1

    def stepped(note: str) -> None:
        nonlocal begun
        begun += 1
        report(begun, total, note)

    times = measure(competitors, work, settings.rounds, lineup.threads, stepped)
    if settings.operators:
        profile(lineup.competitors(size, profile=True)[0], times, work, lineup.threads, stepped)
    names = [one.name for one in competitors]
    base = settings.base if settings.base in names else names[0]
    assert base is not None
    return SizeTimes(work, times, base, left_out)
