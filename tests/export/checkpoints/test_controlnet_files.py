"""ControlNet files: the original layout under either name, and what looks like a ControlNet and is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, ControlNetXSAdapter, T2IAdapter
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint, build, load
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width
from hidiff_runtime.format.safetensors import write
from tests.export.checkpoints.checkpoint_files import (
    Arrays,
    arrays,
    ldm_name,
    tiny,
    to_ldm,
    to_original_controlnet,
    write_folder,
    write_header,
)
from tests.export.checkpoints.loading import holds

FAMILIES = [Family.SD15, Family.SD21, Family.SDXL]


def network(family: Family) -> tuple[dict[str, object], Arrays]:
    config = tiny(family, component=Component.CONTROLNET)
    return config, arrays(Component.CONTROLNET, config)


def loaded(path: Path, family: Family = Family.SD15) -> Checkpoint:
    return load(Component.CONTROLNET, str(path), family, Task.CONTROLNET, Width.TINY)


def refusal(path: Path, family: Family = Family.SD15) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(path, family)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_layout_holds_the_same_tensors(tmp_path: Path, family: Family, prefix: str) -> None:
    config, tensors = network(family)
    write(tmp_path / "control.safetensors", to_original_controlnet(tensors, config, prefix))
    found = loaded(tmp_path / "control.safetensors", family)
    assert found.config == config
    assert found.notices == ()
    assert holds(found.state_dict, tensors)


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21])
def test_diffusers_reads_the_original_layout_alike(tmp_path: Path, family: Family) -> None:
    config, tensors = network(family)
    write(tmp_path / "control.safetensors", to_original_controlnet(tensors, config))
    write_folder(tmp_path / "config", tensors, config, "ControlNetModel")
    theirs = ControlNetModel.from_single_file(
        str(tmp_path / "control.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    assert holds(theirs.state_dict(), tensors)
    assert holds(loaded(tmp_path / "control.safetensors", family).state_dict, tensors)


def test_diffusers_drops_the_sizes_of_an_sdxl_controlnet_which_are_kept_here() -> None:
    """What is read has diffusers' own names and values, and beside them the embedding of sizes."""
    config, tensors = network(Family.SDXL)
    original = to_original_controlnet(tensors, config)
    theirs = convert_controlnet_checkpoint({name: torch.from_numpy(array) for name, array in original.items()}, config)
    dropped = {name for name in tensors if name.startswith("add_embedding.")}
    assert tensors.keys() - theirs.keys() == dropped
    assert holds(theirs, {name: array for name, array in tensors.items() if name not in dropped})


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_diffusers_own_class_computes(tmp_path: Path, family: Family) -> None:
    config, tensors = network(family)
    write(tmp_path / "control.safetensors", to_original_controlnet(tensors, config))
    folder = write_folder(tmp_path / "folder", tensors, config, "ControlNetModel")
    theirs = ControlNetModel.from_pretrained(folder).eval()
    ours = build(Component.CONTROLNET, *loaded(tmp_path / "control.safetensors", family)[:2])
    generator = torch.Generator().manual_seed(0)

    def residuals(model: torch.nn.Module) -> list[torch.Tensor]:
        generator.manual_seed(0)
        added = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)} if family.is_sdxl else None
        latents, prompt = (torch.randn(shape, generator=generator) for shape in ((1, 4, 16, 16), (1, 5, 32)))
        image = torch.rand((1, 3, 128, 128), generator=generator)
        with torch.no_grad():
            down, mid = model(latents, 500, prompt, image, added_cond_kwargs=added, return_dict=False)
        return [*down, mid]

    assert all(torch.equal(*pair) for pair in zip(residuals(ours), residuals(theirs), strict=True))
    with torch.no_grad():
        ours.conv_in.weight[0] += 0.1
    assert not all(torch.equal(*pair) for pair in zip(residuals(ours), residuals(theirs), strict=True))


def test_a_whole_checkpoint_with_a_controlnet_gives_either(tmp_path: Path) -> None:
    """Like the published control_sd15 files: beside the ControlNet the UNet that it was trained on."""
    config, tensors = network(Family.SD15)
    unet_config = tiny(Family.SD15)
    unet = arrays(Component.UNET, unet_config)
    schedule = {"betas": np.zeros(1000, np.float32)}
    write(
        tmp_path / "both.safetensors",
        {**to_original_controlnet(tensors, config), **to_ldm(unet, unet_config), **schedule},
    )
    control = loaded(tmp_path / "both.safetensors")
    assert holds(control.state_dict, tensors)
    assert control.notices == ("controlnet: 1 tensor that changes no result is left out: betas",)
    found = load(Component.UNET, str(tmp_path / "both.safetensors"), Family.SD15, Task.CONTROLNET, Width.TINY)
    assert holds(found.state_dict, unet)
    assert (
        f"{len(tensors)} tensors that belong to no network built here are left out: control_model." in found.notices[1]
    )


def test_a_full_sdxl_controlnet_is_known_by_its_header(tmp_path: Path) -> None:
    config = Component.CONTROLNET.config(Family.SDXL, Task.CONTROLNET, Width.FULL)
    shapes = Component.CONTROLNET.shapes(config)
    names = to_original_controlnet({name: np.empty(0) for name in shapes}, config)
    renamed = dict(zip(names, shapes.values(), strict=True))
    path = write_header(tmp_path / "full.safetensors", renamed)
    assert load(Component.CONTROLNET, str(path), Family.SDXL, Task.CONTROLNET).config == config
    assert "looks like sdxl" in refusal(path)


def test_a_controlnet_file_that_lacks_a_tensor_is_told(tmp_path: Path) -> None:
    config, tensors = network(Family.SD15)
    original = to_original_controlnet(tensors, config)
    del original["control_model.zero_convs.3.0.weight"]
    write(tmp_path / "control.safetensors", original)
    assert "1 missing: controlnet_down_blocks.3.weight" in refusal(tmp_path / "control.safetensors")


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_the_half_of_a_unet_is_no_controlnet(tmp_path: Path, prefix: str) -> None:
    config, tensors = network(Family.SD15)
    kept = {name: array for name, array in tensors.items() if not name.startswith("controlnet_")}
    write(tmp_path / "half.safetensors", to_original_controlnet(kept, config, prefix))
    assert "it is the down half of a UNet" in refusal(tmp_path / "half.safetensors")


def test_what_diffusers_drops_in_silence_is_told(tmp_path: Path) -> None:
    config, tensors = network(Family.SD15)
    extra = {"control_model.surprise.weight": np.ones(3, np.float32)}
    write(tmp_path / "control.safetensors", {**to_original_controlnet(tensors, config), **extra})
    assert "1 unknown: surprise.weight" in refusal(tmp_path / "control.safetensors")


def _difference(original: Arrays) -> Arrays:
    return {**original, "difference": np.ones(1, np.float32)}


def _control_lora(original: Arrays) -> Arrays:
    marked = {"lora_controlnet": np.ones(1, np.float32), "input_blocks.1.0.in_layers.2.up": np.ones(2, np.float32)}
    return {**original, **marked}


def _lllite(_: Arrays) -> Arrays:
    return {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("change", "what"),
    [(_difference, "a difference ControlNet"), (_control_lora, "a Control-LoRA"), (_lllite, "a ControlNet-LLLite")],
)
@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_other_forms_of_control_are_refused_by_name(
    tmp_path: Path, change: Callable[[Arrays], Arrays], what: str, prefix: str
) -> None:
    config, tensors = network(Family.SD15)
    write(tmp_path / "control.safetensors", change(to_original_controlnet(tensors, config, prefix)))
    message = refusal(tmp_path / "control.safetensors")
    assert what in message
    assert "again" not in message
    assert "--lora" not in message


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: T2IAdapter(channels=[8, 8, 16, 16]), "a T2I-Adapter"),
        (lambda: T2IAdapter(channels=[8, 8, 16, 16], adapter_type="light_adapter"), "a T2I-Adapter"),
        (
            lambda: ControlNetUnionModel(
                addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80
            ),
            "a union ControlNet",
        ),
        (ControlNetXSAdapter, "a ControlNet-XS"),
    ],
    ids=["full adapter", "light adapter", "union", "xs"],
)
def test_diffusers_other_controls_are_refused_by_name(
    tmp_path: Path, make: Callable[[], torch.nn.Module], what: str
) -> None:
    with torch.device("meta"):
        model = make()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    message = refusal(write_header(tmp_path / "control.safetensors", shapes))
    assert f"no Stable Diffusion ControlNetModel: it is {what}" in message
    (tmp_path / "folder").mkdir()
    model.save_config(tmp_path / "folder")
    assert f"{type(model).__name__}: {what}" in refusal(tmp_path / "folder")


@pytest.mark.parametrize("original", [False, True])
def test_a_controlnet_is_no_unet_and_a_unet_no_controlnet(tmp_path: Path, original: bool) -> None:
    config, tensors = network(Family.SD15)
    unet = arrays(Component.UNET, tiny(Family.SD15))
    if original:
        tensors = to_original_controlnet(tensors, config, "")
        unet = {ldm_name(name, tiny(Family.SD15)): array for name, array in unet.items()}
    write(tmp_path / "control.safetensors", tensors)
    write(tmp_path / "unet.safetensors", unet)
    with pytest.raises(CheckpointError, match="it is a ControlNet") as caught:
        load(Component.UNET, str(tmp_path / "control.safetensors"), Family.SD15, Task.CONTROLNET, Width.TINY)
    assert "as the recipe's controlnet" in caught.value.advice
    assert "it is a UNet" in refusal(tmp_path / "unet.safetensors")


def test_a_controlnet_whose_residuals_are_averaged_is_refused(tmp_path: Path) -> None:
    config, tensors = network(Family.SD15)
    write(tmp_path / "control_v11e_sd15_shuffle_fp16.safetensors", to_original_controlnet(tensors, config))
    assert "averages its residuals" in refusal(tmp_path / "control_v11e_sd15_shuffle_fp16.safetensors")
    write_folder(tmp_path / "shuffle", tensors, {**config, "global_pool_conditions": True}, "ControlNetModel")
    assert "pools its residuals over the picture" in refusal(tmp_path / "shuffle")
