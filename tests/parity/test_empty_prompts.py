"""SDXL without a negative prompt, as diffusers draws it where the checkpoint wants no zeros."""

from __future__ import annotations

from pathlib import Path

import pytest

from hidiff_export.checkpoints import model_index
from hidiff_export.reference.reference_weights import compare_model_index
from hidiff_runtime.format.manifest import Manifest
from tests.parity.pictures import Picture, diffusers_pipeline, expected, generated, module_bundle, opened
from tests.parity.test_pictures import ASKED, BOUND, XL, XL_STEPS, assert_alike, recipe, snr_db

RECIPE = recipe("sdxl")
ASKED_ALONE = {name: value for name, value in ASKED.items() if name != "negative_prompt"} | {"steps": XL_STEPS}


def reference(*, zeros: bool) -> Picture:
    pipe = diffusers_pipeline(RECIPE, XL)
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    return expected(pipe, RECIPE, ASKED_ALONE)


@pytest.mark.parametrize("zeros", [True, False])
def test_a_missing_negative_prompt_is_what_the_checkpoint_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zeros: bool
) -> None:
    index = {"_class_name": XL, "force_zeros_for_empty_prompt": zeros}
    monkeypatch.setattr(model_index, "find_model_index", lambda _source: index)
    folder = module_bundle(RECIPE, tmp_path / "bundle")
    assert Manifest.read(folder).force_zeros_for_empty_prompt == zeros
    with opened(folder, RECIPE) as pipe:
        found = generated(pipe, **ASKED_ALONE)
        empty = generated(pipe, **ASKED_ALONE, negative_prompt="")
    recorded = Manifest.read(folder)
    for said in (True, False):
        index["force_zeros_for_empty_prompt"] = said
        assert compare_model_index(RECIPE.source, recorded, RECIPE).ok == (said == zeros)
    assert_alike(reference(zeros=zeros), found)
    assert snr_db(reference(zeros=not zeros), found) < BOUND
    assert_alike(reference(zeros=False), empty)
