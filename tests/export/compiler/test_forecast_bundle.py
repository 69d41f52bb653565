"""A bundle that forecasts steps, from recipe to picture: built, checked, run, and beside PyTorch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_export.verification.verify import verify
from hidiff_runtime import Pipeline, check, save_png
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.image_parameters import read_parameters
from hidiff_runtime.pipeline.image_settings import settings_like
from hidiff_runtime.sampling import forecast as forecasts
from tests.export.compiler.recorded_runs import built_once, runs

CHANGES = ("width=64", "height=64", "steps=[6,8]", "sampler=[euler,dpmpp_2m]", "forecast=true")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return built_once(tmp_path_factory, worker_id, "forecast-bundle", CHANGES)


def test_the_recorded_run_forecasts_a_step(bundle: Path) -> None:
    verdicts = runs(bundle)
    assert all(verdict.ok for verdict in verdicts)
    assert len(verdicts) == 6 + 1  # one of 6 steps, of which 5 are computed
    assert check(bundle).ok
    samples = json.loads((bundle / "reference/samples.json").read_text())
    assert samples["runs"][0]["steps"] == 6


def test_the_step_graph_keeps_outputs(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert manifest.forecast == Forecast()
    assert manifest.step is not None
    states = next(spec.shape[0] for spec in manifest.step.inputs if spec.name == "state")
    tables = 1  # dpmpp_2m's
    assert states == tables + forecasts.KEPT


@pytest.mark.parametrize("fault", ["one row late", "other weights", "never"])
def test_a_forecast_of_something_else_fails_the_check(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: str, tmp_path: Path
) -> None:
    weights = forecasts.weights
    if fault == "one row late":
        monkeypatch.setattr(forecasts, "weights", lambda known, index, total: weights(known, index - 1, total))
    elif fault == "other weights":
        monkeypatch.setattr(forecasts, "weights", lambda known, index, total: weights(known, index, total)[::-1])
    else:
        bundle = Path(shutil.copytree(bundle, tmp_path / "copy"))
        toy.seal(bundle, replace(Manifest.read(bundle), forecast=None))
    assert not all(verdict.ok for verdict in runs(bundle))


def test_verify_agrees_with_pytorch(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    assert verify(folder).ok


def test_a_picture_says_how_it_was_made(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        pipeline = Pipeline(opened)
        image, whole = (pipeline("a boat", steps=8, seed=1, full_run=full) for full in (False, True))
    assert np.abs(np.asarray(image, np.int16) - np.asarray(whole, np.int16)).max() > 0
    facts = json.loads(image.info["hidiff"])
    assert facts["forecast"] == vars(Forecast())
    assert "Forecast: " in image.info["parameters"]
    assert "forecast" not in json.loads(whole.info["hidiff"])


def test_a_picture_is_drawn_again_as_it_was(bundle: Path, tmp_path: Path) -> None:
    with open_bundle(bundle) as opened:
        pipeline = Pipeline(opened)
        for name, full in (("forecast.png", False), ("whole.png", True)):
            save_png(pipeline("a boat", steps=8, seed=1, full_run=full), tmp_path / name)
        found = {
            name: settings_like(opened, read_parameters(tmp_path / name)) for name in ("forecast.png", "whole.png")
        }
        assert not found["forecast.png"].settings.get("full_run")
        assert found["whole.png"].settings["full_run"] is True
        assert not any("forecast" in warning for like in found.values() for warning in like.warnings)
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    toy.seal(copy, replace(Manifest.read(copy), forecast=None))
    with open_bundle(copy) as opened:
        like = settings_like(opened, read_parameters(tmp_path / "forecast.png"))
        assert any("left out other work" in warning for warning in like.warnings)
        assert not any(
            "left out" in told for told in settings_like(opened, read_parameters(tmp_path / "whole.png")).warnings
        )


def test_plan_and_inspect_tell_what_is_computed(bundle: Path) -> None:
    planned = CliRunner().invoke(main, ["plan", "sd15-1024", "--set", "forecast=true", "--steps", "50"])
    assert "19 of 50 steps" in planned.output
    plain = json.loads(CliRunner().invoke(main, ["plan", "sd15-1024", "--json"]).output)
    plan = json.loads(CliRunner().invoke(main, ["plan", "sd15-1024", "--set", "forecast=true", "--json"]).output)
    assert (plain["computed_steps"], plan["computed_steps"]) == (50, 19)
    assert sum(cost["computed_steps"] for cost in plan["costs"]) == 19
    assert plan["tflops"]["run"] < 0.4 * plain["tflops"]["run"]
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(bundle), "--json"]).output)
    assert inspected["forecast"] == vars(Forecast())


def test_a_bundle_without_forecast_is_rebased_to_one(sd15_bundle: Path, tmp_path: Path) -> None:
    """The step graph is made anew with room for what is kept; three steps are too few to leave one out."""
    words = ["rebase", str(sd15_bundle), "-o", str(tmp_path / "new"), "--set", "forecast=true", "--set", "steps=[3,6]"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert Manifest.read(tmp_path / "new").forecast == Forecast()
    assert Manifest.read(sd15_bundle).forecast is None
    assert check(tmp_path / "new").ok
    assert len(runs(tmp_path / "new")) == 6 + 1
