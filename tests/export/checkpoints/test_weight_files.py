"""Which files of a folder are taken: plain ones, variants and shards under every spelling, or a reason why none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint
from hidiff_export.checkpoints.load import load as load_component
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width, text_encoder_configs
from hidiff_runtime.format.safetensors import write
from tests.export.checkpoints.checkpoint_files import STEM, Arrays, tiny
from tests.export.checkpoints.loading import holds, load, refused


def emptied(pipeline: Path) -> Path:
    """The UNet's folder, with its configuration alone."""
    folder = pipeline / "unet"
    (folder / f"{STEM}.safetensors").unlink()
    return folder


def halved(tensors: Arrays, by: float = 1.0) -> Arrays:
    """Other weights of the same names, so that it shows which were taken."""
    return {name: (array * by).astype(np.float16) for name, array in tensors.items()}


def write_shards(folder: Path, tensors: Arrays, shard: str, index: str, named: str = "") -> None:
    """Two shards and their index; ``named`` is what the index calls them where that is something else."""
    names, weight_map = sorted(tensors), {}
    for part in (0, 1):
        chosen = names[part::2]
        write(folder / shard.format(part + 1), {name: tensors[name] for name in chosen}, {"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, (named or shard).format(part + 1)))
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


NEW, OLD = f"{STEM}.fp16-0000{{}}-of-00002.safetensors", f"{STEM}-0000{{}}-of-00002.fp16.safetensors"
NEW_INDEX, OLD_INDEX = f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16.safetensors.index.json"
PLAIN = f"{STEM}-0000{{}}-of-00002.safetensors"


@pytest.mark.parametrize("named", [f"../{PLAIN}", f"../unet/{PLAIN}", f"/{PLAIN}"])
def test_an_index_leads_to_no_file_of_another_folder(pipeline: Path, tensors: Arrays, named: str) -> None:
    folder = emptied(pipeline)
    write_shards(folder, halved(tensors), PLAIN, f"{STEM}.safetensors.index.json", named)
    write_shards(pipeline, halved(tensors), PLAIN, "")
    assert "A shard of the checkpoint is missing." in refused(pipeline)


@pytest.mark.parametrize("shard", [NEW, OLD])
@pytest.mark.parametrize("index", [NEW_INDEX, OLD_INDEX, ""])
@pytest.mark.parametrize("named", ["", NEW, OLD, PLAIN])
def test_shards_of_a_variant(pipeline: Path, tensors: Arrays, shard: str, index: str, named: str) -> None:
    folder = emptied(pipeline)
    write_shards(folder, halved(tensors), shard, index, named)
    found = load(pipeline)
    assert holds(found.state_dict, halved(tensors))
    assert found.notices == ()


def test_plain_shards_without_an_index(pipeline: Path, tensors: Arrays) -> None:
    folder = emptied(pipeline)
    write_shards(folder, tensors, PLAIN, "")
    assert holds(load(pipeline).state_dict, tensors)
    (folder / PLAIN.format(1)).unlink()
    message = refused(pipeline)
    assert "shards of the checkpoint are not complete" in message
    assert "missing: 1" in message


def test_the_library_writes_a_variant_that_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet2DConditionModel(**tiny(Family.SD15)).to(torch.float16)
    model.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="200KB")
    assert (tmp_path / "unet" / NEW_INDEX).is_file()
    found = load(tmp_path).state_dict
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet", variant="fp16", torch_dtype=torch.float16)
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.state_dict().items())


def test_the_plain_file_comes_before_every_variant(pipeline: Path, tensors: Arrays) -> None:
    for number, variant in enumerate(("fp16", "non_ema", "ema", "other")):
        write(pipeline / "unet" / f"{STEM}.{variant}.safetensors", halved(tensors, 2.0 + number))
    found = load(pipeline)
    assert holds(found.state_dict, tensors)
    assert found.notices == ()
    theirs = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    assert holds(theirs.state_dict(), tensors)


@pytest.mark.parametrize("variant", ["non_ema", "ema", "mine", "v2-pruned"])
def test_the_only_variant_is_taken_with_a_line(pipeline: Path, tensors: Arrays, variant: str) -> None:
    write(emptied(pipeline) / f"{STEM}.{variant}.safetensors", tensors)
    found = load(pipeline)
    assert holds(found.state_dict, tensors)
    assert found.notices == (f"unet: the weights are those of the variant {variant}, the only ones there",)


@pytest.mark.parametrize("variant", ["fp32", "fp16", "bf16"])
def test_a_variant_that_is_another_type_needs_no_line(pipeline: Path, tensors: Arrays, variant: str) -> None:
    write(emptied(pipeline) / f"{STEM}.{variant}.safetensors", halved(tensors))
    assert load(pipeline).notices == ()


def test_of_several_variants_the_first_in_order_is_taken(pipeline: Path, tensors: Arrays) -> None:
    folder, order = emptied(pipeline), ["fp32", "fp16", "bf16", "ema", "non_ema", "a", "z"]
    for number, variant in enumerate(order):
        write(folder / f"{STEM}.{variant}.safetensors", halved(tensors, 1.0 + number))
    for number, variant in enumerate(order[:-1]):
        found = load(pipeline)
        assert holds(found.state_dict, halved(tensors, 1.0 + number))
        others = ", ".join(order[number + 1 :])
        assert found.notices == (f"unet: the weights are those of the variant {variant}; not taken: {others}",)
        (folder / f"{STEM}.{variant}.safetensors").unlink()


def text_model(folder: Path, dtype: torch.dtype = torch.float16) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(**text_encoder_configs(Family.SD15, Width.TINY)["text_encoder"])
    model = CLIPTextModel(config).to(dtype)
    model.save_pretrained(folder / "text_encoder")
    return model


def loaded(component: Component, source: Path) -> Checkpoint:
    return load_component(component, str(source), Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY)


def test_each_half_of_a_folder_keeps_its_own_type(tmp_path: Path) -> None:
    torch.manual_seed(0)
    UNet2DConditionModel(**tiny(Family.SD15)).to(torch.bfloat16).save_pretrained(tmp_path / "unet")
    vae = AutoencoderKL(**tiny(Family.SD15, component=Component.VAE)).to(torch.float32)
    vae.save_pretrained(tmp_path / "vae", variant="fp32")
    text_model(tmp_path)
    expected = {
        Component.UNET: torch.bfloat16,
        Component.VAE: torch.float32,
        Component.TEXT_ENCODER: torch.float16,
    }
    for component, dtype in expected.items():
        assert {tensor.dtype for tensor in loaded(component, tmp_path).state_dict.values()} == {dtype}


@pytest.mark.parametrize("variant", ["model.fp16", "model.ema", "pytorch_model", "text_encoder", STEM])
def test_a_text_encoder_under_other_names(tmp_path: Path, variant: str) -> None:
    expected = text_model(tmp_path).state_dict()
    folder = tmp_path / "text_encoder"
    (folder / "model.safetensors").rename(folder / f"{variant}.safetensors")
    found = loaded(Component.TEXT_ENCODER, tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict.items())
    odd = (f"text_encoder: the weights are taken from {variant}.safetensors, the only safetensors file there",)
    ema = ("text_encoder: the weights are those of the variant ema, the only ones there",)
    assert found.notices == {"model.fp16": (), "model.ema": ema}.get(variant, odd)


@pytest.mark.parametrize("index", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_shards_of_a_text_encoders_variant(tmp_path: Path, index: str) -> None:
    expected = text_model(tmp_path).state_dict()
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    path.unlink()
    write_shards(path.parent, tensors, "model.fp16-0000{}-of-00002.safetensors", index)
    found = loaded(Component.TEXT_ENCODER, tmp_path).state_dict
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_several_files_of_other_names_are_not_guessed_at(pipeline: Path, tensors: Arrays) -> None:
    folder = emptied(pipeline)
    for name in ("one", "two"):
        write(folder / f"{name}.safetensors", tensors)
    message = refused(pipeline)
    assert "several safetensors files, and none has the name of weights" in message
    assert "one.safetensors, two.safetensors" in message
    assert f"Name the right one {STEM}.safetensors" in message


def test_a_shard_under_another_name_is_told(pipeline: Path, tensors: Arrays) -> None:
    folder = emptied(pipeline)
    write_shards(folder, tensors, PLAIN, f"{STEM}.safetensors.index.json")
    (folder / PLAIN.format(2)).rename(folder / "second (1).safetensors")
    message = refused(pipeline)
    assert "A shard of the checkpoint is missing" in message
    assert PLAIN.format(2) in message
    assert "Give it this name if it is there under another" in message
    assert "second (1).safetensors" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{STEM}.bin", ""),
        (f"{STEM}.fp16.bin", ", variant='fp16'"),
        (f"{STEM}-00001-of-00002.bin", ""),
        (f"{STEM}.fp16-00001-of-00002.bin", ", variant='fp16'"),
        (f"{STEM}.bin.index.json", ""),
        ("pytorch_model.bin", ""),
        ("model.ckpt", ""),
        ("model.pt", ""),
    ],
)
def test_pickles_of_a_folder_are_told_how_to_convert(pipeline: Path, name: str, words: str) -> None:
    (emptied(pipeline) / name).write_bytes(b"\x80\x02")
    message = refused(pipeline)
    assert "weights are pickles" in message
    call = f"M.from_pretrained({str(pipeline)!r}, subfolder='unet', use_safetensors=False{words})"
    assert f"from diffusers import UNet2DConditionModel as M; {call}.save_pretrained('{pipeline}/unet')" in message
    assert "again" not in message


def follow(message: str) -> None:
    """Does what the advice of a refusal says."""
    exec(message.split("`")[1])


def test_the_advice_for_pickles_works(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**tiny(Family.SD15))
    unet.save_pretrained(tmp_path / "unet", variant="fp16", safe_serialization=False)
    assert (tmp_path / "unet" / f"{STEM}.fp16.bin").is_file()
    follow(refused(tmp_path))
    found = load(tmp_path).state_dict
    assert all(torch.equal(tensor, found[name]) for name, tensor in unet.state_dict().items())


def test_the_advice_for_a_text_encoders_pickle_works(tmp_path: Path) -> None:
    expected = text_model(tmp_path, torch.float32).state_dict()
    path = tmp_path / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(CheckpointError, match="weights are pickles") as caught:
        loaded(Component.TEXT_ENCODER, tmp_path)
    follow(str(caught.value))
    found = loaded(Component.TEXT_ENCODER, tmp_path).state_dict
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("diffusion_flax_model.msgpack", "a Flax checkpoint"),
        ("model.onnx", "an ONNX graph"),
        ("unet-q4.gguf", "a GGUF file"),
        (f"{STEM}.safetensors.incomplete", "an unfinished download"),
    ],
)
def test_a_folder_of_another_format_is_told(pipeline: Path, name: str, what: str) -> None:
    (emptied(pipeline) / name).write_bytes(b"something")
    message = refused(pipeline)
    assert what in message
    assert name in message


def test_a_folder_of_single_files_names_them(tmp_path: Path, tensors: Arrays) -> None:
    write(tmp_path / "dream.safetensors", tensors)
    assert "Give a file of this folder as the source (dream.safetensors)" in refused(tmp_path)


@pytest.mark.parametrize("class_name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_another_models_pipeline_is_named(tmp_path: Path, class_name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    assert f"model_index.json says {class_name}" in refused(tmp_path)


def hub_of(pipeline: Path, monkeypatch: pytest.MonkeyPatch, *, lists: Any = None) -> None:
    """A hub that has a folder and an empty cache."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def download(_: str, name: str, *, local_files_only: bool) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        if not (pipeline / name).is_file():
            raise EntryNotFoundError("no such file")
        return str(pipeline / name)

    def listed(_: str) -> list[str]:
        return [path.relative_to(pipeline).as_posix() for path in pipeline.rglob("*") if path.is_file()]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lists or listed)


def test_a_variant_on_the_hub_is_found_by_its_list_of_files(
    pipeline: Path, tensors: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = emptied(pipeline)
    write_shards(folder, tensors, f"{STEM}-0000{{}}-of-00002.mine.safetensors", f"{STEM}.safetensors.index.mine.json")
    hub_of(pipeline, monkeypatch)
    found = load("someone/something")
    assert holds(found.state_dict, tensors)
    assert found.notices == ("unet: the weights are those of the variant mine, the only ones there",)


def test_pickles_on_the_hub_are_converted_elsewhere(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (emptied(pipeline) / f"{STEM}.bin").write_bytes(b"\x80\x02")
    hub_of(pipeline, monkeypatch)
    message = refused("someone/something")
    assert "from_pretrained('someone/something', subfolder='unet', use_safetensors=False)" in message
    assert "save_pretrained('NEW_FOLDER/unet')" in message


def test_a_hub_that_falls_silent_is_told(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied(pipeline)

    def silent(_: str) -> list[str]:
        raise RuntimeError("the connection broke")

    hub_of(pipeline, monkeypatch, lists=silent)
    assert "hub cannot be reached" in refused("someone/something")


def test_what_is_wrong_with_a_cached_checkpoint_is_told_offline(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (emptied(pipeline) / f"{STEM}.bin").write_bytes(b"\x80\x02")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home, commit = tmp_path / "hub" / "models--someone--something", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(pipeline, home / "snapshots" / commit)
    assert "of what is there: The checkpoint's weights are pickles" in refused("someone/something")
    (home / "snapshots" / commit / "unet" / f"{STEM}.non_ema.safetensors").write_bytes(b"")
    assert "is empty" in refused("someone/something")
