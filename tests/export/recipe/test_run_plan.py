"""The plan: phases of the published table, sizes, and sums that add up."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from hidiff_export.errors import InputError
from hidiff_export.recipe import Recipe, shipped_recipes
from hidiff_export.recipe.run_plan import RunPlan, default_steps

# Phases in running order with their steps in runs of 50, 30, 20 and 4; c is for ControlNet residuals.
S4, P, S4P, V = "strided", "pooled", "strided_pooled", "windowed"
S4C, PC, S4PC, VC = (f"{kind}-control" for kind in (S4, P, S4P, V))
RUNS = (50, 30, 20, 4)
SIMPLE = {S4: (20, 12, 8, 1), V: (30, 18, 12, 3)}
SD_EXTREME = {S4P: (15, 9, 6, 1), S4: (20, 12, 8, 1), V: (15, 9, 6, 2)}
SDXL_USUAL = {S4: (8, 4, 3, 0), P: (12, 8, 5, 1), V: (30, 18, 12, 3)}
SDXL_EXTREME = {S4P: (15, 9, 6, 1), P: (20, 12, 8, 1), V: (15, 9, 6, 2)}
POOLED_ONLY = {P: (20, 12, 8, 1), V: (30, 18, 12, 3)}
TURBO = {P: (25, 15, 10, 2), V: (25, 15, 10, 2)}
CONTROL = {S4C: (8, 4, 3, 0), PC: (17, 11, 7, 2), VC: (5, 3, 2, 1), V: (20, 12, 8, 1)}
CONTROL_IMG2IMG = {S4C: (8, 4, 3, 0), PC: (12, 8, 5, 1), VC: (10, 6, 4, 2), V: (20, 12, 8, 1)}
# A run of 4 steps is the odd one: residuals last until 2.4 steps, pooling until 2.
CONTROL_EXTREME = {S4PC: (15, 9, 6, 1), PC: (15, 9, 6, 1), VC: (0, 0, 0, 1), P: (5, 3, 2, 0), V: (15, 9, 6, 1)}
# The package has no ControlNet for these; the ranges are theirs without one, and residuals last as long as SDXL's.
SD_CONTROL = {S4C: (20, 12, 8, 1), VC: (10, 6, 4, 2), V: (20, 12, 8, 1)}
SD_CONTROL_EXTREME = {S4PC: (15, 9, 6, 1), S4C: (15, 9, 6, 1), VC: (0, 0, 0, 1), S4: (5, 3, 2, 0), V: (15, 9, 6, 1)}

TABLE = [
    ("sd15-1024", (), SIMPLE),
    ("sd15-1536x1024", (), SIMPLE),
    ("sd15-1024", ("width=4096",), SIMPLE),
    ("sd15-1024", ("task=inpainting",), SIMPLE),
    ("sd15-2048", (), SD_EXTREME),
    ("sd15-2048", ("width=2040",), SIMPLE),
    ("sd21-1024", (), SIMPLE),
    ("sd21-2048", (), SD_EXTREME),
    ("sdxl-2048", (), SDXL_USUAL),
    ("sdxl-2048", ("task=image-to-image",), SDXL_USUAL),
    ("sdxl-2048x1536", (), SDXL_USUAL),
    ("sdxl-4096", (), SDXL_EXTREME),
    ("sdxl-4096", ("height=4088",), SDXL_USUAL),
    ("sdxl-inpainting-2048", (), POOLED_ONLY),
    ("sdxl-inpainting-2048", ("width=4096", "height=4096"), SDXL_EXTREME),
    ("playground-2048", (), POOLED_ONLY),
    ("playground-2048", ("width=4096", "height=4096"), SDXL_EXTREME),
    ("sdxl-turbo-1024", (), TURBO),
    ("sdxl-turbo-1024", ("width=4096", "height=4096"), TURBO),
    ("sd15-controlnet-1024", (), SD_CONTROL),
    ("sd15-controlnet-1024", ("width=2048", "height=2048"), SD_CONTROL_EXTREME),
    ("sd15-controlnet-1024", ("width=2048", "height=2040"), SD_CONTROL),
    ("sd15-controlnet-img2img-1024", (), SD_CONTROL),
    ("sd21-controlnet-1024", (), SD_CONTROL),
    ("sd21-controlnet-1024", ("width=3072", "height=2048"), SD_CONTROL_EXTREME),
    ("sdxl-controlnet-2048", (), CONTROL),
    ("sdxl-controlnet-2048", ("width=4096", "height=4096"), CONTROL_EXTREME),
    ("sdxl-controlnet-img2img-2048", (), CONTROL_IMG2IMG),
    ("sdxl-controlnet-img2img-2048", ("width=4096", "height=4096"), CONTROL_EXTREME),
]


@pytest.mark.parametrize(("name", "overrides", "phases"), TABLE)
def test_phases_are_the_published_tables(
    name: str, overrides: tuple[str, ...], phases: dict[str, tuple[int, ...]]
) -> None:
    recipe = Recipe.load(name, overrides)
    for column, steps in enumerate(RUNS):
        expected = [(phase, counts[column]) for phase, counts in phases.items() if counts[column]]
        assert [(p.span.phase.name, p.span.steps) for p in RunPlan(recipe, steps).phases] == expected


@pytest.mark.parametrize("name", shipped_recipes())
def test_spans_cover_the_run_without_gaps(name: str) -> None:
    recipe = Recipe.load(name)
    for steps in (1, 2, 3, 5, 7, 50, 200):
        phases = RunPlan(recipe, steps).to_json()["phases"]
        assert phases[0]["first"] == 0
        assert phases[-1]["last"] == steps - 1
        assert all(after["first"] == before["last"] + 1 for before, after in pairwise(phases))
        assert all(phase["steps"] == phase["last"] - phase["first"] + 1 >= 1 for phase in phases)


def test_json_has_the_documented_form() -> None:
    plan = json.loads(json.dumps(RunPlan(Recipe.load("sdxl-2048"), 50).to_json()))
    expected = {
        "family": "sdxl",
        "width": 2048,
        "height": 2048,
        "steps": 50,
        "phases": [
            {"kind": "strided", "control": False, "unguided": False, "first": 0, "last": 7, "steps": 8},
            {"kind": "pooled", "control": False, "unguided": False, "first": 8, "last": 19, "steps": 12},
            {"kind": "windowed", "control": False, "unguided": False, "first": 20, "last": 49, "steps": 30},
        ],
    }
    assert {key: plan[key] for key in expected} == expected
    assert [cost["phase"] for cost in plan["costs"]] == ["strided", "pooled", "windowed"]


@pytest.mark.parametrize(
    ("name", "saving"), [("sd15-1024", 1.70), ("sd15-2048", 2.84), ("sdxl-2048", 1.56), ("sdxl-4096", 3.09)]
)
def test_the_saving_is_the_published_one(name: str, saving: float) -> None:
    assert round(RunPlan(Recipe.load(name), 50).saving, 2) == saving


def test_costs_add_up() -> None:
    plan = RunPlan(Recipe.load("sdxl-2048", ["batch=3"]), 50)
    costs = plan.to_json()["costs"]
    assert plan.run_flops == sum(phase.flops * 6 * phase.span.steps for phase in plan.phases)
    assert sum(cost["tflops_run"] for cost in costs) == pytest.approx(plan.to_json()["tflops"]["run"])


@pytest.mark.parametrize(
    "names",
    [
        ("sdxl-controlnet-img2img-2048", "sdxl-2048"),
        ("sd15-controlnet-1024", "sd15-1024"),
        ("sd21-controlnet-1024", "sd21-1024"),
    ],
)
def test_a_controlnet_costs_only_where_it_joins_in(names: tuple[str, str]) -> None:
    plan, without = (RunPlan(Recipe.load(name), 50) for name in names)
    assert plan.controlnet.flops > 0
    expected = without.run_flops + 30 * plan.recipe.model_batch * plan.controlnet.flops
    assert plan.run_flops == expected


def test_residuals_from_outside_cost_nothing_here() -> None:
    values = Recipe.load("sdxl-controlnet-2048").to_dict()
    del values["controlnet"]
    plan = RunPlan(Recipe.from_dict(values), 50)
    assert (plan.controlnet.flops, plan.controlnet.parameters) == (0, 0)


def test_weights_and_latents() -> None:
    plan = RunPlan(Recipe.load("sdxl-controlnet-2048", ["batch=2"]), 50)
    assert plan.weight_bytes == 2 * (2_567_463_684 + 1_251_014_160)
    assert plan.latent_bytes == 2 * 4 * 256 * 256 * 4


def test_sizes_inside_a_phase() -> None:
    strided, pooled, windowed = RunPlan(Recipe.load("sdxl-2048"), 50).phases
    assert strided.feature_sizes == ((256, 256), (128, 128), (32, 32))
    assert pooled.feature_sizes == ((256, 256), (128, 128), (64, 64), (32, 32))
    assert windowed.feature_sizes == ((256, 256), (128, 128), (64, 64))
    sides = [window.window[0] for window in pooled.geometry.windows]
    assert sides == [64, 64, 32, 32, 32, 32, 32, 32, 64, 64]


def test_without_hidiffusion_one_phase_costs_what_the_stock_unet_does() -> None:
    recipe = Recipe.load("sdxl-2048", ["hidiffusion.raunet=false", "hidiffusion.windows=false"])
    plan = RunPlan(recipe, 50)
    (phase,) = plan.phases
    assert phase.flops == plan.stock.flops
    assert plan.saving == 1


@pytest.mark.parametrize(("steps", "shown"), [("1-100", 50), ("1-8", 8), ("[4, 60]", 60)])
def test_default_steps(steps: str, shown: int) -> None:
    assert default_steps(Recipe.load("demo", [f"steps={steps}"])) == shown


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_has_a_step(steps: int) -> None:
    with pytest.raises(InputError):
        _ = RunPlan(Recipe.load("demo"), steps).phases
