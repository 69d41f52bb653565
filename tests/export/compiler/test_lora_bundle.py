"""LoRA files in a build: recipe and command line, the weights stage, its key, and the weights that verify expects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.cli.options import lora_setting
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.compiler.stages.weights import WeightsStage, checkpoints
from hidiff_export.errors import CheckpointError, InputError, RecipeError
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.recipe import Recipe
from hidiff_export.reference.reference_weights import compare_weights, unet_of_source
from tests.loras import bare_peft, factors, kohya

SMALL = ("width=64", "height=64", "vae=false", "steps=3")
SOME = r"mid_block.*attn1\.to_q|layers\.0\.mlp"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return kohya(factors(Family.SD15, rank=2, seed=0, only=SOME), tmp_path / "style: a.safetensors", alpha=1.0)


def recipe_with(*loras: str, **settings: str) -> Recipe:
    return Recipe.load("tiny", (*SMALL, *lora_setting(loras), *(f"{key}={value}" for key, value in settings.items())))


def ignore(_done: float, _total: float, _note: str) -> None:
    """Reports to nobody."""


def test_the_command_line_names_files_and_scales(lora: Path) -> None:
    recipe = recipe_with(f"{lora}:0.5", str(lora))
    assert [(entry.path, entry.scale) for entry in recipe.lora] == [(str(lora), 0.5), (str(lora), 1.0)]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.fingerprint() != recipe_with(f"{lora}:0.6", str(lora)).fingerprint()


@pytest.mark.parametrize("text", ["style.safetensors:strong", "style.safetensors:"])
def test_a_scale_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InputError) as refused:
        lora_setting([text])
    assert refused.value.given == text


@pytest.mark.parametrize(
    ("text", "word"),
    [("style.ckpt:1", "pickle"), ("style.bin", "pickle"), ("folder", "safetensors"), ("a.safetensors:nan", "scale")],
)
def test_a_recipe_refuses_other_files_and_scales(text: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        recipe_with(text)


def test_the_weight_stores_hold_the_sums(lora: Path, tmp_path: Path) -> None:
    recipe = recipe_with(f"{lora}:0.5", precision="float16")
    context = StageContext(recipe, tmp_path / "bundle")
    WeightsStage().run(context, ignore)
    given = factors(Family.SD15, rank=2, seed=0, only=SOME)
    for part in (Component.UNET, Component.TEXT_ENCODER):
        stored = WeightStore.open(context.folder / part.value / "weights.safetensors").state_dict()
        base = load(part, "random:0", Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY).state_dict
        changed = {f"{module}.weight": pair for (owner, module), pair in given.items() if owner is part}
        assert changed
        for name, value in stored.items():
            expected = base[name]
            if name in changed:
                down, up = changed[name]
                expected = expected + 0.5 * (1.0 / 2) * up @ down
            assert torch.equal(value, expected.to(torch.float16)), name
    # What `verify --against` expects is the same sum; without the LoRA, or at another scale, it is not.
    store = context.unet / "weights.safetensors"
    for other, ok in (
        (recipe, True),
        (recipe_with(precision="float16"), False),
        (recipe_with(f"{lora}:0.6", precision="float16"), False),
    ):
        verdict = compare_weights("unet", unet_of_source("random:0", other).state_dict(), store, other)
        assert verdict.ok is ok


def test_the_key_of_the_weights_holds_content_and_scale(lora: Path, tmp_path: Path) -> None:
    def key(recipe: Recipe) -> str:
        return json.dumps(WeightsStage().inputs(StageContext(recipe, tmp_path)))

    first = key(recipe_with(f"{lora}:0.5"))
    assert first != key(recipe_with(f"{lora}:0.6"))
    assert first != key(recipe_with())
    moved = lora.rename(tmp_path / "moved.safetensors")
    assert first == key(recipe_with(f"{moved}:0.5"))
    kohya(factors(Family.SD15, rank=2, seed=1, only=SOME), moved, alpha=1.0)
    assert first != key(recipe_with(f"{moved}:0.5"))


def test_the_key_of_the_weights_holds_the_settings_beside_a_lora(tmp_path: Path) -> None:
    path = bare_peft(factors(Family.SD15, rank=2, seed=0, only=r"mid_block.*attn1"), tmp_path / "adapter.safetensors")
    keys = set()
    for alpha in (None, 4, 8):
        if alpha is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha, "r": 2}))
        keys.add(json.dumps(WeightsStage().inputs(StageContext(recipe_with(str(path)), tmp_path / "bundle"))))
    assert len(keys) == 3


def test_a_build_tells_what_a_lora_is_taken_for(tmp_path: Path) -> None:
    """Whose settings are not beside it, and so are not obeyed."""
    path = bare_peft(factors(Family.SD15, rank=2, seed=0, only=r"mid_block.*attn1"), tmp_path / "adapter.safetensors")
    told: list[str] = []
    WeightsStage().run(StageContext(recipe_with(str(path)), tmp_path / "bundle", notice=told.append), ignore)
    assert [text for text in told if "adapter_config.json is not beside it" in text]


def test_nothing_is_written_for_a_lora_that_does_not_fit(tmp_path: Path) -> None:
    given = factors(Family.SDXL, rank=2, seed=0, only=r"(down|mid)_block.*attn1\.to_q")
    other = kohya(given, tmp_path / "other.safetensors", alpha=1.0, sgm=True)
    context = StageContext(recipe_with(str(other)), tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="not for sd15"):
        WeightsStage().run(context, ignore)
    assert not context.folder.exists()


def test_a_lora_for_text_encoders_alone_is_refused_where_there_are_none(tmp_path: Path) -> None:
    path = kohya(factors(Family.SD15, rank=2, seed=0, only=r"layers\.0"), tmp_path / "text.safetensors", alpha=1.0)
    with pytest.raises(CheckpointError, match="changes nothing"):
        checkpoints(recipe_with(str(path), text="false"))
    assert checkpoints(recipe_with(str(path)))
