"""LoRA files: every layer finds its weight under every way of naming, and what cannot be fused is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hidiff_export.errors import CheckpointError
from hidiff_export.families import Family, Task, Width
from hidiff_export.model.component import Component
from hidiff_export.model.load import Checkpoint
from hidiff_export.model.lora import Lora, fuse, lora_fingerprint, read_lora
from hidiff_export.model.lora_names import Pair
from tests.loras import Factors, factors, kohya, networks, old_diffusers, peft, save


def read(path: Path, family: Family = Family.SD15, scale: float = 1.0) -> Lora:
    return read_lora(path, scale, family, Task.TEXT_TO_IMAGE, Width.TINY)


@pytest.mark.parametrize("naming", ["kohya", "peft", "old"])
@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_every_layer_finds_its_weight(family: Family, naming: str, tmp_path: Path) -> None:
    given = factors(family, rank=2, seed=0, only=r"attn\d\.|layers" if naming == "old" else "")
    path = tmp_path / "lora.safetensors"
    if naming == "kohya":
        kohya(given, path, alpha=1.0, sgm=family is Family.SDXL)
    else:
        {"peft": peft, "old": old_diffusers}[naming](given, path)
    lora = read(path, family)
    found = {(part, name) for part, pairs in lora.pairs.items() for name in pairs}
    assert found == {(part, f"{module}.weight") for part, module in given}
    for (part, module), (down, up) in given.items():
        pair = lora.pairs[part][f"{module}.weight"]
        assert torch.equal(pair.down, down)
        assert torch.equal(pair.up, up)
        assert pair.factor == (0.5 if naming == "kohya" else 1.0)


def test_kohya_under_diffusers_names_finds_the_weights_of_sdxl_too(tmp_path: Path) -> None:
    given = {of: pair for of, pair in factors(Family.SDXL, rank=2, seed=0).items() if of[0] is Component.UNET}
    lora = read(kohya(given, tmp_path / "lora.safetensors", alpha=1.0), Family.SDXL)
    assert lora.pairs[Component.UNET].keys() == {f"{module}.weight" for _, module in given}


def test_a_linear_layer_and_a_convolution_get_their_sum() -> None:
    checkpoint = Checkpoint(
        {}, {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2, 1, 3, 3), "b.bias": torch.ones(2)}
    )
    down, up = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [10.0]])
    pairs = {
        "a.weight": Pair(down, up, 0.5, ()),
        "b.weight": Pair(torch.arange(9.0).reshape(1, 1, 3, 3), up.reshape(2, 1, 1, 1), 1.0, ()),
    }
    fused = fuse(Component.UNET, checkpoint, [Lora(Path("x"), 2.0, {Component.UNET: pairs})]).state_dict
    assert fused["a.weight"].tolist() == [[2.0, 3.0, 4.0], [11.0, 21.0, 31.0]]
    assert fused["b.weight"][1].tolist() == (torch.ones(1, 3, 3) + 20 * torch.arange(9.0).reshape(1, 3, 3)).tolist()
    assert fused["b.bias"] is checkpoint.state_dict["b.bias"]
    assert checkpoint.state_dict["a.weight"].tolist() == [[1.0] * 3] * 2, (
        "the checkpoint's own tensors stay as they are"
    )


def some(family: Family = Family.SD15) -> Factors:
    return factors(family, rank=2, seed=0, only=r"mid_block.*attn\d")


@pytest.mark.parametrize(
    ("suffix", "method"),
    [
        (".dora_scale", "DoRA"),
        (".hada_w1_a", "LoHa"),
        (".lokr_w1", "LoKr"),
        (".oft_blocks", "OFT"),
        (".lora_mid.weight", "LoCon in Tucker's form"),
        (".diff", "whole differences"),
        (".lora_magnitude_vector", "DoRA"),
    ],
)
def test_what_is_not_lora_is_named(suffix: str, method: str, tmp_path: Path) -> None:
    path = kohya(some(), tmp_path / "lora.safetensors", alpha=1.0)
    tensors = load_file(path)
    stem = next(iter(tensors)).split(".")[0]
    with pytest.raises(CheckpointError) as refused:
        read(save({**tensors, stem + suffix: torch.zeros(2, 2)}, path))
    assert method in str(refused.value.given)
    assert stem + suffix in str(refused.value.given)
    assert refused.value.exit_code == 3


def _stranger(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "unet.mid_block.stranger": torch.zeros(1)}


def _half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[:-1])


def _alpha_of_nothing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "unet.mid_block.attentions.0.alpha": torch.zeros(())}


@pytest.mark.parametrize("change", [_stranger, _half, _alpha_of_nothing])
def test_a_tensor_that_changes_nothing_is_refused(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path = peft(some(), tmp_path / "lora.safetensors")
    before = load_file(path)
    after = change(before)
    with pytest.raises(CheckpointError, match="change no weight") as refused:
        read(save(after, path))
    named = [*(after.keys() - before.keys()), "lora_A"][0]
    assert named in str(refused.value.given)


def test_kohya_names_that_diffusers_does_not_know_are_refused(tmp_path: Path) -> None:
    path = kohya(some(), tmp_path / "lora.safetensors", alpha=1.0)
    tensors = {**load_file(path), "lora_unet_mystery.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="cannot tell") as refused:
        read(save(tensors, path))
    assert "lora_unet_mystery.weight" in str(refused.value.given)


@pytest.mark.parametrize(("own", "wanted"), [(Family.SDXL, Family.SD15), (Family.SD15, Family.SDXL)])
def test_another_familys_lora_is_refused_and_recognised(own: Family, wanted: Family, tmp_path: Path) -> None:
    given = factors(own, rank=2, seed=0, only=r"(down|mid)_block.*attn\d")
    path = kohya(given, tmp_path / "lora.safetensors", alpha=1.0, sgm=own is Family.SDXL)
    with pytest.raises(CheckpointError, match=f"not for {wanted.value} .* looks like .*{own.value}") as refused:
        read(path, wanted)
    assert f"of {len(given)} layers do not fit: lora_unet_" in str(refused.value.given)


def test_factors_of_another_shape_are_refused(tmp_path: Path) -> None:
    turned = {key: (up.T.contiguous(), down.T.contiguous()) for key, (down, up) in some().items()}
    with pytest.raises(CheckpointError, match="fits no family") as refused:
        read(peft(turned, tmp_path / "lora.safetensors"))
    assert "of 8 layers do not fit" in str(refused.value.given)


def test_settings_of_peft_give_the_factor(tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 1}, "unet.r": 2}'}
    lora = read(peft(some(), tmp_path / "lora.safetensors", header))
    factors_found = {name.split(".attn")[1]: pair.factor for name, pair in lora.pairs[Component.UNET].items()}
    assert factors_found["1.to_q.weight"] == 4.0
    assert factors_found["2.to_k.weight"] == 0.5


@pytest.mark.parametrize(
    "settings",
    ["[1]", '{"unet.lora_alpha": null}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "{"],
    ids=["a list", "no number", "no pattern", "no JSON"],
)
def test_settings_that_cannot_be_read_are_told(settings: str, tmp_path: Path) -> None:
    path = peft(some(), tmp_path / "lora.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(CheckpointError, match="cannot tell what the LoRA changes"):
        read(path)


def test_an_alpha_of_many_numbers_is_told(tmp_path: Path) -> None:
    path = kohya(some(), tmp_path / "lora.safetensors", alpha=1.0)
    tensors = {name: torch.ones(2) if name.endswith("alpha") else value for name, value in load_file(path).items()}
    with pytest.raises(CheckpointError, match="cannot tell what the LoRA changes"):
        read(save(tensors, path))


def test_a_file_that_is_missing_cut_short_or_no_lora_is_refused(tmp_path: Path) -> None:
    path = kohya(some(), tmp_path / "lora.safetensors", alpha=1.0)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    whole = save({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    for wrong in (tmp_path / "missing.safetensors", cut, whole):
        with pytest.raises(CheckpointError) as refused:
            read(wrong)
        assert refused.value.advice
    with pytest.raises(CheckpointError):
        lora_fingerprint(tmp_path / "missing.safetensors")


def test_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    path = kohya(some(), tmp_path / "lora.safetensors", alpha=1.0)
    tensors = {
        name: value.to(torch.int64) if name.endswith("alpha") else value for name, value in load_file(path).items()
    }
    lora = read(save(tensors, path))
    assert {pair.factor for pair in lora.pairs[Component.UNET].values()} == {0.5}


def test_the_factors_are_checked_against_every_network(tmp_path: Path) -> None:
    given = factors(Family.SDXL, rank=2, seed=0, only=r"layers\.0|text_projection")
    lora = read(kohya(given, tmp_path / "lora.safetensors", alpha=1.0, sgm=True), Family.SDXL)
    assert lora.pairs.keys() == networks(Family.SDXL).keys() - {Component.UNET}
