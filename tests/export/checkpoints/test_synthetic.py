"""Fabricated checkpoints: the same for ever, and numerically like trained ones."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.families.family import Family, Task
from tests.export.checkpoints.checkpoint_files import tiny

FAMILIES = [Family.SD15, Family.SD21, Family.SDXL]
SIDE = 16


def unet(family: Family, task: Task = Task.TEXT_TO_IMAGE) -> tuple[Any, dict[str, Any]]:
    config = tiny(family, task)
    return build(Component.UNET, config, synthesize(Component.UNET, config, 0)), config


def inputs(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Random inputs of a forward call, of the scale that real ones have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    call: dict[str, Any] = {
        "sample": normal(1, config["in_channels"], SIDE, SIDE),
        "timestep": 500,
        "encoder_hidden_states": normal(1, 77, config["cross_attention_dim"]),
    }
    if "addition_embed_type" in config:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
        call["added_cond_kwargs"] = {"text_embeds": normal(1, pooled), "time_ids": ids}
    return call


def distance(network: Any, call: dict[str, Any], **changed: Any) -> float:
    """How far another input moves the output, relative to it."""
    with torch.no_grad():
        before, after = network(**call).sample, network(**{**call, **changed}).sample
    return float((after - before).norm() / before.norm())


def test_a_tensor_has_the_same_bits_on_every_machine() -> None:
    tensors = synthesize(Component.UNET, tiny(Family.SD15), 0)
    digest = hashlib.sha256()
    for name in ("conv_in.weight", "conv_norm_out.weight", "conv_out.bias", "mid_block.resnets.0.conv2.weight"):
        digest.update(tensors[name].numpy().tobytes())
    assert digest.hexdigest() == "180902e26f514d1faf31a6d91026393d83d6fe81f1944875472f8c4c58f3a043"


def test_a_tensor_depends_on_seed_component_and_name_but_not_on_the_order() -> None:
    config, control = tiny(Family.SD15), tiny(Family.SD15, component=Component.CONTROLNET)
    name, twin = "down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.1.conv1.weight"
    tensors = synthesize(Component.UNET, config, 0)
    first = tensors[name]
    assert tensors[twin].shape == first.shape
    assert not torch.equal(tensors[twin], first)
    assert torch.equal(tensors[name], first)
    assert torch.equal(synthesize(Component.UNET, config, 0)[name], first)
    assert not torch.equal(synthesize(Component.UNET, config, 1)[name], first)
    assert not torch.equal(synthesize(Component.CONTROLNET, control, 0)[name], first)


def test_a_lazy_state_dict_has_no_other_names() -> None:
    with pytest.raises(KeyError):
        synthesize(Component.UNET, tiny(Family.SD15), 0)["nothing"]


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_stay_of_order_one_through_the_whole_depth(family: Family) -> None:
    network, config = unet(family)
    scales: list[float] = []

    def watch(_: torch.nn.Module, __: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        scales.append(float(value.square().mean().sqrt()))

    for name, module in network.named_modules():
        if name.rpartition(".")[0].endswith(("resnets", "attentions", "transformer_blocks")) or name == "conv_out":
            module.register_forward_hook(watch)
    with torch.no_grad():
        output = network(**inputs(config)).sample
    assert len(scales) > 50
    assert all(0.3 < scale < 5 for scale in scales)
    assert 0.5 < float(output.std()) < 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_follows_every_input(family: Family) -> None:
    network, config = unet(family)
    call, other = inputs(config), inputs(config, seed=1)
    assert distance(network, call) == 0
    assert distance(network, call, sample=other["sample"]) > 0.3
    assert distance(network, call, timestep=100) > 0.1
    assert distance(network, call, encoder_hidden_states=other["encoder_hidden_states"]) > 0.1
    if family.is_sdxl:
        assert distance(network, call, added_cond_kwargs=other["added_cond_kwargs"]) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_error_in_the_input_stays_small(family: Family) -> None:
    network, config = unet(family)
    call = inputs(config)
    noise = torch.randn(call["sample"].shape, generator=torch.Generator().manual_seed(9))
    assert distance(network, call, sample=call["sample"] + 1e-3 * noise) < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_matters(family: Family) -> None:
    network, config = unet(family)
    network.requires_grad_(True)
    network(**inputs(config)).sample.square().mean().backward()
    idle = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert idle == []


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_a_controlnet_gives_residuals_that_move_the_unet(family: Family) -> None:
    config = tiny(family, component=Component.CONTROLNET)
    network = build(Component.CONTROLNET, config, synthesize(Component.CONTROLNET, config, 0))
    picture = torch.rand((2, 1, 3, 8 * SIDE, 8 * SIDE), generator=torch.Generator().manual_seed(2))
    main, main_config = unet(family)
    call = inputs(main_config)
    with torch.no_grad():
        one, other = (network(**call, controlnet_cond=image) for image in picture)
    down, mid = one.down_block_res_samples, one.mid_block_res_sample
    assert all(0.05 < float(residual.square().mean().sqrt()) < 2 for residual in (*down, mid))
    assert all(not torch.equal(left, right) for left, right in zip(down, other.down_block_res_samples, strict=True))
    moved = distance(main, call, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    assert 0.05 < moved < 2


def test_an_inpainting_unet_takes_nine_channels() -> None:
    network, config = unet(Family.SDXL, Task.INPAINTING)
    assert config["in_channels"] == 9
    with torch.no_grad():
        assert network(**inputs(config)).sample.shape == (1, 4, SIDE, SIDE)
