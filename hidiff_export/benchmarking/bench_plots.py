"""Pictures of a comparison in time: a run step by step, the run of each contender, and what larger pictures cost."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from hidiff_export.benchmarking.bench_tables import seconds
from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.timings import SizeTimes
from hidiff_runtime.format.left_out import phases_of_steps
from hidiff_runtime.phases import PhasePlan

MISSING = "plots are left out: matplotlib is not installed. pip install 'hidiff-export[bench]'."

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Okabe's and Ito's, which color-blind people tell apart; the yellow, faint on white, is a brown here."""
_MARKERS = "osD^vPX*"
_SHADES = ("#E8E8E8", "#FFFFFF", "#D4D4D4")
_KINDS = {"without HiDiffusion": "#999999", "HiDiffusion in PyTorch": "#56B4E9", "bundles": "#D55E00"}
_STYLES = {"without HiDiffusion": ":", "HiDiffusion in PyTorch": "--", "bundles": "-"}
_NARROW = 0.15
"""Of the width: less has no room for a phase's name, or for that of a size beside another."""
_WIDTH = 8.5
"""Inches."""
_GIB = 1 << 30


def available() -> bool:
    """Returns whether plots can be drawn here."""
    return find_spec("matplotlib") is not None


def save_plots(sizes: Sequence[SizeTimes], folder: Path) -> tuple[str, ...]:
    """Draws into a new folder; returns the names of the pictures. Sizes at which nobody finished have none."""
    folder.mkdir()
    found: list[str] = []
    drawn = [size for size in sizes if size.finished]
    for size in drawn:
        for name, figure in (("steps", _steps(size)), ("run", _run(size))):
            found.append(f"{name}-{size.work.size}.png")
            _save(figure, folder / found[-1])
    if len(drawn) > 1:
        found.append("sizes.png")
        _save(_sizes(drawn), folder / found[-1])
    return tuple(found)


def _figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=140, layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": None})


def _look(place: int, one: Competitor) -> dict[str, Any]:
    """Returns color and style of a contender's line: no two of 8 share a color, and kinds differ in style."""
    return {"color": _COLORS[place % len(_COLORS)], "linestyle": _STYLES[_kind(one)], "linewidth": 1.8}


def _steps(size: SizeTimes) -> Any:
    """Draws the seconds of each step over the run, with the phases behind them."""
    figure, axes = _figure(4.2 + 0.12 * len(size.finished))
    steps, plan = size.work.steps, PhasePlan(size.work.recipe.phase_rule(), size.work.steps)
    for place, one in enumerate(size.finished):
        phases = phases_of_steps(size.rule(one), one.competitor.forecast, steps)
        each = [0.0 if phase is None else size.evaluation_seconds(one, phase.name) for phase in phases]
        edges = range(steps + 1)
        axes.stairs(each, edges, baseline=None, label=one.competitor.name, **_look(place, one.competitor))
    top = axes.get_ylim()[1] * 1.1
    axes.set(xlim=(0, steps), ylim=(0, top), xlabel="step", ylabel="seconds of an evaluation")
    for place, span in enumerate(plan.spans):
        axes.axvspan(span.first, span.last + 1, color=_SHADES[place % len(_SHADES)], zorder=0, linewidth=0)
        turned = 90 if span.steps < _NARROW * steps else 0
        middle = (span.first + span.last + 1) / 2
        axes.text(middle, top * 0.985, span.phase.name, ha="center", va="top", fontsize=9, rotation=turned)
    axes.set_title(f"Each step of a run at {size.work.size}", loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _run(size: SizeTimes) -> Any:
    """Draws the seconds of the whole run as bars, from the UNet as it was published to the bundles."""
    shown = size.finished
    figure, axes = _figure(1.6 + 0.38 * len(shown))
    took = [size.run_seconds(one) for one in shown]
    kinds = [_kind(one.competitor) for one in shown]
    places = range(len(shown))
    axes.barh(places, took, color=[_KINDS[kind] for kind in kinds], height=0.7)
    for place, (one, value) in enumerate(zip(shown, took, strict=True)):
        ratio = size.run_ratio(one)
        faster = "" if ratio is None or one.competitor.name == size.base else f",  {ratio.value:.2f} x"
        axes.text(value, place, f"  {seconds(value)} s{faster}", va="center", fontsize=9)
    axes.set_yticks(places, [one.competitor.name for one in shown])
    axes.invert_yaxis()
    axes.set(xlim=(0, max(took) * 1.22), xlabel=f"seconds of {size.work.steps} steps; x: times faster than {size.base}")
    axes.set_title(f"A run at {size.work.size}", loc="left")
    from matplotlib.patches import Patch

    keys = [Patch(color=color, label=kind) for kind, color in _KINDS.items() if kind in kinds]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _kind(one: Competitor) -> str:
    if one.bundle:
        return "bundles"
    return "HiDiffusion in PyTorch" if one.hidiffusion else "without HiDiffusion"


def _sizes(sizes: Sequence[SizeTimes]) -> Any:
    """Draws time and memory of every contender over the sizes' pixels."""
    names = list(dict.fromkeys(one.competitor.name for size in sizes for one in size.finished))
    figure, (time, memory) = _figure(4.2 + 0.12 * len(names), 2)
    for place, name in enumerate(names):
        points = [(size, one) for size in sizes for one in size.finished if one.competitor.name == name]
        across = [_megapixels(size) for size, _ in points]
        look = {**_look(place, points[0][1].competitor), "marker": _MARKERS[place % len(_MARKERS)], "markersize": 5}
        time.plot(across, [size.run_seconds(one) for size, one in points], label=name, **look)
        memory.plot(across, [one.memory / _GIB for _, one in points], **look)
    steps, places = sizes[0].work.steps, [_megapixels(size) for size in sizes]
    for axis, title in ((time, f"seconds of {steps} steps"), (memory, "most memory of the process, GiB")):
        axis.set(xlabel="megapixels", ylim=(0, None))
        axis.set_title(title, loc="left", fontsize=11)
        if _apart(places):
            axis.set_xlabel("size in pixels")
            axis.set_xticks(places, [size.work.size for size in sizes])
            axis.tick_params(axis="x", labelrotation=30)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _apart(places: Sequence[float]) -> bool:
    """Returns whether each of these, sorted, has room for a name beside the next."""
    width = places[-1] - places[0]
    return all(other - one > _NARROW * width for one, other in pairwise(places))


def _megapixels(size: SizeTimes) -> float:
    return size.work.recipe.width * size.work.recipe.height / 1e6
