#!/usr/bin/env bash
# DeepCache with FreeU: the kept feature grows at every step that reuses it, in UNets of three levels as SDXL's.
#
# The guess: FreeU scales half of the channels that enter a layer by b2. A kept feature is what a full step left, so that
# each step after it takes the same feature and scales it once.
# What happens: FreeU writes the product into the tensor that it is given. Where the first computed layer is of a level
# that FreeU scales, that tensor is the one that DeepCache keeps. So the full step leaves a feature that is scaled
# already, and each step that reuses it scales it once more: with b2 = 1.4 the fourth one computes on 1.4 ** 5 times
# what the inner layers gave. The same call of the UNet gives another output each time. In SDXL cache_branch_id 3 to 5
# are of such a level; 0 to 2 are outside of it, and what is kept there stays as it was. Keeping a copy avoids it.
# Versions: DeepCache 0.1.1, diffusers 0.42.1, torch 2.13.0.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 numpy==2.4.6 DeepCache==0.1.1 > "$folder/pip.log" 2>&1 \
  || { cat "$folder/pip.log"; exit 1; }

cat > "$folder/look.py" <<'PYTHON'
import sys
from types import SimpleNamespace

import diffusers
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, UNet2DConditionModel

print("diffusers", diffusers.__version__)
B2, REUSING = 1.4, 4
torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(8, 16, 16), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
).eval()
latents, prompt = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)


def first(value):
    return value[0] if isinstance(value, tuple) else value


def run(branch, freeu):
    """How much the kept feature has grown after each step that reuses it, and how far their outputs are apart."""
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=B2) if freeu else unet.disable_freeu()
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=REUSING + 1, cache_branch_id=branch)
    helper.enable()
    full, reusing = scheduler.timesteps[:2]
    with torch.no_grad():
        unet(latents, full, prompt)
        # What enters the first computed layer: of the layer before it, or where that is in another block, upsampled.
        level, layer = divmod(branch, 3)
        name = ("upsampler", level + 1, 0) if layer == 2 else ("attentions" if level else "resnet", level, layer + 1)
        before = first(helper.cached_output[("up", *name)]).clone()
        outputs, grown = [], []
        for _ in range(REUSING):
            outputs.append(unet(latents, reusing, prompt).sample)
            kept = first(helper.cached_output[("up", *name)])
            grown.append(round((kept.norm(dim=(2, 3)) / before.norm(dim=(2, 3))).max().item(), 2))
    helper.disable()
    apart = (outputs[-1] - outputs[0]).norm() / outputs[0].norm()
    return grown, round(apart.item(), 3)


again = [round(B2**step, 2) for step in range(1, REUSING + 1)]
expected = True
for branch in range(6):
    for freeu in (False, True):
        grown, apart = run(branch, freeu)
        print(f"cache_branch_id {branch}, FreeU {freeu}: kept feature grown {grown}, same call's outputs apart {apart}")
        if freeu and branch >= 3:
            expected &= grown == again and apart > 0.01
        else:
            expected &= grown == [1.0] * REUSING and apart == 0
sys.exit(0 if expected else 1)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
