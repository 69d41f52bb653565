#!/usr/bin/env bash
# What a diffusers scheduler is given by place, and not by name, is lost when another scheduler is made from it.
#
# The guess: DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear") is the same as with the four names written out. It is as
# long as it is used itself, and its config shows the values.
# What happens: arguments without names count as left to the class's defaults, so from_config of another class, and a
# pipeline whose sampler is swapped, put that class's own in their place: DDIM runs on betas up to 0.02, linear, though
# the config it was made from says 0.012, scaled_linear. Trained with one and drawn with the other, a model gives specks
# and wrong colors that look like too little training.
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
from diffusers import DDIMScheduler, DDPMScheduler

print("diffusers", diffusers.__version__)
keys = ("beta_start", "beta_end", "beta_schedule")
values = (0.00085, 0.012, "scaled_linear")
by_place = DDPMScheduler(1000, *values)
by_name = DDPMScheduler(num_train_timesteps=1000, **dict(zip(keys, values)))
same = bool((by_place.betas == by_name.betas).all())
print("both schedulers have the same betas:", same, "and say", [by_place.config[key] for key in keys])
after = {}
for name, scheduler in (("by place", by_place), ("by name", by_name)):
    after[name] = tuple(DDIMScheduler.from_config(scheduler.config).config[key] for key in keys)
    print(f"DDIM from the one given {name}:", after[name])
seen = same and after["by name"] == values and after["by place"] != values
print("output seen: kept by name, lost by place:", seen)
sys.exit(not seen)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
