#!/bin/sh
# ONNX Runtime, a graph and its external weights that are symbolic links into a content-addressed store.
#
# The guess: as the Hugging Face hub's cache opens (graph and weights link into one folder, `blobs`), links into a store
# open; and where every external initializer is replaced by SessionOptions.add_initializer, the file that it named does
# not matter.
#
# What happens: the same two links open where both targets lie in one folder, and are refused ("escapes model
# directory") where each target has a folder of its own, as in DVC's and git-annex's stores: what counts is whether the
# weights' target lies below the folder of the graph's own target. Replacing the initializer does not help: the path of
# the file that is never read is checked all the same. What helps is to give the graph as bytes with the target's own
# name as location, and its folder as session.model_external_initializers_file_folder_path.
#
# Seen with onnxruntime 1.32.0, onnx and numpy as below, Python 3.11, Linux. Exits with 1 where this changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os, sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

print("onnxruntime", ort.__version__, "onnx", onnx.__version__, "numpy", np.__version__, "python", sys.version.split()[0])
VALUES = np.arange(512, dtype=np.float32)


def model(location):
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=VALUES.shape)
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", 0), ("length", VALUES.nbytes)):
        weights.external_data.add(key=key, value=str(value))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, VALUES.shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def linked(name, graph_target, weights_target):
    """A folder of two links: model.onnx and weights.bin."""
    for target, content in ((graph_target, model("weights.bin")), (weights_target, VALUES.tobytes())):
        path = Path(name, "store", target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    links = Path(name, "models")
    links.mkdir()
    for link, target in (("model.onnx", graph_target), ("weights.bin", weights_target)):
        (links / link).symlink_to(os.path.relpath(Path(name, "store", target), links))
    return links / "model.onnx"


def opens(what, given, options=None):
    try:
        session = ort.InferenceSession(given, options or ort.SessionOptions(), providers=["CPUExecutionProvider"])
        good = np.array_equal(session.run(None, {"x": np.zeros_like(VALUES)})[0], VALUES)
        print(f"{what}: opens{'' if good else ', and is wrong'}")
        return good
    except Exception as error:
        print(f"{what}: refused, {'escapes model directory' if 'escapes model directory' in str(error) else error}")
        return False


flat = linked("flat", "aaaa", "bbbb")
deep = linked("deep", "aa/aa", "bb/bb")
replaced = ort.SessionOptions()
value = ort.OrtValue.ortvalue_from_numpy(VALUES)
replaced.add_initializer("w", value)
beside = ort.SessionOptions()
beside.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path("deep/store/bb").resolve()))
found = [
    opens("both targets in one folder", str(flat)),
    opens("each target in a folder of its own", str(deep)),
    opens("the same, its initializer replaced", str(deep), replaced),
    opens("bytes that name the target, and its folder", model("bb"), beside),
]
sys.exit(found != [True, False, False, True])
PYTHON
