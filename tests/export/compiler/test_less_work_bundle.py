"""Bundles that guide a part of a run and reuse deep features, from recipe to picture: built, checked, and told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_export.diffusers_api import apply_hidiffusion
from hidiff_export.errors import RecipeError
from hidiff_export.quality import contenders
from hidiff_export.recipe import Recipe
from hidiff_export.verification.verify import verify
from hidiff_runtime import Pipeline, check, save_png
from hidiff_runtime import open as open_bundle
from hidiff_runtime.denoising import host_loop
from hidiff_runtime.denoising.conditioning import Conditioning
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.phases import PhaseRule, StepRange
from hidiff_runtime.pipeline.image_parameters import read_parameters
from hidiff_runtime.pipeline.image_settings import settings_like
from hidiff_runtime.reused_features import DEEP_FEATURES, Reuse
from tests.export.compiler.recorded_runs import built_once, runs
from tests.parity.pictures import diffusers_pipeline
from tests.parity.pipelines import scheduler_of

CHANGES = ("steps=1-10", "sampler=[ddim,dpmpp_2m]", "guidance_until=0.6", "reuse=3")
PHASES = (
    "strided",
    "strided-shallow",
    "windowed",
    "windowed-shallow",
    "windowed-unguided",
    "windowed-unguided-shallow",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return built_once(tmp_path_factory, worker_id, "less-work-bundle", CHANGES)


def test_every_graph_is_checked_and_the_run_goes_through_all(bundle: Path) -> None:
    report = check(bundle)
    assert report.ok
    calls = [verdict.phase for verdict in report.verdicts if verdict.boundary.startswith("engine")]
    assert set(calls) == set(PHASES)
    assert [verdict.phase for verdict in runs(bundle)[:-1]] == list(PHASES)


def test_graphs_share_one_store_and_have_half_the_batch_without_guidance(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert [record.phase.name for record in manifest.phases] == list(PHASES)
    assert len({path for name, path in manifest.weights.items() if name == "unet"}) == 1
    for record in manifest.phases:
        batch = 1 if record.phase.unguided else 2
        assert {spec.shape[0] for spec in (*record.inputs, *record.outputs) if len(spec.shape) > 1} == {batch}
        assert (record.input(DEEP_FEATURES) is None) == (not record.phase.shallow)
        assert (record.output(DEEP_FEATURES) is None) == record.phase.shallow
    assert manifest.unguided_step is not None
    assert manifest.rule.reuse == Reuse(3)
    assert manifest.rule.guidance == StepRange(0, 0.6)


def another_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of the full evaluation before the last one."""
    evaluate, old = host_loop._evaluate, dict[str, Any]()

    def late(run: Any, state: Any, features: dict[str, Any]) -> Any:
        fresh = dict(features)
        output = evaluate(run, state, {**features, **old} if state.evaluation.shallow else fresh)
        if not state.evaluation.shallow:
            old.update(features or fresh)
            features.update(fresh)
        return output

    monkeypatch.setattr(host_loop, "_evaluate", late)


def negative_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong half of the conditioning where nothing is guided."""

    def first(whole: Conditioning, rows: int) -> Conditioning:
        return Conditioning({name: array[:rows] for name, array in whole.inputs.items()}, whole.channels)

    monkeypatch.setattr(Conditioning, "last", first)


def never_shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reuse, "shallow", lambda _self, phases, _computed: (False,) * len(phases))


def a_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = StepRange.first_and_end
    monkeypatch.setattr(
        StepRange, "first_and_end", lambda self, steps: (ends(self, steps)[0], ends(self, steps)[1] + 1)
    )


@pytest.mark.parametrize("fault", [another_steps, negative_prompts, never_shallow, a_step_later])
def test_what_is_not_as_recorded_fails_the_check(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    assert not all(verdict.ok for verdict in runs(bundle))


def test_features_that_are_not_the_references_fail_the_check(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full graph whose noise is right and whose features are not."""
    with open_bundle(bundle) as opened:
        session = type(opened.engine(opened.manifest.phases[0].phase))
    run = session.run

    def spoilt(self: Any, inputs: Any) -> Any:
        outputs = run(self, inputs)
        return {**outputs, **{name: outputs[name] * 1.01 for name in outputs if name == DEEP_FEATURES}}

    monkeypatch.setattr(session, "run", spoilt)
    wrong = {verdict.phase for verdict in check(bundle, runs=False).verdicts if not verdict.ok}
    assert wrong == {"strided", "windowed", "windowed-unguided"}


def test_verify_agrees_with_pytorch(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    assert verify(folder).ok


def test_a_picture_says_what_was_left_out_and_is_drawn_again(bundle: Path, tmp_path: Path) -> None:
    with open_bundle(bundle) as opened:
        pipeline = Pipeline(opened)
        for name, full in (("less.png", False), ("whole.png", True)):
            save_png(pipeline("a boat", steps=8, seed=1, full_run=full), tmp_path / name)
        less, whole = (read_parameters(tmp_path / name) for name in ("less.png", "whole.png"))
        assert less.facts["guided"] == [0.0, 0.6]
        assert less.facts["reuse"] == {"every": 3, "depth": 1}
        assert list(less.facts["phases"]) == ["strided", "windowed", "windowed-unguided"]
        assert not {"guided", "reuse"} & whole.facts.keys()
        assert list(whole.facts["phases"]) == ["strided", "windowed"]
        assert "full_run" not in settings_like(opened, less).settings
        assert settings_like(opened, whole).settings["full_run"] is True
        for parameters in (less, whole):
            assert settings_like(opened, parameters).warnings == ()
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = Manifest.read(copy)
    toy.seal(copy, replace(manifest, rule=replace(manifest.rule, guidance=StepRange(0, 0.5))))
    with open_bundle(copy) as opened:
        assert any("left out other work" in warning for warning in settings_like(opened, less).warnings)


def test_the_device_draws_what_the_host_draws(bundle: Path) -> None:
    found = []
    for loop in ("host", "device"):
        with open_bundle(bundle, loop=loop) as opened:
            found.append(np.asarray(Pipeline(opened)("a boat", steps=9, seed=2), np.int16))
    assert np.abs(found[0] - found[1]).max() <= 1


def test_diffusers_draws_the_full_run_that_quality_compares_with(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, rules = Recipe.from_dict(dict(Manifest.read(bundle).recipe)), list[PhaseRule]()
    pipe = diffusers_pipeline(recipe, "StableDiffusionPipeline", scheduler_of(recipe.family, "DDIMScheduler"))
    apply = apply_hidiffusion.apply_hidiffusion
    monkeypatch.setattr(contenders, "_load", lambda *_: pipe)

    def told(*args: Any, **options: Any) -> Any:
        rules.append(options["rule"])
        return apply(*args, **options)

    monkeypatch.setattr(apply_hidiffusion, "apply_hidiffusion", told)
    contender = contenders.DiffusersContender("diffusers", "", bundle, hidiffusion=True)
    (picture,) = contender.draw([contenders.Shot("a boat", 1, {"steps": 4})], lambda: None)
    assert picture.shape == (256, 256, 3)
    assert rules == [Manifest.read(bundle).rule.whole]


def test_plan_inspect_and_info_tell_it(bundle: Path) -> None:
    words = ["plan", "sd15-1024", "--set", "guidance_until=0.6", "--set", "reuse=3", "--steps", "50"]
    assert "windowed + unguided + shallow" in CliRunner(env={"COLUMNS": "160"}).invoke(main, words).output
    plan, plain = (
        json.loads(CliRunner().invoke(main, [*some, "--json"]).output) for some in (words, ["plan", "sd15-1024"])
    )
    counts = {cost["phase"]: cost["computed_steps"] for cost in plan["costs"]}
    assert counts == dict(zip(PHASES, (7, 13, 4, 6, 7, 13), strict=True))
    costs = {cost["phase"]: cost["tflops_evaluation"] for cost in plan["costs"]}
    assert costs["windowed-shallow"] == pytest.approx(0.075 * costs["windowed"], rel=0.01)
    assert costs["windowed-unguided"] == pytest.approx(costs["windowed"] / 2)
    assert plan["tflops"]["run"] < 0.4 * plain["tflops"]["run"]
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(bundle), "--json"]).output)
    shallow = next(phase for phase in inspected["phases"] if phase["phase"] == "windowed-shallow")
    assert shallow["steps"]["ranges"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("guidance_until=0.6", "guidance=false"), "is for recipes with guidance"),
        (("guidance_until=1.0",), "leaves no step without guidance"),
        (("guidance_until={start: 99.5%, end: 99.6%}", "steps=1-50"), "leaves no step guided"),
        (("guidance_until={start: 60%, end: 50%}",), "ends before it starts"),
        (("reuse=1",), "reuse"),
        (("reuse={every: 3, depth: 9}",), "has a depth that sd15 lacks"),
        (("reuse=3", "steps=1"), "reuses nothing in runs of one step"),
    ],
)
def test_settings_that_leave_nothing_out_or_are_not_there_are_refused(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load("tiny", changes)
