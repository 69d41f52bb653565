import pytest

from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.tolerances import TOLERANCES, Boundary, bound_for


def recipe(**changes: object) -> Recipe:
    return Recipe.from_dict({"family": "sd15", "source": "random:0", "width": 512, "height": 512, **changes})


def test_every_boundary_has_a_bound_with_a_reason_at_every_precision() -> None:
    assert set(TOLERANCES) == {(boundary, precision.value) for boundary in Boundary for precision in Precision}
    for (_, precision), bound in TOLERANCES.items():
        assert bound.snr_db >= (10 if Precision(precision).quantized else 25)
        assert len(bound.reason) > 40


def test_float32_keeps_what_the_project_promises() -> None:
    for boundary in Boundary:
        assert TOLERANCES[boundary, "float32"].snr_db >= (60 if boundary.whole_run else 80)


@pytest.mark.parametrize(
    ("boundary", "precision"),
    [
        (Boundary.WEIGHTS, Precision.FLOAT16),
        (Boundary.SAMPLER, Precision.INT8),
        (Boundary.VAE_DECODER, Precision.FLOAT16),
        (Boundary.RECORDED_VAE, Precision.FP8),
        (Boundary.TEXT, Precision.INT8),
        (Boundary.GRAPH, Precision.FP8),
        (Boundary.RUN, Precision.BFLOAT16),
        (Boundary.PICTURE, Precision.FLOAT32),
    ],
)
def test_a_recipe_without_bounds_of_its_own_is_judged_by_the_table(boundary: Boundary, precision: Precision) -> None:
    assert (
        bound_for(boundary, recipe(precision=precision.value, targets="cuda")) is TOLERANCES[boundary, precision.value]
    )


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_what_a_quantized_recipe_keeps_in_float16_is_judged_as_such(precision: Precision) -> None:
    own = recipe(precision=precision.value, parity={"call_snr_db": 11})
    for boundary in (Boundary.FLOAT16_GRAPH, Boundary.CONTROLNET, Boundary.CONTROLNET_GRAPH, Boundary.TEXT_GRAPH):
        assert bound_for(boundary, own) is TOLERANCES[boundary, "float16"]
    assert bound_for(Boundary.GRAPH, own).snr_db == 11


@pytest.mark.parametrize(
    ("graph", "engine"),
    [
        (Boundary.GRAPH, Boundary.RANDOM),
        (Boundary.GRAPH_RUN, Boundary.TRAJECTORY),
        (Boundary.CONTROLNET_GRAPH, Boundary.CONTROLNET),
        (Boundary.TEXT_GRAPH, Boundary.TEXT),
        (Boundary.VAE_DECODER_GRAPH, Boundary.VAE_DECODER),
        (Boundary.VAE_ENCODER_GRAPH, Boundary.VAE_ENCODER),
    ],
)
def test_a_graph_keeps_to_the_bound_of_its_engine(graph: Boundary, engine: Boundary) -> None:
    assert graph.is_graph
    assert not engine.is_graph
    for precision in Precision:
        assert TOLERANCES[graph, precision.value] == TOLERANCES[engine, precision.value]


def test_a_recipe_may_set_its_own_bounds_and_the_reason_says_so() -> None:
    own = recipe(parity={"call_snr_db": 101, "run_snr_db": 71})

    assert bound_for(Boundary.RANDOM, own).snr_db == 101
    assert bound_for(Boundary.RUN, own).snr_db == 71
    assert bound_for(Boundary.RANDOM, own).reason == "Set by the recipe in place of 80 dB."
    assert bound_for(Boundary.WEIGHTS, own) is TOLERANCES[Boundary.WEIGHTS, "float32"]
