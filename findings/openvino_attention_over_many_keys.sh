#!/bin/sh
# Attention over many keys in bfloat16 with OpenVINO on a CPU: one call over 16384 keys, and eight over 2048 each.
#
# The guess: the fused kernel works through keys block by block and never holds all scores, as such kernels do on GPUs, so
# that its speed hardly depends on how many keys there are; and in bfloat16 it is faster than in float32.
#
# What happens: it holds the scores of some queries with all keys. From about 6000 keys on these outgrow a core's
# second-level cache (1 MiB here), and bfloat16 loses its advantage: over 16384 keys with heads of 40 channels, a window
# of Stable Diffusion 1.5 at 2048 pixels, it takes twice as long as over eight pieces of them and as long as float32; with
# one head of 512 channels, the attention of Stable Diffusion's VAE at 1024 pixels, six times as long, and three times
# as long as float32. float32 itself does not mind.
#
# Seen with openvino 2026.4.1 and numpy 2.4.6, Python 3.11, Linux, AMD EPYC with AVX512_BF16, 1 MiB of second-level cache a
# core. Exits with 1 where this changed, and with 0 and a word where the processor has no bfloat16.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HOME="$folder" # where OpenVINO keeps its number for telemetry
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import numpy as np
import openvino
from openvino import opset13 as op

KEYS, PIECES, QUERIES, ROUNDS = 16384, 8, 2048, 5
core = openvino.Core()


def request(keys: int, pieces: int, heads: int, size: int, hint: str):
    """Attention of the same queries over each of the pieces; a piece takes the place of a picture in a batch."""
    shapes = [[pieces, heads, count, size] for count in (QUERIES, keys, keys)]
    inputs = [op.parameter(shape, np.float32) for shape in shapes]
    model = openvino.Model([op.result(op.scaled_dot_product_attention(*inputs))], inputs, "attention")
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
    made = core.compile_model(model, "CPU", settings).create_infer_request()
    arrays = [np.random.default_rng(0).standard_normal(shape, np.float32) for shape in shapes]
    return lambda: made.infer(arrays)


print("versions: openvino", openvino.__version__.split("-")[0], "numpy", np.__version__)
if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    print("this processor has no bfloat16: nothing to see")
    sys.exit(0)
ratios = {}
for heads, size in ((4, 40), (1, 512)):
    for hint in ("bf16", "f32"):
        runs = {
            "whole": request(KEYS, 1, heads, size, hint),
            "pieces": request(KEYS // PIECES, PIECES, heads, size, hint),
        }
        found = {name: [] for name in runs}
        for number in range(1 + ROUNDS):
            for name, run in runs.items():
                started = time.process_time()
                run()
                if number:
                    found[name].append(time.process_time() - started)
        middle = {name: sorted(times)[ROUNDS // 2] for name, times in found.items()}
        ratios[size, hint] = middle["whole"] / middle["pieces"]
        print(
            f"{heads} heads of {size}, {hint}: {KEYS} keys {middle['whole']:.3f} s, {PIECES} x {KEYS // PIECES} keys "
            f"{middle['pieces']:.3f} s, {ratios[size, hint]:.1f} times"
        )
same = ratios[40, "bf16"] > 1.5 and ratios[512, "bf16"] > 2.5 and max(ratios[40, "f32"], ratios[512, "f32"]) < 1.4
print("as described" if same else "CHANGED")
sys.exit(0 if same else 1)
PYTHON
