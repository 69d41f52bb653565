"""The tables that people are shown of a comparison in time: in the terminal, and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from hidiff_export.benchmarking.peers import REFERENCES
from hidiff_export.benchmarking.timings import EQUAL, NO_NUMBERS, ContenderTimes, Ratio, SizeTimes

if TYPE_CHECKING:
    from rich.table import Table

_GIB = 1 << 30
_OPERATORS = 10
"""Of each phase that are told."""

_EXPLAINED = (
    "Times are seconds, medians of wall time; *of CPU* is all cores' together. *Faster* is of evaluations of the same "
    "round, with the least and the most of any round in brackets. *Ready* is from the start of the process to the end "
    "of the first evaluation, *GiB* the most memory that the process held, mapped weights included, which processes "
    "share. *Floor* is what the operations would take at the speed of matrix products in that precision. "
    "dB is the lowest signal-to-noise ratio of any evaluation beside PyTorch's in float32, with HiDiffusion for those "
    "that have it and without for the others; a contender without dB is that reference, or it was not measured."
)


SAVINGS = ("run", "evaluations", "TFLOPs", "seconds", "faster")
"""Titles of the table of what a bundle leaves out."""


def headings(size: SizeTimes) -> tuple[str, ...]:
    """Returns the table's, the contender's first. All but the last three columns are seconds."""
    phases = [planned.phase.name for planned in size.work.phases]
    return ("contender", *phases, f"{size.work.steps} steps", "of CPU", "ready", "faster", "GiB", "dB")


def rows(size: SizeTimes) -> list[tuple[str, ...]]:
    """Returns the table's cells under `headings`, as text; those of a contender that failed are empty."""
    return [_row(size, one) for one in size.contenders]


def remarks(size: SizeTimes) -> list[str]:
    """Returns lines on who failed, who is left out, and what is missing of the table."""
    found = [f"{one.competitor.name} failed: {one.failure}" for one in size.contenders if one.failure]
    found += [
        f"{one.competitor.name} tells no operators: {one.profile_failure}"
        for one in size.contenders
        if one.profile_failure
    ]
    found += [
        f"{one.competitor.name} computes {sum(size.counts(one).values())} of {size.work.steps} evaluations: "
        f"{one.competitor.forecast}; the others are forecast."
        for one in size.finished
        if one.competitor.forecast is not None
    ]
    found += [f"{name} is left out: {why}" for name, why in size.left_out.items()]
    if size.reference is None:
        found.append(
            f"{size.base} failed, which others would be compared with: no column says how much faster they are."
        )
    names = {one.competitor.name for one in size.finished}
    for hidiffusion, reference in REFERENCES.items():
        others = [one for one in size.finished if one.competitor.hidiffusion is hidiffusion]
        if others and reference not in names:
            kind = "with" if hidiffusion else "without"
            found.append(f"No dB {kind} HiDiffusion: {reference} in float32 is not measured. Add it to --peers.")
    return found


def table(size: SizeTimes) -> Table:
    """Returns the table that people are shown."""
    from rich.table import Table

    recipe = size.work.recipe
    title = f"\n{size.work.size}, batch of {recipe.batch}, {recipe.model_batch} latents an evaluation; seconds"
    titles = [title.replace("-", "\n-") for title in headings(size)]
    made = Table(*titles, title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in made.columns:
        column.no_wrap = True
    for column in made.columns[1:]:
        column.justify = "right"
    for row in rows(size):
        made.add_row(*row)
    return made


def savings_tables(size: SizeTimes) -> Iterator[Table]:
    """Yields the tables that people are shown of what bundles leave out."""
    from rich.table import Table

    for one in size.finished:
        if cells := savings_rows(size, one):
            title = f"\nwhat {one.competitor.name} leaves out, by the evaluations above"
            made = Table(*SAVINGS, title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
            for column in made.columns[1:]:
                column.justify = "right"
            for row in cells:
                made.add_row(*row)
            yield made


def markdown(
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    sizes: Sequence[SizeTimes],
    peaks: Mapping[str, float],
    plots: Sequence[str],
) -> str:
    """Returns the report's page; ``plots`` are the names of pictures in the folder beside it."""
    lines = ["# Evaluations in turn", "", _machine(machine), ""]
    lines += [f"{settings['rounds']} rounds after one that is not counted, {settings['steps']} steps. {_EXPLAINED}", ""]
    if peaks:
        told = ", ".join(f"{name} {peak / 1e9:.0f}" for name, peak in peaks.items())
        lines += [f"Matrix products reach here, in GFLOP/s: {told}.", ""]
    for size in sizes:
        lines += [f"## {size.work.size}", "", *_grid(headings(size), rows(size)), ""]
        lines += [f"- {line}" for line in remarks(size)] + [""] * bool(remarks(size))
        lines += [*_savings_tables(size)]
        lines += [*_phase_tables(size, peaks)]
        lines += [f"![{name}](plots/{name})" for name in plots if size.work.size in name]
        lines += ["", *_operator_tables(size)]
    lines += [f"![{name}](plots/{name})" for name in plots if not any(size.work.size in name for size in sizes)]
    return "\n".join(lines).rstrip() + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads an evaluation, "
        f"{machine['memory'] / _GIB:.0f} GiB of memory, {', '.join(machine['instructions'])}; {machine['system']}, "
        f"Python {machine['python']}, {versions}."
    )


def _row(size: SizeTimes, one: ContenderTimes) -> tuple[str, ...]:
    name, names = one.competitor.name, [planned.phase.name for planned in size.work.phases]
    if one.failure:
        return (name, *("" for _ in size.work.phases), "failed", "", "", "", _memory(one), "")
    return (
        name,
        *(seconds(size.evaluation_seconds(one, name)) if name in one.phases else "" for name in names),
        seconds(size.run_seconds(one)),
        seconds(size.run_seconds(one, "processor")),
        seconds(one.ready),
        _ratio(size.run_ratio(one), first=name == size.base),
        _memory(one),
        _decibels(one.decibels),
    )


def savings_rows(size: SizeTimes, one: ContenderTimes) -> list[tuple[str, ...]]:
    """Returns the cells under `SAVINGS` of each combination of what a bundle leaves out, the full run's first."""
    runs = size.savings(one)
    return [
        (
            run.name,
            str(run.evaluations),
            f"{run.flops / 1e12:.4g}",
            seconds(run.seconds),
            f"{runs[0].seconds / run.seconds:.2f}x",
        )
        for run in runs
    ]


def _savings_tables(size: SizeTimes) -> Iterator[str]:
    """Yields what each combination of what a bundle leaves out is worth."""
    for one in size.finished:
        if rows := savings_rows(size, one):
            yield f"### What {one.competitor.name} leaves out"
            yield ""
            yield from _grid(SAVINGS, rows)
            yield ""


def _phase_tables(size: SizeTimes, peaks: Mapping[str, float]) -> Iterator[str]:
    """Yields a table of each phase: what it costs, how near the machine's peak it comes, and the paired ratio."""
    for planned in size.work.phases:
        name = planned.phase.name
        yield f"### {name}, {planned.count} of {size.work.steps} steps"
        yield ""
        titles = ("contender", "precision", "wall", "of CPU", "faster", "TFLOP", "GFLOP/s", "floor", "x floor", "dB")
        yield from _grid(titles, [_phase_row(size, one, name, peaks) for one in size.finished if name in one.phases])
        yield ""


def _phase_row(size: SizeTimes, one: ContenderTimes, phase: str, peaks: Mapping[str, float]) -> tuple[str, ...]:
    who, times, flops = one.competitor, one.phases[phase], size.flops(one, phase)
    wall, peak = median(times.wall), peaks.get(who.precision)
    return (
        who.name,
        who.precision,
        seconds(wall),
        seconds(median(times.processor)),
        _ratio(size.phase_ratio(one, phase), first=who.name == size.base),
        f"{flops / 1e12:.3g}",
        f"{flops / wall / 1e9:.0f}",
        "" if peak is None else seconds(flops / peak),
        "" if peak is None else f"{wall * peak / flops:.2f}",
        _decibels(min(times.decibels, default=None)),
    )


def _operator_tables(size: SizeTimes) -> Iterator[str]:
    """Yields the operators that take longest, of each contender in each phase."""
    for one in size.finished:
        for phase, times in one.phases.items():
            total = sum(times.operators.values())
            if not total:
                continue
            yield f"#### Operators of {one.competitor.name}, {phase}"
            yield ""
            longest = list(times.operators.items())[:_OPERATORS]
            yield from _grid(
                ("operator", "s", "share"), [(name, seconds(took), f"{took / total:.1%}") for name, took in longest]
            )
            yield ""


def _grid(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"| --- |{' ---: |' * (len(titles) - 1)}"
    for row in cells:
        yield f"| {' | '.join(row)} |"


def seconds(value: float) -> str:
    """Returns seconds with three digits, or as whole ones."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 4 if value < 0.1 else 3}f}"


def _ratio(found: Ratio | None, *, first: bool) -> str:
    if found is None or first:
        return "1" if first else ""
    return f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})"


def _memory(one: ContenderTimes) -> str:
    return f"{one.memory / _GIB:.2f}" if one.memory else ""


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return {EQUAL: "equal", NO_NUMBERS: "no numbers"}.get(value, f"{value:.1f}")
