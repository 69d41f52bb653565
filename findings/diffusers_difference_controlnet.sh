#!/usr/bin/env bash
# A "difference" ControlNet holds, instead of its weights, what is to be added to those of the UNet that it was trained
# beside; a tensor named `difference` marks it. One would guess that diffusers adds them, or refuses the file.
# ControlNetModel.from_single_file does neither: it drops the mark without a word and takes the differences for the
# weights themselves. Here every difference is zero, so the ControlNet that comes out computes nothing from its latents.
# Seen with diffusers 0.42.1, transformers 5.23.0, torch 2.13.0, safetensors 0.8.0. Ends with 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 "transformers==5.23.*" safetensors==0.8.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys

import diffusers
import safetensors
import torch
import transformers
from diffusers import ControlNetModel
from safetensors.torch import save_file

print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
      f"safetensors {safetensors.__version__}")

spoken = []
handler = logging.Handler()
handler.emit = lambda record: spoken.append(record.getMessage())
diffusers.utils.logging.set_verbosity_warning()
logging.getLogger("diffusers").addHandler(handler)

# A ControlNet of one level, whose original layout is written out by hand.
model = ControlNetModel(
    block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
    down_block_types=("DownBlock2D",), conditioning_embedding_out_channels=(8, 8),
)
model.save_config("config")
names = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0", "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    "controlnet_cond_embedding.blocks.0": "input_hint_block.2", "controlnet_cond_embedding.blocks.1": "input_hint_block.4",
    "controlnet_down_blocks.0": "zero_convs.0.0", "controlnet_down_blocks.1": "zero_convs.1.0",
    "controlnet_mid_block": "middle_block_out.0", "down_blocks.0.resnets.0": "input_blocks.1.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}
parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
         "conv2": "out_layers.3"}
file = {}
for name, tensor in model.state_dict().items():
    for ours, theirs in names.items():
        if name.startswith(ours + "."):
            name = theirs + name[len(ours):]
            break
    if name.startswith(("input_blocks.1.0.", "middle_block.0.", "middle_block.2.")):
        for ours, theirs in parts.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    file["control_model." + name] = torch.zeros_like(tensor)
file["difference"] = torch.ones(1)
save_file(file, "difference.safetensors")

loaded = ControlNetModel.from_single_file("difference.safetensors", config="config", local_files_only=True)
taken = all(not tensor.any() for tensor in loaded.state_dict().values())
about = [line for line in spoken if "differ" in line.lower()]
print(f"weights are the differences themselves: {taken}; warnings about it: {about or 'none'}; all warnings: {spoken or 'none'}")
sys.exit(0 if taken and not about else 1)
PYTHON
