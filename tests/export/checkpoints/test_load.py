"""Loading checkpoints: every layout people have, and a clear refusal of every bad one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build
from hidiff_export.checkpoints.load import load as load_component
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.errors import CheckpointError, InputError
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.format.safetensors import write
from tests.export.checkpoints import checkpoint_files
from tests.export.checkpoints.checkpoint_files import STEM, Arrays, arrays, tiny, write_folder, write_header
from tests.export.checkpoints.loading import CONFIG, TEXT, UNET, edit, holds, load, refused


def test_a_pipeline_and_a_unet_folder(pipeline: Path, tensors: Arrays) -> None:
    for folder in (pipeline, pipeline / "unet"):
        config, found, _ = load(folder)
        assert config == CONFIG
        assert holds(found, tensors)


def test_a_sharded_folder(pipeline: Path, tensors: Arrays) -> None:
    checkpoint_files.shard(pipeline / "unet")
    assert holds(load(pipeline).state_dict, tensors)


def test_a_half_precision_variant(pipeline: Path, tensors: Arrays) -> None:
    (pipeline / "unet" / f"{STEM}.safetensors").unlink()
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    write(pipeline / "unet" / f"{STEM}.fp16.safetensors", half)
    assert holds(load(pipeline).state_dict, half)


def test_a_single_file_under_diffusers_names(pipeline: Path, tensors: Arrays) -> None:
    assert holds(load(pipeline / "unet" / f"{STEM}.safetensors").state_dict, tensors)


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_a_single_file_in_the_original_layout(tmp_path: Path, family: Family) -> None:
    config = tiny(family)
    expected = arrays(Component.UNET, config)
    write(tmp_path / "model.safetensors", checkpoint_files.to_ldm(expected, config))
    found = load(tmp_path / "model.safetensors", family)
    assert found.config == config
    assert holds(found.state_dict, expected)


def test_loaded_tensors_are_mapped(pipeline: Path) -> None:
    found = load(pipeline).state_dict
    unet = build(Component.UNET, CONFIG, found)
    assert unet.conv_in.weight.data_ptr() == found["conv_in.weight"].data_ptr()
    spans = [line.split(" ", 1)[0] for line in Path("/proc/self/maps").read_text().splitlines() if STEM in line]
    bounds = [tuple(int(end, 16) for end in span.split("-")) for span in spans]
    assert any(low <= unet.conv_in.weight.data_ptr() < high for low, high in bounds)


def test_a_network_computes_what_diffusers_own_loading_computes(pipeline: Path) -> None:
    from diffusers import UNet2DConditionModel

    generator = torch.Generator().manual_seed(0)
    call = (torch.randn((1, 4, 16, 16), generator=generator), 500, torch.randn((1, 77, 32), generator=generator))
    theirs = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").eval()
    ours = build(Component.UNET, *load(pipeline)[:2])
    with torch.no_grad():
        assert torch.equal(ours(*call).sample, theirs(*call).sample)


def test_a_network_in_another_dtype() -> None:
    unet = build(Component.UNET, CONFIG, synthesize(Component.UNET, CONFIG, 0), torch.bfloat16)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


def test_a_random_source() -> None:
    config, found, _ = load("random:7")
    assert config == CONFIG
    assert torch.equal(found["conv_in.weight"], synthesize(Component.UNET, CONFIG, 7)["conv_in.weight"])


@pytest.mark.parametrize("source", ["random", "random:", "random:x", "random:-1", "random:99999999999999999999999"])
def test_a_bad_seed_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="seed"):
        load(source)


def test_a_controlnet_folder(tmp_path: Path) -> None:
    config = tiny(Family.SDXL, component=Component.CONTROLNET)
    expected = arrays(Component.CONTROLNET, config)
    for folder in ("alone", "pipeline/controlnet"):
        write_folder(tmp_path / folder, expected, config, "ControlNetModel")
        found = load_component(
            Component.CONTROLNET, str(tmp_path / folder.split("/")[0]), Family.SDXL, Task.CONTROLNET, Width.TINY
        )
        assert found.config == config
        assert holds(found.state_dict, expected)
        build(Component.CONTROLNET, *found[:2])


def test_the_demo_models_width_is_loaded_and_named_where_another_is_wanted(tmp_path: Path) -> None:
    config = Component.UNET.config(Family.SD15, TEXT, Width.DEMO)
    expected = arrays(Component.UNET, config)
    write_folder(tmp_path / "unet", expected, config, UNET)
    found = load_component(Component.UNET, str(tmp_path), Family.SD15, TEXT, Width.DEMO)
    assert holds(found.state_dict, expected)
    assert "looks like sd15 at demo width" in refused(tmp_path)


def test_what_a_fine_tune_may_set_is_kept(pipeline: Path) -> None:
    edit(pipeline, sample_size=96, upcast_attention=True)
    assert load(pipeline).config == {**CONFIG, "sample_size": 96, "upcast_attention": True}


def test_a_config_that_says_the_same_otherwise_is_taken(pipeline: Path) -> None:
    edit(pipeline, attention_head_dim=[4, 4, 4, 4], transformer_layers_per_block=[1, 1, 1, 1], dropout=0.0)
    assert load(pipeline).config == CONFIG


@pytest.mark.parametrize(
    "source", ["{}/none", "{}/none.safetensors", "./none", "/none/at/all", "~/none", "a/b/c", "", " ", "C:\\x"]
)
def test_a_missing_path_is_refused(tmp_path: Path, source: str) -> None:
    message = refused(source.format(tmp_path))
    assert "no checkpoint at this path" in message or "cannot be read" in message


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no UNet2DConditionModel in this checkpoint" in refused(tmp_path)


@pytest.mark.parametrize("keep", [5, 100, 5000, -1])
def test_a_truncated_file_is_refused(pipeline: Path, keep: int) -> None:
    path = pipeline / "unet" / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refused(pipeline)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.PT", "none.pth"])
def test_a_pickle_is_refused_unopened(tmp_path: Path, name: str) -> None:
    if "none" not in name:
        (tmp_path / name).write_bytes(b"\x80\x02")
    message = refused(tmp_path / name)
    assert "pickle" in message
    assert "save_pretrained" in message


def test_a_folder_with_pickled_weights_is_refused(pipeline: Path) -> None:
    path = pipeline / "unet" / f"{STEM}.safetensors"
    path.rename(path.with_suffix(".bin"))
    assert "pickle" in refused(pipeline)


def test_a_folder_without_weights_is_refused(pipeline: Path) -> None:
    (pipeline / "unet" / f"{STEM}.safetensors").unlink()
    assert "no weights" in refused(pipeline)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_broken_configuration_is_refused(pipeline: Path, content: str | bytes) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in refused(pipeline)


def test_a_missing_shard_is_named(pipeline: Path) -> None:
    checkpoint_files.shard(pipeline / "unet")
    (pipeline / "unet" / f"{STEM}-00002-of-00003.safetensors").unlink()
    assert f"{STEM}-00002-of-00003.safetensors" in refused(pipeline)


def test_a_shard_outside_the_folder_is_refused(pipeline: Path) -> None:
    checkpoint_files.shard(pipeline / "unet")
    index = pipeline / "unet" / f"{STEM}.safetensors.index.json"
    (pipeline / "outside.safetensors").write_bytes(b"")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../outside.safetensors"}}))
    assert "shard of the checkpoint is missing" in refused(pipeline)


@pytest.mark.parametrize("content", [{}, {"weight_map": 3}, {"weight_map": {"conv_in.weight": 3}}])
def test_a_broken_index_is_refused(pipeline: Path, content: Any) -> None:
    checkpoint_files.shard(pipeline / "unet")
    (pipeline / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps(content))
    assert "index of a sharded checkpoint" in refused(pipeline)


def test_a_tensor_in_two_shards_is_refused(pipeline: Path, tensors: Arrays) -> None:
    checkpoint_files.shard(pipeline / "unet")
    write(pipeline / "unet" / f"{STEM}-00001-of-00003.safetensors", tensors)
    assert "two shards" in refused(pipeline)


@pytest.mark.parametrize(
    ("family", "wanted", "words"),
    [
        (Family.SD21, Family.SD15, "looks like sd21 at tiny width"),
        (Family.SD15, Family.SD21, "looks like sd15 at tiny width"),
        (Family.SDXL, Family.SD15, "looks like sdxl or sdxl-turbo or playground at tiny width"),
        (Family.SD15, Family.SDXL_TURBO, "looks like sd15 at tiny width"),
    ],
)
def test_another_family_is_named(tmp_path: Path, family: Family, wanted: Family, words: str) -> None:
    config = tiny(family)
    expected = arrays(Component.UNET, config)
    write_folder(tmp_path / "folder" / "unet", expected, config, UNET)
    write(tmp_path / "ldm.safetensors", checkpoint_files.to_ldm(expected, config))
    for source in (tmp_path / "folder", tmp_path / "ldm.safetensors"):
        message = refused(source, wanted)
        assert f"not {wanted.value} at tiny width" in message
        assert words in message


@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
def test_a_full_checkpoint_is_recognized_by_its_header(tmp_path: Path, family: Family) -> None:
    config = Component.UNET.config(family, TEXT, Width.FULL)
    path = write_header(tmp_path / "full.safetensors", Component.UNET.shapes(config))
    assert f"looks like {family.value}" in refused(path)
    found = load_component(Component.UNET, str(path), family, TEXT)
    assert found.config == config
    assert found.state_dict["conv_in.weight"].shape == (320, 4, 3, 3)


def test_an_unknown_family_is_told(tmp_path: Path) -> None:
    config = {**CONFIG, "cross_attention_dim": 48}
    write(tmp_path / "a.safetensors", arrays(Component.UNET, config))
    assert "of no family known here" in refused(tmp_path / "a.safetensors")


def test_another_task_is_told(tmp_path: Path, pipeline: Path) -> None:
    assert "4 input channels, 9 wanted: it is not an inpainting one" in refused(pipeline, task=Task.INPAINTING)
    config = tiny(Family.SD15, Task.INPAINTING)
    write(tmp_path / "a.safetensors", arrays(Component.UNET, config))
    assert "9 input channels, 4 wanted: it is an inpainting one" in refused(tmp_path / "a.safetensors")
    load(tmp_path / "a.safetensors", task=Task.INPAINTING)


def test_something_else_altogether_is_told(tmp_path: Path) -> None:
    write(tmp_path / "lora.safetensors", {"lora_unet_down.weight": np.zeros(4, np.float32)})
    assert "no Stable Diffusion UNet2DConditionModel" in refused(tmp_path / "lora.safetensors")
    write(tmp_path / "empty.safetensors", {})
    assert "no Stable Diffusion UNet2DConditionModel" in refused(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256 for None"),
        ({"attention_head_dim": 2}, "attention_head_dim 2 for 4"),
        ({"act_fn": "gelu"}, "act_fn gelu for silu"),
        ({"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
        ({"down_block_types": ["Nothing"] * 4}, "cannot build"),
        ({"down_block_types": ["DownBlock2D"]}, "cannot build"),
    ],
)
def test_another_architecture_is_told(pipeline: Path, changed: dict[str, Any], words: str) -> None:
    edit(pipeline, **changed)
    assert words in refused(pipeline)


def _drop(tensors: Arrays) -> None:
    del tensors["mid_block.resnets.0.conv1.weight"], tensors["conv_out.bias"]


def _add(tensors: Arrays) -> None:
    tensors["surprise.weight"] = np.zeros(3, np.float32)


def _reshape(tensors: Arrays) -> None:
    tensors["conv_out.bias"] = np.zeros(5, np.float32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_drop, "2 missing: conv_out.bias, mid_block.resnets.0.conv1.weight"),
        (_add, "1 unknown: surprise.weight"),
        (_reshape, "1 of another shape: conv_out.bias [5] for [4]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, tensors: Arrays, spoil: Callable[[Arrays], None], words: str
) -> None:
    spoiled = dict(tensors)
    spoil(spoiled)
    write_folder(tmp_path / "a", spoiled, CONFIG, UNET)
    assert words in refused(tmp_path / "a")
    with pytest.raises(CheckpointError, match="not those of its"):
        build(Component.UNET, CONFIG, {name: torch.from_numpy(array) for name, array in spoiled.items()})


def test_an_original_checkpoint_without_a_tensor_is_told(tmp_path: Path) -> None:
    config = tiny(Family.SDXL)
    whole = checkpoint_files.to_ldm(arrays(Component.UNET, config), config)
    for name in ("middle_block.0.in_layers.2.weight", "label_emb.0.2.weight"):
        rest = {key: array for key, array in whole.items() if not key.endswith(name)}
        assert len(rest) == len(whole) - 1
        write(tmp_path / "a.safetensors", rest)
        message = refused(tmp_path / "a.safetensors", Family.SDXL)
        assert "mid_block.resnets.0.conv1.weight" in message or name in message


def test_quantized_weights_are_refused(tmp_path: Path, tensors: Arrays) -> None:
    write_folder(tmp_path / "a", {**tensors, "conv_in.weight": np.zeros((32, 4, 3, 3), np.int8)}, CONFIG, UNET)
    message = refused(tmp_path / "a")
    assert "quantized, to integers of 8 bits" in message
    assert "conv_in.weight is I8" in message


def test_integers_in_the_place_of_a_bias_are_refused(tmp_path: Path, tensors: Arrays) -> None:
    write_folder(tmp_path / "a", {**tensors, "conv_in.bias": np.zeros(32, np.int32)}, CONFIG, UNET)
    assert "not a floating-point number" in refused(tmp_path / "a")


def test_weights_that_are_not_numbers_are_found_when_they_are_stored(tmp_path: Path, tensors: Arrays) -> None:
    broken = tensors["conv_out.bias"].copy()
    broken[1] = np.nan
    write_folder(tmp_path / "a", {**tensors, "conv_out.bias": broken}, CONFIG, UNET)
    with pytest.raises(CheckpointError, match="NaN or an infinity") as caught:
        WeightStore.write(load(tmp_path / "a").state_dict, tmp_path / "weights", Precision.FLOAT32)
    assert "conv_out.bias: 1 of 4" in str(caught.value)
    assert not (tmp_path / "weights").exists()
