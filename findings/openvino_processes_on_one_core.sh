#!/bin/sh
# Several server or worker processes on one machine, each with OpenVINO told to use one thread.
#
# The guess: N processes of one thread each run on N cores; which ones is the system's business. INFERENCE_NUM_THREADS
# says how many threads there are and not where they are.
#
# What happens: on Linux OpenVINO's CPU plugin binds its threads to cores, counted from the first, in every process alike.
# Two processes of one thread each share the first core and take twice as long, while the second core idles; nothing is
# said, and each process by itself is as fast as it should be. ENABLE_CPU_PINNING false ends it, at no cost to a process
# that has the machine to itself.
#
# Seen with openvino 2026.4.1 and numpy as below, Python 3.11, Linux, 2 cores. Exits with 1 where this changed, and with 0
# and a word where there is one core alone. Other work on the machine blurs it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HOME="$folder" # where OpenVINO keeps its number for telemetry
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps openvino==2026.4.1 numpy==2.4.6
cat > "$folder/work.py" <<'PYTHON'
import sys
import time

import numpy as np
import openvino
from openvino import opset13 as op

pinned, start = sys.argv[1] == "pinned", float(sys.argv[2])
image = op.parameter([1, 64, 128, 128], np.float32)
value = image
for seed in range(4):
    kernel = np.random.default_rng(seed).standard_normal((64, 64, 3, 3)).astype(np.float32) / 24
    value = op.convolution(value, op.constant(kernel), [1, 1], [1, 1], [1, 1], [1, 1])
settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
settings |= {} if pinned else {"ENABLE_CPU_PINNING": False}
request = openvino.Core().compile_model(
    openvino.Model([op.result(value)], [image], "convolutions"), "CPU", settings
).create_infer_request()
given = np.ones((1, 64, 128, 128), np.float32)
request.infer([given])
time.sleep(max(0.0, start - time.time()))  # both begin together
begun = time.monotonic()
for _ in range(60):
    request.infer([given])
print(time.monotonic() - begun)
PYTHON
"$folder/venv/bin/python" - "$folder/work.py" <<'PYTHON'
import os
import subprocess
import sys
import time
from importlib.metadata import version

print("versions: openvino", version("openvino"), "numpy", version("numpy"))
if len(os.sched_getaffinity(0)) < 2:
    print("one core alone: nothing to see")
    sys.exit(0)


def seconds(processes: int, how: str) -> float:
    start = str(time.time() + 8)
    running = [
        subprocess.Popen([sys.executable, sys.argv[1], how, start], stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return max(float(process.communicate()[0]) for process in running)


alone = seconds(1, "pinned")
found = {how: seconds(2, how) / alone for how in ("pinned", "free")}
print(f"one process of one thread: {alone:.2f} s; two at once, as OpenVINO does it: {found['pinned']:.2f} times that")
print(f"two at once with ENABLE_CPU_PINNING false: {found['free']:.2f} times that")
sys.exit(not (found["pinned"] > 1.6 and found["free"] < 1.4))
PYTHON
