#!/bin/sh
# TensorRT-RTX, a normalisation of 16-bit types, and ONNX's attribute stash_type, the type of means and variances.
#
# The guess: stash_type = 1 is what makes TensorRT take the sums in float32; with 10 it would take them in float16, and
# a group whose sum of squares passes 65504 would be lost. Or else, since networks are strongly typed: the types of the
# tensors decide, and only casts to float32 help.
#
# What happens: neither. LayerNormalization and GroupNormalization give the same plan, byte for byte, whether stash_type
# is absent, 1, 10 or 16. And the kernels, whose CUDA source the plan carries, add up in float32 at float16 types. It is
# not that everything is float32: ReduceMax is computed in float16. Casts round a layer normalisation end up in its one
# kernel; round a group normalisation with an activation behind it they cost the fusion, one kernel becomes several.
#
# Seen with tensorrt-rtx-cu13 1.7.1.116, onnx and numpy as below, Python 3.11, Linux, no GPU. Exits with 1 where this
# changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorrt-rtx-cu13==1.7.1.116 onnx==1.23.2 numpy==2.4.6
cat > "$folder/build.py" <<'PYTHON'
# A process for each plan: the library keeps state from one build to the next.
import sys

import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1]), parser.get_error(0).desc()
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
with open(sys.argv[2], "wb") as file:
    file.write(builder.build_serialized_network(network, config))
PYTHON
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata as metadata
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

for name in ("tensorrt-rtx-cu13", "onnx", "numpy"):
    print(name, metadata.version(name))
print("python", sys.version.split()[0])


def plan(nodes, given, made, **constants):
    """The plan of a float16 graph, as text."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, s) for n, s in (("x", given), ("y", made)))
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), "graph.onnx")
    subprocess.run([sys.executable, "build.py", "graph.onnx", "plan"], check=True)
    return Path("plan").read_bytes().decode("latin-1")


def normalisation(op, shape, weights, cast=False, **attributes):
    """A normalisation, a group's with SiLU behind it."""
    names, normal, nodes = ["x", "scale", "bias"], "n", []
    if cast:
        nodes = [helper.make_node("Cast", [n], [n + "32"], to=TensorProto.FLOAT) for n in names]
        names = [n + "32" for n in names]
    nodes.append(helper.make_node(op, names, [normal], **attributes))
    if cast:
        normal = "n16"
        nodes.append(helper.make_node("Cast", ["n"], [normal], to=TensorProto.FLOAT16))
    if op == "GroupNormalization":
        nodes += [helper.make_node("Sigmoid", [normal], ["s"]), helper.make_node("Mul", [normal, "s"], ["y"])]
    else:
        nodes.append(helper.make_node("Identity", [normal], ["y"]))
    one = np.linspace(0.5, 1.5, weights).astype(np.float16)
    return plan(nodes, shape, shape, scale=one, bias=one)


def kernels(text):
    return re.findall(r"function=\{ name=(\w+)", text)


KINDS = {
    "LayerNormalization": ([2, 64, 320], 320, {"axis": -1}),
    "GroupNormalization": ([2, 64, 32, 32], 64, {"num_groups": 8}),
}
found = []
for op, (shape, weights, attributes) in KINDS.items():
    plans = [
        normalisation(op, shape, weights, **attributes, **stash)
        for stash in ({}, {"stash_type": 1}, {"stash_type": 10}, {"stash_type": 16})
    ]
    same = len(set(plans)) == 1
    types = set(re.findall(r"(?:AddOp|norm\w*)<__myln_(\w+)[,>]", plans[0]))
    wrapped = kernels(normalisation(op, shape, weights, cast=True, **attributes))
    print(f"{op}: plans for stash_type absent, 1, 10, 16 {'are one' if same else 'differ'}; sums in {types}")
    print(f"  kernels {kernels(plans[0])}, with casts {wrapped}")
    found += [same, types == {"float"}, (len(wrapped) > len(kernels(plans[0]))) is (op == "GroupNormalization")]

node = helper.make_node("ReduceMax", ["x", "axis"], ["y"])
text = plan([node], [2, 32, 1024], [2, 32, 1], axis=np.array([-1]))
types = set(re.findall(r"MaxOp<__myln_(\w+)>", text))
print("ReduceMax: in", types)
sys.exit(not all([*found, types == {"half"}]))
PYTHON
