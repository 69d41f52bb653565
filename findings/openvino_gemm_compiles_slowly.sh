#!/bin/sh
# Linear layers in bfloat16 for OpenVINO on a CPU, written as ONNX's Gemm with transB or as a MatMul with a transposed
# weight: what exporters give, and what optimizers for ONNX Runtime make of it.
#
# The guess: it is one operation written in two ways, over the same bytes; Gemm, which says all at once, is if anything
# less work to compile.
#
# What happens: a model of bfloat16 weights whose layers are Gemm takes three to four times as long to compile as the
# same model with MatMul, Transpose and Add. Of Stable Diffusion 1.5's UNet with its 184 linear layers the whole
# compilation takes twice as long, more than 3 s for nothing. In float32 both take the same time, and the results agree.
#
# Seen with openvino 2026.4.1, onnx and numpy as below, Python 3.11, Linux, AMD EPYC with AVX512_BF16. Exits with 1 where
# this changed, and with 0 and a word where the processor has no bfloat16.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HOME="$folder" # where OpenVINO keeps its number for telemetry
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
  openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6 protobuf==6.33.6 ml_dtypes==0.5.4 typing_extensions==4.16.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper

LAYERS, SIZE, ROWS, ROUNDS = 120, 640, 256, 5
core = openvino.Core()


def model(kind: str, dtype: int) -> bytes:
    weight = np.random.default_rng(0).standard_normal(SIZE * SIZE).astype(np.float32) / SIZE**0.5
    nodes, constants, value = [], [], "x"
    for layer in range(LAYERS):
        w, b, t, m, y = (f"{name}{layer}" for name in "wbtmy")
        raw = weight.tobytes() if dtype == TensorProto.FLOAT else (weight.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        item = len(raw) // (SIZE * SIZE)
        constants += [
            helper.make_tensor(w, dtype, [SIZE, SIZE], raw, raw=True),
            helper.make_tensor(b, dtype, [SIZE], raw[: SIZE * item], raw=True),
        ]
        if kind == "Gemm":
            nodes.append(helper.make_node("Gemm", [value, w, b], [y], transB=1))
        else:
            nodes += [
                helper.make_node("Transpose", [w], [t], perm=[1, 0]),
                helper.make_node("MatMul", [value, t], [m]),
                helper.make_node("Add", [m, b], [y]),
            ]
        value = y
    ends = [helper.make_tensor_value_info(name, dtype, [ROWS, SIZE]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def seconds(content: bytes, hint: str) -> float:
    read = core.read_model(content)
    started = time.process_time()
    core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1})
    return time.process_time() - started


print("versions: openvino", openvino.__version__.split("-")[0], "onnx", onnx.__version__, "numpy", np.__version__)
if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    print("this processor has no bfloat16: nothing to see")
    sys.exit(0)
ratios = {}
for hint, dtype in (("bf16", TensorProto.BFLOAT16), ("f32", TensorProto.FLOAT)):
    models = {kind: model(kind, dtype) for kind in ("Gemm", "MatMul")}
    found = {kind: [] for kind in models}
    for _ in range(ROUNDS):
        for kind, content in models.items():
            found[kind].append(seconds(content, hint))
    middle = {kind: sorted(times)[ROUNDS // 2] for kind, times in found.items()}
    ratios[hint] = middle["Gemm"] / middle["MatMul"]
    print(f"{hint}: Gemm {middle['Gemm']:.3f} s, MatMul {middle['MatMul']:.3f} s, {ratios[hint]:.1f} times")
same = ratios["bf16"] > 2 and ratios["f32"] < 1.5
print("as described" if same else "CHANGED")
sys.exit(0 if same else 1)
PYTHON
