#!/bin/sh
# Attention in OpenVINO on a CPU with bfloat16, the default precision there, where a sequence has as many tokens as the
# attention has heads.
#
# The guess: bfloat16 costs what 8 bits cost, some 48 dB beside float64, whatever the sizes; a UNet at an unusual picture
# size is as right as at the usual ones.
#
# What happens: queries, keys and values as exporters write them ([batch, tokens, heads x size], reshaped to
# [batch, tokens, heads, size] and transposed) are taken into one kernel with the attention. With as many queries as
# heads, and only then, what it gives has nothing to do with attention: 5 to 8 dB. In float32 it is right. No shape is
# wrong and nothing is said. 8 heads and a deepest feature map of 2x4 (Stable Diffusion 1.5), or 20 heads and one of 4x5
# (SDXL), are such networks. What helps: an attention whose result is an output of the model too is right, for the
# kernel then ends there.
#
# Seen with openvino 2026.4.1 and numpy as below, Python 3.11, Linux, AMD EPYC with AVX512_BF16. Exits with 1 where this
# changed, and with 0 and a word where the processor has no bfloat16.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HOME="$folder" # where OpenVINO keeps its number for telemetry
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import openvino
from openvino import opset13 as op

core = openvino.Core()
BATCH, SIZE = 2, 64


def decibels(tokens: int, keys: int, heads: int, precision: str, ends: bool = False) -> float:
    width = heads * SIZE
    inputs = [op.parameter([BATCH, count, width], np.float32) for count in (tokens, keys, keys)]

    def split(value):
        parts = op.reshape(value, np.array([BATCH, -1, heads, SIZE]), False)
        return op.transpose(parts, np.array([0, 2, 1, 3]))

    attention = op.scaled_dot_product_attention(*map(split, inputs))
    joined = op.reshape(op.transpose(attention, np.array([0, 2, 1, 3])), np.array([BATCH, tokens, width]), False)
    results = [op.result(joined)] + ([op.result(attention)] if ends else [])
    model = core.compile_model(
        openvino.Model(results, inputs, "attention"), "CPU", {"INFERENCE_PRECISION_HINT": precision}
    )
    random = np.random.default_rng(0)
    values = [random.standard_normal((BATCH, count, width)).astype(np.float32) for count in (tokens, keys, keys)]
    found = model(values)[0]
    query, key, value = (v.astype(np.float64).reshape(BATCH, -1, heads, SIZE).transpose(0, 2, 1, 3) for v in values)
    scores = np.exp(query @ key.transpose(0, 1, 3, 2) / np.sqrt(SIZE))
    exact = ((scores / scores.sum(-1, keepdims=True)) @ value).transpose(0, 2, 1, 3).reshape(BATCH, tokens, width)
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


print("versions: openvino", openvino.__version__.split("-")[0], "numpy", np.__version__)
if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    print("this processor has no bfloat16: nothing to see")
    sys.exit(0)
wrong = 0
for heads in (8, 20):
    for tokens, keys in ((heads - 1, 77), (heads, 77), (heads, heads), (heads + 1, 77)):
        row = [
            decibels(tokens, keys, heads, "f32"),
            decibels(tokens, keys, heads, "bf16"),
            decibels(tokens, keys, heads, "bf16", ends=True),
        ]
        print(
            f"{heads} heads, {tokens} queries, {keys} keys: float32 {row[0]:.0f} dB, bfloat16 {row[1]:.0f} dB, "
            f"bfloat16 with the attention an output {row[2]:.0f} dB"
        )
        expected = (row[0] > 100, (row[1] < 15) == (tokens == heads), row[2] > 40)
        wrong += not all(expected)
sys.exit(wrong > 0)
PYTHON
