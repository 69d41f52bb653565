"""Fabricated checkpoints on disk, in the layouts that people have."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.families.family import Family, Task, Width
from hidiff_runtime.format.safetensors import write

Arrays = dict[str, np.ndarray[Any, Any]]
STEM = "diffusion_pytorch_model"


def arrays(component: Component, config: Mapping[str, Any], seed: int = 0) -> Arrays:
    """A fabricated network's tensors."""
    return {name: tensor.numpy() for name, tensor in synthesize(component, config, seed).items()}


def tiny(family: Family, task: Task = Task.TEXT_TO_IMAGE, component: Component = Component.UNET) -> dict[str, Any]:
    """The configuration of a family's tiny network."""
    return component.config(family, task, Width.TINY)


def write_folder(folder: Path, tensors: Arrays, config: Mapping[str, Any], class_name: str) -> Path:
    """A network as diffusers' save_pretrained leaves it."""
    folder.mkdir(parents=True)
    content = {"_class_name": class_name, "_diffusers_version": "0.42.1", **config}
    (folder / "config.json").write_text(json.dumps(content))
    write(folder / f"{STEM}.safetensors", tensors, {"format": "pt"})
    return folder


def shard(folder: Path, parts: int = 3) -> None:
    """Splits the weights of a folder into shards with an index."""
    whole = folder / f"{STEM}.safetensors"
    from hidiff_runtime.format.safetensors import SafetensorsFile

    with SafetensorsFile.open(whole) as file:
        tensors = file.arrays()
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        name = f"{STEM}-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = names[part::parts]
        write(folder / name, {key: tensors[key] for key in chosen}, {"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, name))
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A valid file of float16 zeros that takes no room on the disk, for checkpoints of any size."""
    entries, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + begin)
    return path


_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_name(name: str, config: Mapping[str, Any]) -> str:
    """The name that the original Stable Diffusion code gives a UNet's tensor."""
    block_length = config["layers_per_block"] + 1
    for ours, theirs in _TOP.items():
        if name.startswith(ours + "."):
            name = theirs + name[len(ours) :]
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name)
    if found:
        side, block, kind, layer = found[1], int(found[2]), found[3], int(found[4])
        rest = name[found.end() :]
        if kind == "downsamplers":
            name = f"input_blocks.{(block + 1) * block_length}.0.op.{rest.removeprefix('conv.')}"
        elif kind == "upsamplers":
            place = 2 if "Attn" in config["up_block_types"][block] else 1
            name = f"output_blocks.{(block + 1) * block_length - 1}.{place}.{rest}"
        else:
            index = block * block_length + layer + (side == "down")
            name = f"{'input' if side == 'down' else 'output'}_blocks.{index}.{int(kind == 'attentions')}.{rest}"
    for ours, theirs in _RESNET.items():
        name = re.sub(rf"^((input|output)_blocks\.\d+\.0|middle_block\.[02])\.{ours}\.", rf"\1.{theirs}.", name)
    return name


def to_ldm(tensors: Arrays, config: Mapping[str, Any]) -> Arrays:
    """A UNet's tensors as a whole original checkpoint has them, beside something of its text encoder."""
    named = {f"model.diffusion_model.{ldm_name(name, config)}": array for name, array in tensors.items()}
    return {**named, "cond_stage_model.transformer.position_ids": np.arange(77, dtype=np.int64)[None]}


_CONTROL = {
    "controlnet_mid_block.": "middle_block_out.0.",
    "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
    "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
}


def to_original_controlnet(tensors: Arrays, config: Mapping[str, Any], prefix: str = "control_model.") -> Arrays:
    """A ControlNet's tensors under the names of the code that ControlNets were published with."""
    found = {}
    for name, array in tensors.items():
        for ours, theirs in _CONTROL.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        name = re.sub(r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0.", name)
        block = re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.", name)
        if block:
            name = f"input_hint_block.{2 * int(block[1]) + 2}.{name[block.end() :]}"
        found[prefix + ldm_name(name, {**config, "up_block_types": []})] = array
    return found
