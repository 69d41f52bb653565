"""The runtime without a server, for `load.py`: draws what each line of its input asks for in JSON; answers by a line.

    python benchmarks/serving/direct.py BUNDLE --options '{"threads": 1}'

It needs hidiff-runtime alone, so that it runs in the very Python environment that Triton's models run in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import hidiff_runtime
from hidiff_runtime.pipeline.image_metadata import encoded


def main() -> None:
    """Answers until the input ends: seconds of the run, of its PNG file, and of each step; and the file's SHA-256."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--options", type=json.loads, default={}, help="of opening the bundle, as JSON")
    given = parser.parse_args()
    with hidiff_runtime.Pipeline.open(given.bundle, **given.options) as pipe:
        for line in sys.stdin:
            steps: list[float] = []
            started = time.perf_counter()
            image = pipe(**json.loads(line), callback=lambda step, steps=steps: steps.append(step.seconds))
            drawn = time.perf_counter()
            content = encoded(image)
            told = {"run": drawn - started, "file": time.perf_counter() - drawn, "steps": steps}
            print(json.dumps({**told, "sha256": hashlib.sha256(content).hexdigest()}), flush=True)


if __name__ == "__main__":
    main()
