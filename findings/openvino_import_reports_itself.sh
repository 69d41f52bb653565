#!/bin/sh
# Importing OpenVINO in a process that serves pictures.
#
# The guess: an inference library that is imported loads its code. What reports usage is its conversion tool, and asks
# first.
#
# What happens: `import openvino` by itself starts a thread that forks the process, to send an event ("general_import")
# to Google Analytics from the child, and keeps a client's number and a count of uses in the home folder: once a process, whatever it goes on
# to do, and where there is no network the child tries all the same. openvino-telemetry, which does it, is a dependency
# that pip installs. Where it is missing, or an import of it fails, OpenVINO goes on with a stub of its own and nothing of
# that happens.
#
# Seen with openvino 2026.4.1, openvino-telemetry 2025.2.0 and numpy as below, Python 3.11, Linux. Exits with 1 where this
# changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  openvino==2026.4.1 openvino-telemetry==2025.2.0 numpy==2.4.6
cat > "$folder/watch.py" <<'PYTHON'
import os
import sys
import time

forks = []
sys.addaudithook(lambda event, _: forks.append(event) if event == "os.fork" else None)
if sys.argv[1] == "without":
    sys.modules["openvino_telemetry"] = None
import openvino

ends = time.monotonic() + 10  # a thread of the library's does it
while not forks and "openvino_telemetry.main" in sys.modules and time.monotonic() < ends:
    time.sleep(0.1)
kept = sorted(name for _, _, names in os.walk(os.environ["HOME"]) for name in names)
print(f"{sys.argv[1]} telemetry: forked {len(forks)} times, kept in the home folder: {', '.join(kept) or 'nothing'}")
print("versions: openvino", openvino.__version__.split("-")[0])
expected = (len(forks) > 0, "openvino_ga_cid" in kept) == ((sys.argv[1] == "with",) * 2)
os._exit(not expected)
PYTHON
mkdir "$folder/home-with" "$folder/home-without"
# No network in either case: what is looked at is the attempt. The child of the first may outlive this script.
for how in with without; do
  HOME="$folder/home-$how" HTTPS_PROXY=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 \
    "$folder/venv/bin/python" "$folder/watch.py" "$how"
done
