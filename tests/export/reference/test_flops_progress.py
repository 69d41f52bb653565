from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hidiff_export.families.cost import unet_cost
from hidiff_export.families.family import default_scheduler
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.recipe import Recipe
from hidiff_export.reference import diffusers_run, reference
from hidiff_export.reference.evaluation_plan import RunSchedule
from hidiff_export.reference.flops_progress import FlopsProgress
from hidiff_runtime.phases import Phase, PhaseKind

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[PhaseKind]:
    """How often the geometry of each phase kind is computed."""
    counts: Counter[PhaseKind] = Counter()
    geometry_of = UNetGeometry.of

    def counted(config: Any, layout: Any, phase: Phase, *size: int) -> UNetGeometry:
        counts[phase.kind] += 1
        return geometry_of(config, layout, phase, *size)

    monkeypatch.setattr(UNetGeometry, "of", counted)
    return counts


@pytest.mark.parametrize("name", ["sd15-1024", "sdxl-2048", "sdxl-controlnet-2048"])
def test_choosing_and_counting_evaluations_computes_each_phase_once(name: str, computed: Counter[PhaseKind]) -> None:
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    _, config = default_scheduler(recipe.family)
    totals: list[float] = []
    meter = FlopsProgress(recipe, recipe.unet_config(), lambda _done, total, _note: totals.append(total))

    reference._evaluations(recipe, config, meter, controlled=False)
    phases = [point.phase for course in reference.courses(recipe, config) for point in course.points]
    meter.plan(phases)
    meter.end()

    assert computed == Counter(phase.kind for phase in dict.fromkeys(phases))
    assert len(phases) > 4000
    assert totals == [pytest.approx(sum(count * flops(recipe, phase) for phase, count in Counter(phases).items()))]


def flops(recipe: Recipe, phase: Phase) -> float:
    """Operations of one evaluation of the recipe's batch, without a meter."""
    config, size = recipe.unet_config(), (recipe.latent_height, recipe.latent_width)
    geometry = UNetGeometry.of(config, recipe.unet_layout, phase, *size)
    return recipe.model_batch * unet_cost(config, recipe.unet_layout, geometry).flops


def test_a_run_computes_the_windows_of_each_phase_once(computed: Counter[PhaseKind]) -> None:
    recipe = Recipe.load(RECIPES / "sdxl-2048.yaml")
    course = RunSchedule(recipe.phase_rule(), 50, tuple(float(step) for step in range(50)))

    class Unet:
        config = recipe.unet_config()

    windows = diffusers_run._windows(Unet(), recipe, course)

    assert computed == {phase.kind: 1 for phase in course.phases}
    size = (recipe.latent_height, recipe.latent_width)
    alone = (UNetGeometry.of(Unet.config, recipe.unet_layout, point.phase, *size) for point in course.points)
    assert windows == [geometry.windows for geometry in alone]
    assert len(set(windows)) > 1
