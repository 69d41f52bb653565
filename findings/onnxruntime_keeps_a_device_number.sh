#!/bin/sh
# The first session of ONNX Runtime in a process, as it comes from PyPI, on Linux.
#
# The guess: a library for inference reads the model and computes; telemetry is Windows' own, as its documentation had it
# for years, and whoever turns it off there need not think of it on a server.
#
# What happens: it makes a device's number and a database of events in the home folder
# (.cache/Microsoft/DeveloperTools/.onnxruntime) and a file .ses in the folder for temporary files, starts a thread, and
# looks up Microsoft's collector of events. With ORT_DISABLE_TELEMETRY=1 in the environment before the first session it
# does none of this. 1.23.2 leaves nothing behind.
#
# Seen with onnxruntime 1.32.0 and 1.23.2, Python 3.11, Linux. Exits with 1 where this changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"

session() { # VERSION [VARIABLE=VALUE]: prints the files that one session leaves behind
  rm -rf "$folder/home" && mkdir -p "$folder/home/tmp"
  env HOME="$folder/home" TMPDIR="$folder/home/tmp" XDG_CACHE_HOME= ${2:-NOTHING=} "$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
session.run(None, {"x": np.ones(1, np.float32)})
PYTHON
  (cd "$folder/home" && find . -type f | sort | tr '\n' ' ')
}

install() {
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "onnxruntime==$1" onnx==1.23.2 numpy==2.4.6
}

install 1.23.2
before=$(session)
echo "1.23.2 leaves: $before"
install 1.32.0
told=$(session)
quiet=$(session 1.32.0 ORT_DISABLE_TELEMETRY=1)
echo "1.32.0 leaves: $told"
echo "1.32.0 with ORT_DISABLE_TELEMETRY=1 leaves: $quiet"
case "$told" in *deviceid*onnxruntime.db*) ;; *) echo CHANGED && exit 1 ;; esac
if [ -n "$before$quiet" ]; then echo CHANGED && exit 1; fi
echo "as described"
