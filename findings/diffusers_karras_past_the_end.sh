#!/usr/bin/env bash
# DPM++ 2M Karras runs past its end on a zero terminal SNR schedule.
#
# The guess: Karras' noise levels suit any noise schedule; they are laid out between its largest and its smallest sigma.
# What happens: diffusers tells the UNet the training timestep that is nearest to each sigma, and finds its place in the
# run by looking the first timestep up in that list. Where the first two sigmas round to one timestep, it takes the
# second, so each step uses the next one's sigmas, and the last step asks for a sigma that is not there (IndexError).
# With zero terminal SNR the largest sigma is 4096, all the levels near it round to 999, and every number of steps from
# 21 on fails. Setting the begin index by hand, as the image-to-image pipelines do, avoids it.
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
from diffusers import DPMSolverMultistepScheduler

print("diffusers", diffusers.__version__)


def run(steps, told):
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, use_karras_sigmas=True,
    )
    scheduler.set_timesteps(steps)
    if told:
        scheduler.set_begin_index(0)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    try:
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample
    except IndexError as error:
        return f"fails: {error}"
    return f"finite: {bool(torch.isfinite(sample).all())}"


found = {steps: (run(steps, False), run(steps, True)) for steps in (4, 30)}
for steps, (plain, told) in found.items():
    print(f"{steps} steps, as text-to-image pipelines run it: {plain}; with the begin index set to 0: {told}")
fine = found[4] == ("finite: True", "finite: True") and found[30][1] == "finite: True"
sys.exit(0 if fine and found[30][0].startswith("fails") else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
