"""Recipes: defaults are filled in, and everything derived follows from the values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hidiff_export.errors import RecipeError
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.families.hidiffusion_rules import Layout, phase_rule
from hidiff_export.recipe import Recipe, shipped_recipes
from hidiff_export.recipe.field_types import BackendName, Precision, SamplerName, Target
from hidiff_export.scheduler_tables.names import SAMPLERS
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.phases import PhaseRule, StepRange

SHIPPED = shipped_recipes()
LEAST: dict[str, Any] = {"family": "sdxl", "source": "random:0", "width": 2048, "height": 1024}


def _recipe(**values: object) -> Recipe:
    return Recipe.from_dict(LEAST | values)


def test_a_recipe_can_name_every_sampler_there_is() -> None:
    assert {name.value for name in SamplerName} == set(SAMPLERS)


def test_defaults() -> None:
    recipe = _recipe()
    assert recipe.task is Task.TEXT_TO_IMAGE
    assert recipe.guidance
    assert recipe.precision is Precision.FLOAT32
    assert recipe.sampler == (SamplerName.DDIM,)
    assert recipe.steps == tuple(range(1, 101))
    assert recipe.phase_rule() == phase_rule(Family.SDXL, Task.TEXT_TO_IMAGE, 2048, 1024)


def test_a_backend_may_be_written_alone_as_older_manifests_do() -> None:
    recipe = _recipe(backend="onnxruntime", targets=["cpu"])
    assert recipe.backend == (BackendName.ONNXRUNTIME,)
    assert recipe == _recipe()


def test_the_layout_that_is_left_may_be_written_as_older_recipes_do() -> None:
    assert _recipe(layout="per-phase") == _recipe()
    assert _recipe(layout="per-phase").fingerprint() == _recipe().fingerprint()


@pytest.mark.parametrize(
    ("backends", "targets"),
    [
        (["onnxruntime"], ["cpu"]),
        (["openvino"], ["cpu"]),
        (["openvino", "onnxruntime"], ["cpu"]),
        (["tensorrt"], ["cuda"]),
        (["tensorrt-rtx"], ["sm89", "sm120"]),
        (["onnxruntime", "tensorrt"], ["cpu", "cuda"]),
        (["tensorrt-rtx", "onnxruntime"], ["sm89", "sm120", "cpu"]),
    ],
)
def test_default_targets_follow_the_backends(backends: list[str], targets: list[str]) -> None:
    assert [target.value for target in _recipe(backend=backends).targets] == targets


def test_each_backend_builds_for_its_own_targets() -> None:
    given = (Target.CPU, Target.CUDA, Target.SM89)
    assert BackendName.ONNXRUNTIME.targets(given) == (Target.CPU, Target.CUDA)
    assert BackendName.OPENVINO.targets(given) == (Target.CPU,)
    assert BackendName.TENSORRT.targets(given) == (Target.CUDA,)
    assert BackendName.TENSORRT_RTX.targets(given) == (Target.SM89,)
    assert BackendName.TENSORRT_RTX.targets(given[:2]) == (Target.CUDA,)


@pytest.mark.parametrize(
    ("precision", "call", "run"),
    [("float32", 80, 60), ("float16", 40, 35), ("bfloat16", 25, 25), ("int8", 20, 15), ("fp8", 15, 10)],
)
def test_bounds_follow_the_precision_unless_given(precision: str, call: float, run: float) -> None:
    parity = _recipe(precision=precision, targets="cuda").parity
    assert (parity.call_snr_db, parity.run_snr_db) == (call, run)
    parity = _recipe(precision=precision, targets="cuda", parity={"run_snr_db": 50}).parity
    assert (parity.call_snr_db, parity.run_snr_db) == (call, 50)


def test_sizes_follow_from_the_picture_and_the_batch() -> None:
    recipe = _recipe(batch=3)
    assert (recipe.latent_height, recipe.latent_width) == (128, 256)
    assert recipe.latent_shape == (4, 128, 256)
    assert recipe.model_batch == 6
    assert _recipe(batch=3, guidance=False).model_batch == 3


def test_a_run_of_more_pixels_than_a_bundle_may_have_is_refused_before_it_is_built() -> None:
    assert _recipe(width=4096, height=4096, batch=4).batch == 4
    assert _recipe(width=8192, height=8192, batch=1).width == 8192
    with pytest.raises(RecipeError) as refused:
        _recipe(width=4096, height=4096, batch=5)
    assert "`batch` is too many pictures of 4096x4096 for one run" in str(refused.value)
    assert "Set batch: 4 or less" in str(refused.value)


def test_the_unet_of_an_inpainting_recipe_sees_nine_channels() -> None:
    assert _recipe(task="inpainting").unet_config()["in_channels"] == 9


def test_tiny_reaches_both_networks() -> None:
    recipe = _recipe(unet_width="tiny", task="controlnet", controlnet="random:1")
    assert recipe.unet_config()["block_out_channels"] == recipe.controlnet_config()["block_out_channels"]
    assert recipe.unet_config()["block_out_channels"] != _recipe().unet_config()["block_out_channels"]


def test_the_demo_models_width_is_sd15s_alone() -> None:
    recipe = _recipe(family="sd15", unet_width="demo", source="./training/model")
    assert recipe.unet_config()["cross_attention_dim"] == 96
    with pytest.raises(RecipeError) as refused:
        _recipe(family="sd21", unet_width="demo", source="./training/model")
    assert "`unet_width` is not there for the family sd21" in str(refused.value)
    assert "full or tiny" in str(refused.value)


@pytest.mark.parametrize(("source", "seed"), [("random:7", 7), ("org/model", None), ("./random", None)])
def test_only_fabricated_checkpoints_have_a_seed(source: str, seed: int | None) -> None:
    assert _recipe(source=source).random_seed == seed


def test_switches_reach_the_rule_and_the_layout() -> None:
    both, bare = _recipe(), _recipe(hidiffusion={"raunet": False, "windows": False})
    assert both.unet_layout == Layout.of(Family.SDXL)
    assert bare.unet_layout == Layout.of(Family.SDXL).without_windows()
    assert bare.phase_rule() == PhaseRule()


def test_raunet_off_leaves_control_on() -> None:
    recipe = _recipe(task="controlnet", hidiffusion={"raunet": False})
    assert recipe.phase_rule() == PhaseRule(control=0.6)


@pytest.mark.parametrize(
    "pooled", [0.4, "40%", "40 %", {"end": 0.4}, {"start": 0, "end": "40%"}, {"start": "0%", "end": 0.4}]
)
def test_thresholds_are_ratios_or_ranges_or_percentages(pooled: object) -> None:
    recipe = _recipe(hidiffusion={"thresholds": {"pooled": pooled}})
    assert recipe.phase_rule() == PhaseRule(pooled=StepRange(0, 0.4))


def test_percentages_are_the_published_ratios() -> None:
    thresholds = {"strided": "16%", "pooled": {"start": "16%", "end": "40%"}}
    assert _recipe(hidiffusion={"thresholds": thresholds}).phase_rule() == _recipe().phase_rule()


def test_explicit_thresholds_keep_the_published_end_of_control_unless_given() -> None:
    for thresholds, end in (({"pooled": 0.4}, 0.6), ({"control": "80%"}, 0.8)):
        recipe = _recipe(task="controlnet", hidiffusion={"thresholds": thresholds})
        assert recipe.phase_rule().control == end


@pytest.mark.parametrize(
    ("written", "counts", "stored"),
    [
        (20, (20,), 20),
        ("1-4", (1, 2, 3, 4), "1-4"),
        (["1-2", 8, 3], (1, 2, 3, 8), ["1-3", 8]),
        ("5-5", (5,), 5),
    ],
)
def test_step_counts(written: object, counts: tuple[int, ...], stored: object) -> None:
    recipe = _recipe(steps=written)
    assert recipe.steps == counts
    assert recipe.to_dict()["steps"] == stored


@pytest.mark.parametrize("name", SHIPPED)
def test_a_stored_recipe_reads_back_as_itself(name: str) -> None:
    recipe = Recipe.load(name)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_the_fingerprint_is_of_the_meaning_not_the_spelling(tmp_path: Path) -> None:
    spelled = tmp_path / "spelled out.yaml"
    spelled.write_text(
        "height: 2048\nsteps: [1-50, 51-100]\nfamily: sdxl\nwidth: 2048\nguidance: on\n"
        "source: random:0\nhidiffusion: {thresholds: published}\n"
    )
    short = _recipe(height=2048)
    assert Recipe.load(spelled).fingerprint() == short.fingerprint()
    assert Recipe.load(spelled).name == "spelled-out"
    assert _recipe(height=2048, batch=2).fingerprint() != short.fingerprint()


def test_a_recipe_does_not_change() -> None:
    recipe = _recipe()
    with pytest.raises(ValidationError):
        recipe.width = 1024  # type: ignore[misc]


def test_overrides_replace_values() -> None:
    recipe = Recipe.load(
        "sdxl-2048",
        ["width=1024", "hidiffusion.windows=false", "source=./a #1: b", "steps=[4, 8-9]", "parity.call_snr_db=70"],
    )
    assert recipe.width == 1024
    assert not recipe.hidiffusion.windows
    assert recipe.hidiffusion.raunet
    assert recipe.source == "./a #1: b"
    assert recipe.steps == (4, 8, 9)
    assert recipe.parity.call_snr_db == 70


def test_an_override_opens_what_was_a_word() -> None:
    recipe = Recipe.load("sdxl-2048", ["hidiffusion.thresholds=published", "hidiffusion.thresholds.pooled=50%"])
    assert recipe.phase_rule() == PhaseRule(pooled=StepRange(0, 0.5))


def test_a_rescale_that_is_left_out_leaves_recipes_as_they_were() -> None:
    plain = _recipe()
    assert "guidance_rescale" not in plain.to_dict()
    assert "forecast" not in plain.to_dict()
    rescaled = _recipe(guidance_rescale=0.7)
    assert rescaled.to_dict()["guidance_rescale"] == 0.7
    assert rescaled.fingerprint() != plain.fingerprint()
    assert _recipe(guidance_rescale=0.0, guidance=False).guidance_rescale == 0.0


def test_the_demo_model_is_a_source_whose_width_follows() -> None:
    assert _recipe(family="sd15", source="demo").unet_width is Width.DEMO
    assert Recipe.load("sd15-1024", ["source=demo"]).unet_width is Width.DEMO
    assert _recipe(family="sd15", source="./demo").unet_width is Width.FULL


@pytest.mark.parametrize(
    ("changes", "key", "told"),
    [
        ({"family": "sdxl"}, "source", "Set family: sd15"),
        ({"unet_width": "full"}, "unet_width", "Leave unet_width out"),
        ({"unet_width": "tiny"}, "unet_width", "Leave unet_width out"),
        ({"task": "inpainting"}, "task", "image-to-image"),
    ],
)
def test_what_the_demo_model_is_not_is_refused(changes: dict[str, str], key: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _recipe(**{"family": "sd15", "source": "demo", **changes})
    assert f"`{key}`" in caught.value.summary
    assert told in caught.value.advice


def test_example_prompts_are_texts_and_not_many() -> None:
    assert _recipe(example_prompts=["a cat", " an owl "]).example_prompts == ("a cat", "an owl")
    for wrong in (["a"] * 13, [""], [3], "a cat"):
        with pytest.raises(RecipeError):
            _recipe(example_prompts=wrong)


@pytest.mark.parametrize(
    ("written", "due"),
    [
        ("true", Forecast()),
        ("{}", Forecast()),
        ("{warm_up: 5, growth: 0.75, last: 20%}", Forecast(warm_up=5, growth=0.75, last=0.2)),
        ("false", None),
        ("null", None),
    ],
)
def test_forecast_is_a_switch_or_a_mapping(written: str, due: Forecast | None) -> None:
    recipe = Recipe.load("sd15-1024", ["source=random:0", f"forecast={written}"])
    assert (None if recipe.forecast is None else recipe.forecast.record()) == due
    assert Recipe.from_dict(recipe.to_dict()) == recipe
