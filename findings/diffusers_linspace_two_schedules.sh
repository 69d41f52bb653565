#!/bin/sh
# diffusers 0.42.1 (torch 2.13.0): timestep_spacing "linspace" is two schedules.
#
# The guess: schedulers swapped by from_config, as the documentation advises, keep the spacing that the configuration
# names, and "linspace" is that of table 2 of arXiv 2305.08891, which diffusers' documentation refers to: both ends of
# the timesteps included, 999 to 0.
# What happens: DDIM, DDPM, PNDM, Euler, Euler ancestral and Heun do that. The multistep solvers (DPM-Solver++, UniPC,
# DEIS, SA) and DPM-Solver singlestep divide one step finer and leave out the last, 999 to 50 for 20 steps: they never
# evaluate the small timesteps, and what they run is nearer to "trailing" than to the other schedulers' "linspace".
# Web UIs have two words for the two: Uniform and SGM Uniform. A name that follows the configuration's word is wrong
# for one half of the schedulers; it has to follow the timesteps.
#
# Exits with 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 scipy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import diffusers
import torch
from diffusers import DDIMScheduler

NAMES = "DDIM DDPM PNDM EulerDiscrete EulerAncestralDiscrete HeunDiscrete"
MULTISTEP = "DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver"
print("diffusers", diffusers.__version__, "torch", torch.__version__)
config = {**DDIMScheduler(timestep_spacing="linspace").config, "skip_prk_steps": True}
last = {}
for name in (*NAMES.split(), *MULTISTEP.split()):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    assert scheduler.config.timestep_spacing == "linspace"
    scheduler.set_timesteps(20)
    taken = [round(float(timestep)) for timestep in scheduler.timesteps]
    last[name] = (taken[0], taken[-1])
    print(f"{name:24} {taken[0]} to {taken[-1]}")
ends = all(last[name] == (999, 0) for name in NAMES.split())
stops = all(last[name] == (999, 50) for name in MULTISTEP.split())
print("two schedules by one word:", ends and stops)
sys.exit(not (ends and stops))
PYTHON
