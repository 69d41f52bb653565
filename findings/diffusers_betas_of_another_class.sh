#!/usr/bin/env bash
# A scheduler configuration that leaves its betas to its class loses them when another class is made from it.
#
# The guess: from_config(other.config) keeps the noise schedule, which is the model's; only the way of stepping changes.
# That is how samplers are swapped in every diffusers pipeline.
# What happens: diffusers notes which values were left to the class's defaults, and gives the new class its own defaults
# for them. LCM's and TCD's default betas are scaled_linear from 0.00085 to 0.012, as Stable Diffusion was trained; those
# of DDIM, Euler and most others are linear from 0.0001 to 0.02. So a folder whose scheduler_config.json is a short one
# of LCMScheduler is drawn right by LCM, and on another noise schedule, without a word, by any sampler it is swapped for.
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

import diffusers
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler

print("diffusers", diffusers.__version__)
keys = ("beta_schedule", "beta_start", "beta_end")
short = LCMScheduler.from_config({"_class_name": "LCMScheduler", "timestep_spacing": "trailing"})
lost = True
for kind in (DDIMScheduler, EulerDiscreteScheduler):
    swapped = kind.from_config(short.config)
    before, after = ([scheduler.config[key] for key in keys] for scheduler in (short, swapped))
    ends = [round(float(scheduler.alphas_cumprod[-1]), 6) for scheduler in (short, swapped)]
    print(f"LCM {before} -> {kind.__name__} {after}; what is left of the picture at the last timestep: {ends}")
    lost &= before != after and swapped.config.timestep_spacing == "trailing"
written = {key: short.config[key] for key in keys}
whole = DDIMScheduler.from_config(LCMScheduler.from_config({**written, "timestep_spacing": "trailing"}).config)
print("with the betas written out:", [whole.config[key] for key in keys])
kept = [whole.config[key] for key in keys] == [*written.values()]
print("output seen: betas lost where they are left out:", lost, "- kept where they are written:", kept)
sys.exit(0 if lost and kept else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
