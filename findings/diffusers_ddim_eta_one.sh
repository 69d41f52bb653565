#!/usr/bin/env bash
# DDIM with eta 1 gives NaN in its first step on a zero terminal SNR schedule, for some numbers of steps.
#
# The guess: eta 1 is DDPM's noise, the most that DDIM takes; what runs with it in 5 and in 30 steps runs in 6 and in 20.
# What happens: the direction pointing to the sample keeps the root of what the noise leaves of its variance. With zero
# terminal SNR the first step's noise leaves nothing, and in float32 the difference of two equal numbers comes out as
# zero or as slightly less, by the number of steps. Of less than zero the root is NaN, and so is the whole picture, with
# no warning. An eta of 0.99 leaves enough. Taking the larger of the difference and zero before the root avoids it.
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
import torch
from diffusers import DDIMScheduler

print("diffusers", diffusers.__version__)


def run(steps, eta):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    for number, timestep in enumerate(scheduler.timesteps, start=1):
        output = torch.randn(1, 4, 8, 8, generator=generator)
        sample = scheduler.step(output, timestep, sample, eta=eta, generator=generator).prev_sample
        if not sample.isfinite().all():
            return f"NaN after step {number}"
    return "finite"


found = {(steps, eta): run(steps, eta) for steps in (5, 6, 20, 30) for eta in (1.0, 0.99)}
for (steps, eta), result in found.items():
    print(f"{steps} steps, eta {eta}: {result}")
nan = sorted(case for case, result in found.items() if result == "NaN after step 1")
sys.exit(0 if nan == [(6, 1.0), (20, 1.0)] else 1)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
