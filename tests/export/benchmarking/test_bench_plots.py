"""Plots of figures that are made up: each is drawn whatever there is, and nothing that was measured is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hidiff_export.benchmarking.bench_plots import _run, _sizes, _steps, save_plots
from hidiff_export.benchmarking.bench_report import BenchReport
from hidiff_export.benchmarking.bench_tables import remarks, rows
from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.timings import ContenderTimes, PhaseTimes, SizeTimes
from hidiff_export.benchmarking.workload import Workload
from hidiff_export.recipe import Recipe

STOCK, EAGER, BUNDLE = (
    Competitor("diffusers", "stock", "", "float32", False, {}),
    Competitor("eager", "eager", "", "float32", True, {}),
    Competitor("bundle-of-a-long-name onnxruntime", "bundle", "", "int8", True, {}, bundle=True),
)


def size(side: int, recipe: str = "sdxl-2048", failed: str = "", less: tuple[str, ...] = ()) -> SizeTimes:
    """A contender of each kind; one that failed where it is named."""
    work = Workload(Recipe.load(recipe, (f"width={side}", f"height={side}", *less)), 50)
    found = []
    for speed, one in enumerate((STOCK, EAGER, BUNDLE), 1):
        wall = [side**2 / 1e4 / speed, side**2 / 1e4 / speed]
        phases = {planned.phase.name: PhaseTimes(1, 2, wall, wall) for planned in work.phases_of(bundle=one.bundle)}
        found.append(ContenderTimes(one, 3, side << 20, phases, "no | memory" if one.name == failed else ""))
    return SizeTimes(work, tuple(found), "diffusers")


@pytest.mark.needs("matplotlib")
def test_a_plot_of_each_kind_is_drawn(tmp_path: Path) -> None:
    names = save_plots([size(1024), size(2048)], tmp_path / "plots")
    sides = (f"{kind}-{side}x{side}.png" for side in (1024, 2048) for kind in ("steps", "run"))
    assert names == (*sides, "sizes.png")
    for name in names:
        with Image.open(tmp_path / "plots" / name) as picture:
            assert picture.width == 1190
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.needs("matplotlib")
def test_one_size_has_no_plot_of_sizes_and_a_size_where_all_failed_none(tmp_path: Path) -> None:
    failed = size(2048)
    for one in failed.contenders:
        one.failure = "no memory"
    assert save_plots([size(1024), failed], tmp_path / "plots") == ("steps-1024x1024.png", "run-1024x1024.png")


def lines(axes: Any) -> dict[str, tuple[float, float]]:
    """Each line's first and last height, by its label."""
    return {line.get_label(): (line.get_ydata()[0], line.get_ydata()[-1]) for line in axes.get_lines()}


@pytest.mark.needs("matplotlib")
def test_plots_show_what_was_measured() -> None:
    small, large = size(1024), size(2048)
    (bars,) = _run(large).axes
    heights = [bar.get_width() for bar in bars.patches]
    assert heights == [large.run_seconds(one) for one in large.contenders]
    assert [label.get_text() for label in bars.get_yticklabels()] == [STOCK.name, EAGER.name, BUNDLE.name]
    assert "2.00 x" in bars.texts[1].get_text()
    (steps,) = _steps(large).axes
    assert [text.get_text() for text in steps.texts] == [planned.phase.name for planned in large.work.phases]
    time, memory = _sizes([small, large]).axes
    assert lines(time)["eager"] == (small.run_seconds(small.contenders[1]), large.run_seconds(large.contenders[1]))
    assert [*memory.get_lines()[0].get_ydata()] == [1.0, 2.0]
    for axes in (bars, steps, time, memory):
        assert axes.get_xlabel()


@pytest.mark.needs("matplotlib")
def test_sizes_that_are_near_each_other_are_told_in_megapixels() -> None:
    time, _ = _sizes([size(1024), size(1088), size(4096)]).axes
    assert time.get_xlabel() == "megapixels"
    time, _ = _sizes([size(1024), size(2048), size(4096)]).axes
    assert [label.get_text() for label in time.get_xticklabels()] == ["1024x1024", "2048x2048", "4096x4096"]


def test_the_page_and_the_table_have_a_row_for_each() -> None:
    one = size(2048, failed="eager")
    assert [row[0] for row in rows(one)] == [STOCK.name, EAGER.name, BUNDLE.name]
    assert rows(one)[1][-6] == "failed"
    assert "eager failed: no | memory" in remarks(one)
    assert "No dB with HiDiffusion: eager in float32 is not measured. Add it to --peers." in remarks(one)
    one.contenders[2].phases["strided"].operators = {"Conv": 3.0, "MatMul": 1.0}
    machine = {"processor": "P", "cores": 2, "threads": 1, "memory": 1 << 33, "instructions": ["avx2"]}
    machine |= {"system": "Linux", "python": "3", "versions": {"torch": "2"}}
    report = BenchReport(machine, {"steps": 50, "rounds": 2, "timesteps": [1]}, (one,), {"float32": 1e11})
    figures = report.to_json()["sizes"][0]["contenders"]
    assert figures[0]["run"]["times_the_floor"] == pytest.approx(
        one.run_seconds(one.contenders[0]) / (one.run_flops(one.contenders[0]) / 1e11)
    )
    assert figures[2]["run"]["floor_seconds"] is None
    assert "run" not in figures[1]


@pytest.mark.needs("matplotlib")
def test_peers_are_drawn_beside_a_bundle_that_leaves_work_out(tmp_path: Path) -> None:
    """They have no times of shallow and unguided phases, in plots, tables and JSON."""
    less = size(1024, less=("reuse=3", "guidance_until=0.6"))
    assert save_plots([less], tmp_path / "plots") == ("steps-1024x1024.png", "run-1024x1024.png")
    (steps,) = _steps(less).axes
    assert [text.get_text() for text in steps.texts] == ["strided", "pooled", "windowed", "windowed-unguided"]
    names = [planned.phase.name for planned in less.work.phases]
    filled = [[bool(cell) for cell in row[1 : 1 + len(names)]] for row in rows(less)]
    assert filled == [["shallow" not in name and "unguided" not in name for name in names]] * 2 + [[True] * len(names)]
    report = BenchReport({}, {"steps": 50, "rounds": 2}, (less,))
    peer, bundle = (one for one in report.to_json()["sizes"][0]["contenders"][1:])
    assert peer["savings"] == []
    assert bundle["savings"][0]["name"] == "full run"
    assert bundle["run"]["evaluations"] == peer["run"]["evaluations"] == 50
