#!/bin/sh
# ONNX external data in a file that has two names, as package stores, backups and deduplicated caches make them.
#
# The guess: a hard link is the file, so whatever reads a graph with its weights beside it reads this one too; at most
# what refuses it says so when the graph is loaded.
#
# What happens: ONNX Runtime opens the graph and computes. onnx-ir loads it too, lets its inputs, nodes and initializers
# be looked at, and refuses when the first value of a weight is read, in the middle of whatever pass or conversion asks
# for it, with a ValueError that speaks of a hard link attack. Whether a model can be transformed thus depends on how
# often somebody else has linked its weights. What helps is a copy (a clone of its blocks where the disk has that).
#
# Seen with onnx-ir 1.1.0, onnx, onnxruntime and numpy as below, Python 3.11, Linux. Exits with 1 where this changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  onnx-ir==1.1.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

weight = numpy_helper.from_array(np.arange(4096, dtype=np.float32).reshape(64, 64), "w")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    "one",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
    [weight],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
PATH = str(Path("model.onnx").absolute())
onnx.save(model, PATH, save_as_external_data=True, location="weights.bin", size_threshold=0)


def runtime() -> str:
    session = onnxruntime.InferenceSession(PATH, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.ones((1, 64), np.float32)})[0]
    return f"computes, first value {found[0, 0]:.0f}"


def reads() -> str:
    loaded = onnx_ir.load(PATH)
    (name,) = loaded.graph.initializers
    try:
        value = loaded.graph.initializers[name].const_value.numpy()
    except ValueError as error:
        return f"loads, lists {name}, and then: {'hard link' in str(error) and 'ValueError, hard link'}"
    return f"loads, and reads {value.shape}"


print("versions:", onnx_ir.__version__, onnx.__version__, onnxruntime.__version__)
seen = {}
for what in ("one name", "two names"):
    if what == "two names":
        os.link("weights.bin", "backup.bin")
    seen[what] = (runtime(), reads())
    print(f"{what}: ONNX Runtime {seen[what][0]}; onnx-ir {seen[what][1]}")
expected = {
    "one name": ("computes, first value 129024", "loads, and reads (64, 64)"),
    "two names": ("computes, first value 129024", "loads, lists w, and then: ValueError, hard link"),
}
sys.exit(seen != expected)
PYTHON
