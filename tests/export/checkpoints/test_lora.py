"""LoRA files: every layer finds its weight and its factor under every way of naming, and gets its sum."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint, load
from hidiff_export.checkpoints.lora import Lora, Pair, fuse, read_lora, settings_fingerprint
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width
from tests import loras
from tests.loras import Alphas, Factors, Layer, factors, kohya, networks, peft, save, summed

ROUNDING = 2e-6
"""Of weights of order one, added to in float32 where the definition is computed in float64."""

SOME = r"^(conv_in|down_blocks\.1|mid_block|up_blocks\.[02].*(\.2|samplers)\.)|layers\.[01]"
"""Every kind of layer, each side of the UNet and the upsamplers that differ by family."""

ATTENTION = r"mid_block.*attn\d\.to_|layers\.1\.self_attn"
UNET_ALONE = r"^(down|mid|up)_block"


def read(path: Path, family: Family = Family.SD15, scale: float = 1.0) -> Lora:
    return read_lora(path, scale, family, Task.TEXT_TO_IMAGE, Width.TINY)


Writer = Callable[[Factors, Path, Alphas, Family], Path]


def _first_up(family: Family) -> int:
    """The upsampler's place in the first block up: beside a residual block alone, or an attention too."""
    return 2 if family is Family.SDXL else 1


FORMS: Mapping[str, tuple[Writer, str]] = {
    "kohya": (lambda made, path, alpha, family: kohya(made, path, alpha=alpha, sgm=family is Family.SDXL), SOME),
    "kohya-diffusers-names": (lambda made, path, alpha, _: kohya(made, path, alpha=alpha), SOME),
    "kohya-dotted": (
        lambda made, path, alpha, family: loras.dotted_kohya(made, path, alpha=alpha, first_up=_first_up(family)),
        SOME,
    ),
    "lycoris": (lambda made, path, alpha, _: loras.lycoris(made, path, alpha=alpha), UNET_ALONE),
    "onetrainer": (lambda made, path, alpha, _: loras.one_trainer(made, path, alpha=alpha), SOME),
    "onetrainer-original": (
        lambda made, path, alpha, family: loras.original(made, path, alpha=alpha, first_up=_first_up(family)),
        UNET_ALONE,
    ),
    "onetrainer-comfyui": (
        lambda made, path, alpha, family: loras.comfy(made, path, alpha=alpha, first_up=_first_up(family)),
        SOME,
    ),
    "diffusers": (lambda made, path, alpha, _: peft(made, path, alpha=alpha), SOME),
    "diffusers-base-model": (
        lambda made, path, alpha, _: peft(made, path, alpha=alpha, prefix="base_model.model."),
        SOME,
    ),
    "peft": (lambda made, path, alpha, _: loras.bare_peft(made, path, alpha=alpha), UNET_ALONE),
    "peft-adapter": (
        lambda made, path, alpha, _: loras.bare_peft(made, path, alpha=alpha, adapter=".style"),
        UNET_ALONE,
    ),
    "diffusers-0.14": (lambda made, path, alpha, _: loras.old_diffusers(made, path, alpha=alpha), ATTENTION),
    "diffusers-0.22": (lambda made, path, alpha, _: loras.later_diffusers(made, path, alpha=alpha), SOME),
}
"""How each writer names layers, and the layers that it can name."""


def _mixed(made: Factors) -> dict[Layer, float]:
    """An alpha for two layers of three, each its own."""
    return {layer: 0.5 + index % 7 for index, layer in enumerate(made) if index % 3}


@cache
def _base(family: Family) -> Mapping[Layer, torch.Tensor]:
    networks_of = {part: load(part, "random:0", family, Task.TEXT_TO_IMAGE, Width.TINY) for part in networks(family)}
    return {(part, name): own.state_dict[name] for part, own in networks_of.items() for name in own.state_dict}


def _fused(family: Family, lora: Lora) -> dict[Layer, torch.Tensor]:
    weights: dict[Layer, torch.Tensor] = {}
    for part in networks(family):
        checkpoint = Checkpoint({}, {name: value for (own, name), value in _base(family).items() if own is part})
        fused = fuse(part, checkpoint, [lora]).state_dict
        weights |= {(part, name): fused[name] for name in fused}
    return weights


def _furthest(ours: Mapping[Layer, torch.Tensor], definition: Mapping[Layer, torch.Tensor]) -> float:
    assert ours.keys() == definition.keys()
    changed = [key for key in ours if ours[key] is not definition[key]]
    return max(float((ours[key].double() - definition[key].double()).abs().max()) for key in changed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_weights_are_what_the_trainer_defines(family: Family, form: str, tmp_path: Path) -> None:
    write, only = FORMS[form]
    made = factors(family, rank=(1, 2, 4), seed=0, only=only)
    for alpha, wrong in ((_mixed(made), 3.0), (None, 3.0), (3.0, None)) if form == "kohya" else ((_mixed(made), 3.0),):
        lora = read(write(made, tmp_path / "lora.safetensors", alpha, family), family, scale=0.7)
        base = _base(family)
        ours = _fused(family, lora)
        assert _furthest(ours, summed(base, made, alpha, 0.7)) < ROUNDING
        assert _furthest(ours, base) > 1e-2
        assert _furthest(ours, summed(base, made, wrong, 0.7)) > 1e-2


def test_the_comparison_with_the_definition_sees_what_is_wrong_with_one_layer(tmp_path: Path) -> None:
    made = factors(Family.SD15, rank=(1, 2, 4), seed=0, only=SOME)
    alphas = _mixed(made)
    ours = _fused(Family.SD15, read(kohya(made, tmp_path / "lora.safetensors", alpha=alphas), scale=0.7))
    base = _base(Family.SD15)
    layers = [layer for layer in made if layer[1].endswith("attn1.to_q") and "down_blocks" in layer[1]][:2]
    one, other = layers
    assert made[one][1].shape[0] == made[other][1].shape[0]
    for changed, other_alphas in (
        ({**made, one: made[other], other: made[one]}, alphas),
        ({**made, one: (made[one][0], made[one][1].flip(0))}, alphas),
        (made, {**alphas, one: 20.0}),
        ({layer: pair for layer, pair in made.items() if layer != one}, alphas),
    ):
        assert _furthest(ours, summed(base, changed, other_alphas, 0.7)) > 1e-2


def test_names_of_several_writers_may_be_in_one_file(tmp_path: Path) -> None:
    made = factors(Family.SD15, rank=(1, 2, 4), seed=0, only=ATTENTION)
    alphas = _mixed(made)
    tensors: dict[str, torch.Tensor] = {}
    writers = (kohya, peft, loras.one_trainer, loras.old_diffusers, loras.later_diffusers)
    for index, write in enumerate(writers):
        part = dict(list(made.items())[index :: len(writers)])
        tensors |= load_file(write(part, tmp_path / "part.safetensors", alpha=alphas))
    ours = _fused(Family.SD15, read(save(tensors, tmp_path / "lora.safetensors"), scale=0.7))
    assert _furthest(ours, summed(_base(Family.SD15), made, alphas, 0.7)) < ROUNDING
    assert _furthest(ours, summed(_base(Family.SD15), made, None, 0.7)) > 1e-2


def test_text_attention_without_its_output_layer_is_applied(tmp_path: Path) -> None:
    made = factors(Family.SDXL, rank=2, seed=0, only=r"layers\.\d\.(self_attn\.[qkv]_proj|mlp)")
    assert not any("out_proj" in module for _, module in made)
    lora = read(kohya(made, tmp_path / "lora.safetensors", alpha=1.0, sgm=True), Family.SDXL)
    found = {(part, name) for part, pairs in lora.pairs.items() for name in pairs}
    assert found == {(part, f"{module}.weight") for part, module in made}
    assert {part for part, _ in found} == {Component.TEXT_ENCODER, Component.TEXT_ENCODER_2}


def test_a_text_encoder_that_peft_wrapped_is_found(tmp_path: Path) -> None:
    made = factors(Family.SD15, rank=2, seed=0, only=r"layers\.")
    lora = read(loras.bare_peft(made, tmp_path / "lora.safetensors", alpha=1.0))
    assert lora.pairs[Component.TEXT_ENCODER].keys() == {f"{module}.weight" for _, module in made}


def test_time_and_size_embeddings_are_layers_too(tmp_path: Path) -> None:
    shapes = networks(Family.SDXL)[Component.UNET]
    modules = {
        "time_embed_0": "time_embedding.linear_1",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "label_emb_0_2": "add_embedding.linear_2",
    }
    tensors = {}
    for number, (stem, module) in enumerate(modules.items()):
        outputs, inputs = shapes[f"{module}.weight"]
        tensors |= {
            f"lora_unet_{stem}.lora_down.weight": torch.full((1, inputs), float(number)),
            f"lora_unet_{stem}.lora_up.weight": torch.ones(outputs, 1),
        }
    lora = read(save(tensors, tmp_path / "lora.safetensors"), Family.SDXL)
    found = {name: float(pair.down[0, 0]) for name, pair in lora.pairs[Component.UNET].items()}
    assert found == {f"{module}.weight": number for number, module in enumerate(modules.values())}


def test_a_linear_layer_and_a_convolution_get_their_sum() -> None:
    checkpoint = Checkpoint(
        {}, {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2, 1, 3, 3), "b.bias": torch.ones(2)}
    )
    down, up = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [10.0]])
    pairs = {
        "a.weight": Pair(down, up, 0.5),
        "b.weight": Pair(torch.arange(9.0).reshape(1, 1, 3, 3), up.reshape(2, 1, 1, 1), 1.0),
    }
    fused = fuse(Component.UNET, checkpoint, [Lora(Path("x"), 2.0, {Component.UNET: pairs})]).state_dict
    assert fused["a.weight"].tolist() == [[2.0, 3.0, 4.0], [11.0, 21.0, 31.0]]
    assert fused["b.weight"][1].tolist() == (torch.ones(1, 3, 3) + 20 * torch.arange(9.0).reshape(1, 3, 3)).tolist()
    assert fused["b.bias"] is checkpoint.state_dict["b.bias"]
    assert checkpoint.state_dict["a.weight"].tolist() == [[1.0] * 3] * 2, (
        "the checkpoint's own tensors stay as they are"
    )


def test_an_alpha_may_be_of_any_type(tmp_path: Path) -> None:
    path = kohya(_some(), tmp_path / "lora.safetensors", alpha=1.0)
    for dtype in (torch.int64, torch.int32, torch.float16, torch.bfloat16, torch.float64):
        tensors = {
            name: value.to(dtype) if name.endswith("alpha") else value for name, value in load_file(path).items()
        }
        lora = read(save(tensors, tmp_path / "other.safetensors"))
        assert {pair.factor for pair in lora.pairs[Component.UNET].values()} == {0.5}


def _some() -> Factors:
    return factors(Family.SD15, rank=2, seed=0, only=r"mid_block.*attn\d")


SETTINGS = {"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 1}, "r": 2}


def _in_header(**settings: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}


def test_settings_of_peft_give_the_factor(tmp_path: Path) -> None:
    lora = read(peft(_some(), tmp_path / "lora.safetensors", _in_header(**SETTINGS)))
    found = {name.split(".attn")[1]: pair.factor for name, pair in lora.pairs[Component.UNET].items()}
    assert (found["1.to_q.weight"], found["2.to_k.weight"]) == (4.0, 0.5)
    stabilized = read(peft(_some(), tmp_path / "lora.safetensors", _in_header(**SETTINGS, use_rslora=True)))
    found = {name.split(".attn")[1]: pair.factor for name, pair in stabilized.pairs[Component.UNET].items()}
    assert found["1.to_q.weight"] == pytest.approx(8 / 2**0.5)


def test_settings_beside_a_file_of_peft_give_the_factor(tmp_path: Path) -> None:
    path = loras.bare_peft(_some(), tmp_path / "adapter_model.safetensors")
    bare = read(path)
    assert {pair.factor for pair in bare.pairs[Component.UNET].values()} == {1.0}
    assert len(bare.notices) == 1
    assert "adapter_config.json is not beside it, so alpha / rank is taken as 1" in bare.notices[0]
    assert settings_fingerprint(path) is None
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(SETTINGS))
    lora = read(path)
    found = {name.split(".attn")[1]: pair.factor for name, pair in lora.pairs[Component.UNET].items()}
    assert (found["1.to_q.weight"], found["2.to_k.weight"]) == (4.0, 0.5)
    assert lora.notices == ()
    before = settings_fingerprint(path)
    settings.write_text(json.dumps({**SETTINGS, "lora_alpha": 2}))
    assert before is not None
    assert settings_fingerprint(path) not in (None, before), "a build with other settings is another build"


def test_settings_beside_a_file_of_another_writer_are_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    path = kohya(_some(), tmp_path / "lora.safetensors", alpha=1.0)
    assert {pair.factor for pair in read(path).pairs[Component.UNET].values()} == {0.5}
    assert settings_fingerprint(path) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("[1]", "expected a JSON object of settings, got list"),
        ('{"unet.lora_alpha": null}', "NoneType"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "unterminated subpattern"),
        ("{", "Expecting property name"),
    ],
    ids=["a list", "no number", "no pattern", "no JSON"],
)
def test_settings_that_cannot_be_read_are_told(settings: str, reason: str, tmp_path: Path) -> None:
    path = peft(_some(), tmp_path / "lora.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(CheckpointError, match="How strongly the LoRA changes its layers cannot be told") as refused:
        read(path)
    assert reason in str(refused.value.given)


@pytest.mark.parametrize(
    ("alpha", "reason"),
    [
        (torch.ones(2), "only one element"),
        (torch.tensor(float("nan")), "is nan"),
        (torch.tensor(float("inf")), "is inf"),
    ],
)
def test_an_alpha_that_is_no_number_is_told(alpha: torch.Tensor, reason: str, tmp_path: Path) -> None:
    path = kohya(_some(), tmp_path / "lora.safetensors", alpha=1.0)
    tensors = {name: alpha.clone() if name.endswith("alpha") else value for name, value in load_file(path).items()}
    with pytest.raises(CheckpointError, match="cannot be told") as refused:
        read(save(tensors, path))
    assert reason in str(refused.value.given)


def test_an_alpha_that_is_not_that_of_the_settings_is_told(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    peft(_some(), path, _in_header(lora_alpha=8, r=2), alpha=8.0)
    assert {pair.factor for pair in read(path).pairs[Component.UNET].values()} == {4.0}
    peft(_some(), path, _in_header(lora_alpha=8, r=2), alpha=1.0)
    with pytest.raises(CheckpointError, match="cannot be told") as refused:
        read(path)
    assert "is 0.5 by the tensor .alpha, but 4 by PEFT's settings" in str(refused.value.given)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["bundle_emb.<cat toy>.clip_l", "bundle_emb.<cat toy>.clip_g", "bundle_emb.v1.5.clip_l_out"],
            "'<cat toy>', 'v1.5'",
        ),
        (["bundle_emb.cat.string_to_param.*"], "'cat'"),
    ],
    ids=["OneTrainer", "web UI"],
)
def test_a_packed_textual_inversion_is_left_out_and_named(names: list[str], words: str, tmp_path: Path) -> None:
    path = kohya(_some(), tmp_path / "lora.safetensors", alpha=1.0)
    lora = read(path)
    assert lora.notices == ()
    with_embeddings = read(save({**load_file(path), **{name: torch.zeros(2, 8) for name in names}}, path))
    (notice,) = with_embeddings.notices
    assert notice.startswith("lora.safetensors: the textual inversion packed with the LoRA is left out")
    assert f": {words} in a prompt" in notice
    assert "\n" not in notice
    assert with_embeddings.pairs[Component.UNET].keys() == lora.pairs[Component.UNET].keys()


def test_files_are_read_where_they_lie(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    path = kohya(_some(), tmp_path / "lora.safetensors", alpha=1.0)
    assert read(Path(shutil.copy(path, folder))).pairs.keys() == read(path).pairs.keys()
