"""Several sizes and batches in one recipe: what they come to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hidiff_export.errors import RecipeError
from hidiff_export.recipe import Recipe

BASE = {key: value for key, value in Recipe.load("tiny").to_dict().items() if key not in ("width", "height", "batch")}


def recipe(**values: Any) -> Recipe:
    return Recipe.from_dict({**BASE, **values})


def test_every_batch_of_every_size_is_a_bucket() -> None:
    found = recipe(sizes=["128x128", "192x128"], batches=[1, 4], also=["64x64x2"])
    assert found.shapes == ((128, 128, 1), (192, 128, 1), (128, 128, 4), (192, 128, 4), (64, 64, 2))
    assert (found.width, found.height, found.batch) == (128, 128, 1)
    assert [(one.width, one.height, one.batch) for one in found.buckets] == list(found.shapes)
    assert Recipe.from_dict(found.to_dict()) == found
    assert found.to_dict()["sizes"] == ["128x128", "192x128"]
    assert found.to_dict()["also"] == ["64x64x2"]


def test_a_bucket_is_the_recipe_of_its_size_alone() -> None:
    found = recipe(sizes=["128x128", "192x128"])
    assert found.buckets[1] == recipe(width=192, height=128)
    assert found.buckets[1].fingerprint() == recipe(width=192, height=128).fingerprint()
    assert recipe(width=192, height=128).buckets == (recipe(width=192, height=128),)


def test_shapes_given_one_by_one() -> None:
    found = recipe(sizes=["128x128", "192x128"]).of_shapes([(128, 128, 1), (64, 64, 4)])
    assert found.shapes == ((128, 128, 1), (64, 64, 4))
    assert found.sizes is None
    assert Recipe.from_dict(found.to_dict()).shapes == found.shapes


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sizes": []}, "`sizes` should name at least one"),
        ({"sizes": ["128x130"]}, "`sizes.0` should have sides that are multiples of 8"),
        ({"sizes": ["128x128", "wide"]}, "`sizes.1` should be a size"),
        ({"sizes": ["128x128", "128x128"]}, "`sizes` names one thing twice"),
        ({"sizes": ["128x128"], "width": 192, "height": 128}, "`sizes` begins with another size"),
        ({"sizes": ["128x128"], "batches": [0]}, "`batches.0` should be greater"),
        ({"sizes": ["128x128"], "batches": [2], "batch": 1}, "`batches` begins with another batch"),
        ({"sizes": ["128x128", "4096x4096"], "batches": [1, 64]}, "`batches` is too many pictures"),
        ({"sizes": ["128x128"], "also": ["128x128"]}, "`also.0` should be a size and a batch"),
        ({"sizes": ["128x128"], "also": ["128x128x0"]}, "`also.0` should be a size and a batch"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(**values)


def test_a_list_takes_the_place_of_a_single_value_and_the_other_way_round(tmp_path: Path) -> None:
    assert Recipe.load("tiny", ["sizes=[128x128, 192x128]", "batches=[2, 1]"]).shapes[0] == (128, 128, 2)
    path = tmp_path / "several.yaml"
    path.write_text("family: sd15\nsource: random:0\nsizes: [512x512, 768x512]\n")
    assert Recipe.load(path).shapes == ((512, 512, 1), (768, 512, 1))
    assert Recipe.load(path, ["width=640", "height=512"]).shapes == ((640, 512, 1),)
