#!/usr/bin/env bash
# A pipeline's constructor changes the scheduler that it is given, and only some pipelines do.
#
# The guess: pipe(scheduler=DDIMScheduler.from_config(config)) steps as the configuration says, in every pipeline of
# Stable Diffusion 1.5; and a scheduler that was made stays as it was made.
# What happens: StableDiffusionPipeline and its image-to-image set steps_offset to 1 and clip_sample to false in the
# scheduler itself, inpainting sets steps_offset to 1 and keeps clip_sample, and the ControlNet and SDXL pipelines set
# nothing. One folder with a short scheduler_config.json therefore runs other timesteps with a ControlNet than without,
# and clips there; a scheduler that is shared between pipelines depends on which of them was made first; and whoever
# reads the folder's file alone (an exporter, another runtime) starts one training step off. Only a FutureWarning tells.
# Versions: diffusers 0.42.1.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 numpy==2.4.6 > "$folder/pip.log" 2>&1 \
  || { cat "$folder/pip.log"; exit 1; }

cat > "$folder/look.py" <<'PYTHON'
import sys
import warnings

import diffusers
from diffusers import DDIMScheduler

warnings.simplefilter("ignore")
print("diffusers", diffusers.__version__)
SHORT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def seen(kind: str) -> tuple[int, bool, list[int]]:
    """steps_offset, clip_sample and the first timesteps of a scheduler after a pipeline was made with it."""
    scheduler = DDIMScheduler.from_config(SHORT)
    if kind:
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet"))
        if "XL" in kind:
            parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        parts |= {"controlnet": None} if "ControlNet" in kind else {}
        getattr(diffusers, kind)(**parts, scheduler=scheduler)
    scheduler.set_timesteps(10)
    return scheduler.config.steps_offset, scheduler.config.clip_sample, scheduler.timesteps[:2].tolist()


KEPT = (0, True, [900, 800])
DUE = {
    "": KEPT,
    "StableDiffusionPipeline": (1, False, [901, 801]),
    "StableDiffusionImg2ImgPipeline": (1, False, [901, 801]),
    "StableDiffusionInpaintPipeline": (1, True, [901, 801]),
    "StableDiffusionControlNetPipeline": KEPT,
    "StableDiffusionXLPipeline": KEPT,
}
found = {kind: seen(kind) for kind in DUE}
for kind, values in found.items():
    print(f"{kind or 'the scheduler alone':34} steps_offset {values[0]}, clip_sample {values[1]}, timesteps {values[2]}")
print("output seen:", "as described" if found == DUE else f"expected {DUE}")
sys.exit(0 if found == DUE else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
