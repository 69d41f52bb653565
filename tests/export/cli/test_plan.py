"""`plan` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hidiff_export.cli import main
from hidiff_export.recipe import Recipe, shipped_recipes
from hidiff_export.recipe.run_plan import RunPlan


def _plan(*arguments: str, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["plan", *arguments])


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_fits_a_terminal_of_100_columns(name: str) -> None:
    result = _plan(name)
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    assert max(map(len, result.output.splitlines())) <= 100
    recipe = Recipe.load(name)
    for phase in RunPlan(recipe, 50 if 50 in recipe.steps else recipe.steps[-1]).phases:
        assert phase.span.phase.kind.value in result.output


def test_figures_survive_a_narrow_terminal() -> None:
    result = _plan("sdxl-4096", columns=80)
    assert "…" not in result.output
    for figure in ("52.59", "105.2", "2,104", "23%", "3.09x"):
        assert figure in result.output


def test_json_is_the_plan() -> None:
    result = _plan("sdxl-2048", "--steps", "30", "--json")
    assert json.loads(result.stdout) == RunPlan(Recipe.load("sdxl-2048"), 30).to_json()


def test_settings_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("family: sd15\nsource: random:0\nwidth: 1024\nheight: 1024\n")
    plan = json.loads(_plan(str(path), "--set", "width=2048", "--set", "height=2048", "--json").stdout)
    assert [phase["kind"] for phase in plan["phases"]] == ["strided_pooled", "strided", "windowed"]


def test_each_size_of_a_recipe_has_its_phases_and_its_saving() -> None:
    lines = _plan("sdxl-buckets-2x").output.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("strided ", "pooled ", "windowed "))] == [
        *["strided", "pooled", "windowed"] * 6
    ]
    assert "1664x2432 px, batch 1; beside the stock UNet 1.56x fewer operations" in lines
    assert "768x512 px, batch 1; beside the stock UNet as many operations" in _plan("sd15-buckets").output


def test_odd_windows_and_stars_are_explained() -> None:
    output = _plan("sd15-1024", "--set", "width=1920", "--set", "height=1080").output
    assert "120x68*" in output
    assert "resized (bicubic)" in output
    assert "*" not in _plan("sd15-1024").output


def test_without_windows_none_are_shown() -> None:
    output = _plan("sd15-1024", "--set", "hidiffusion.windows=false").output
    assert "none" in output
    assert "shifted" not in output


def test_tiny_networks_are_counted_in_gflops() -> None:
    assert "GFLOPs" in _plan("demo").output
    assert "TFLOPs" in _plan("sd15-1024").output


def test_steps_that_the_bundle_will_not_run_are_pointed_out() -> None:
    assert "cannot run 200 steps" in _plan("demo", "--steps", "200").output
    assert "cannot run" not in _plan("demo", "--steps", "20").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "There is no such recipe"),
        (("missing.yaml",), "cannot be read"),
        (("demo", "--steps", "0"), "at least one step"),
        (("demo", "--set", "width=1020"), "multiple of 8"),
        (("demo", "--set", "width"), "not KEY=VALUE"),
        (("demo", "--steps", "many"), "not a valid integer"),
    ],
)
def test_bad_input_exits_with_2_and_prints_nothing_else(arguments: tuple[str, ...], message: str) -> None:
    result = _plan(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
