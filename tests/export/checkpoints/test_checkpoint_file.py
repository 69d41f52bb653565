"""A file of a checkpoint that is not what its name says: the message says what it is."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load as load_component
from hidiff_export.checkpoints.sources import source_fingerprint
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width
from hidiff_runtime.format.safetensors import write
from tests.export.checkpoints.checkpoint_files import STEM, Arrays
from tests.export.checkpoints.loading import edit, holds, load, refused

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"")


def _bytes(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "what", "advice"),
    [
        (_bytes(POINTER), "a Git LFS pointer", "git lfs pull"),
        (_bytes(b""), "is empty", "Download it again"),
        (_zip, "a pickle under the name", ".ckpt"),
        (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "a pickle under the name", ".ckpt"),
        (_bytes(b"GGUF\x03\0\0\0" + bytes(64)), "in GGUF form", "float16"),
        (_bytes(b"\n<!DOCTYPE html><html><body>Log in</body></html>"), "a web page", "logged in"),
        (_bytes(b'{"error":"Unauthorized","message":"log in"}'), "a web page", "token"),
    ],
    ids=["lfs", "empty", "zip pickle", "old pickle", "gguf", "html", "json"],
)
def test_a_file_that_is_no_safetensors_file(
    tmp_path: Path, pipeline: Path, make: Callable[[Path], Any], what: str, advice: str
) -> None:
    alone, inside = tmp_path / "model.safetensors", pipeline / "unet" / f"{STEM}.safetensors"
    for path, source in ((alone, alone), (inside, pipeline)):
        make(path)
        message = refused(source)
        assert what in message
        assert advice in message
        assert str(path) in message


def test_a_configuration_that_is_a_git_lfs_pointer(pipeline: Path) -> None:
    (pipeline / "unet" / "config.json").write_bytes(POINTER)
    assert "a Git LFS pointer" in refused(pipeline)


def with_header(path: Path, entries: dict[str, tuple[str, int]]) -> Path:
    """A file of tensors of four bytes' shape, of whatever types."""
    header, begin = {}, 0
    for name, (dtype, width) in entries.items():
        header[name] = {"dtype": dtype, "shape": [4], "data_offsets": [begin, begin + 4 * width]}
        begin += 4 * width
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(begin))
    return path


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_an_fp8_checkpoint_is_told(tmp_path: Path, dtype: str) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    message = refused(with_header(tmp_path / "a.safetensors", {name: (dtype, 1), "other": ("F16", 2)}))
    assert "The checkpoint is quantized, to fp8" in message
    assert f"1 tensors, {name} is {dtype}" in message
    assert "float16 or bfloat16" in message
    flux = with_header(tmp_path / "b.safetensors", {"double_blocks.0.img_attn.qkv.weight": (dtype, 1)})
    assert "it is a Flux transformer" in refused(flux)


def test_torchs_own_fp8_file_is_told(tmp_path: Path, tensors: Arrays) -> None:
    small = {name: torch.from_numpy(array).to(torch.float8_e4m3fn) for name, array in tensors.items()}
    save_file(small, tmp_path / "a.safetensors")
    assert "quantized, to fp8" in refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ("mid_block.attentions.0.proj_in.weight.absmax", "bitsandbytes' 4 bits"),
        ("mid_block.attentions.0.proj_in.weight.quant_state.bitsandbytes__nf4", "bitsandbytes' 4 bits"),
        ("mid_block.attentions.0.proj_in.SCB", "bitsandbytes' 8 bits"),
        ("mid_block.attentions.0.proj_in.weight._data", "optimum-quanto's"),
        ("mid_block.attentions.0.proj_in.qweight", "packed integers"),
        ("scaled_fp8", "fp8 with scales"),
    ],
)
def test_a_quantized_checkpoint_is_told(tmp_path: Path, tensors: Arrays, mark: str, what: str) -> None:
    write(tmp_path / "a.safetensors", {**tensors, mark: np.zeros(4, np.uint8)})
    message = refused(tmp_path / "a.safetensors")
    assert f"The checkpoint is quantized, in {what}" in message or f"quantized, in {what} form" in message
    assert mark in message


def test_a_configuration_that_says_quantized_is_told(pipeline: Path) -> None:
    edit(pipeline, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    message = refused(pipeline)
    assert "quantized" in message
    assert "quantization_config: bitsandbytes" in message


@pytest.mark.parametrize(
    ("name", "what", "advice"),
    [
        ("model.gguf", "a GGUF file", ".safetensors file"),
        ("model.msgpack", "a Flax checkpoint", ".safetensors file"),
        ("model.onnx", "an ONNX graph", ".safetensors file"),
        ("model.safetensors.part", "an unfinished download", "finish"),
        ("model.safetensors.crdownload", "an unfinished download", "finish"),
        ("model_index.json", "a description of a checkpoint", "Give the folder"),
        ("model.xyz", "of a kind that is not known", "renamed"),
    ],
)
def test_a_file_with_another_ending_is_told(tmp_path: Path, name: str, what: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    message = refused(tmp_path / name)
    assert f"The file is no checkpoint: it is {what}" in message
    assert advice in message


def test_a_safetensors_file_under_other_names(tmp_path: Path, tensors: Arrays) -> None:
    write(tmp_path / "MODEL.SAFETENSORS", tensors)
    assert holds(load(tmp_path / "MODEL.SAFETENSORS").state_dict, tensors)
    write(tmp_path / "model.ckpt", tensors)
    message = refused(tmp_path / "model.ckpt")
    assert "a safetensors file under the name of a pickle" in message
    assert "Rename it to model.safetensors" in message


def test_the_advice_for_a_pickle_is_the_networks_own(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "control.pth")
    with pytest.raises(CheckpointError, match="is a pickle") as caught:
        load_component(Component.CONTROLNET, str(tmp_path / "control.pth"), Family.SD15, Task.CONTROLNET, Width.TINY)
    assert "ControlNetModel.from_single_file" in caught.value.advice
    assert "StableDiffusionPipeline.from_single_file" in refused(tmp_path / "control.pth")


def test_a_file_that_is_not_there_is_not_to_be_copied_again(tmp_path: Path) -> None:
    for ask in (refused, lambda path: str(_fingerprint_error(path))):
        message = ask(tmp_path / "none.safetensors")
        assert "cannot be read" in message
        assert "Check the path" in message
        assert "again" not in message


def _fingerprint_error(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        source_fingerprint(str(path), Component.UNET)
    return caught.value


def test_a_text_encoder_that_is_a_pointer(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"]}))
    (folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        load_component(Component.TEXT_ENCODER, str(tmp_path), Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY)
