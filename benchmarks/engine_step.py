"""Opens each phase's engine of a bundle in turn and evaluates it once, on random inputs; prints seconds and memory.

python benchmarks/engine_step.py BUNDLE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import hidiff_runtime


def resident_gb() -> float:
    """The process's resident set, mapped weights included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024 / 1e9


def main() -> None:
    """Prints one line a phase."""
    draw = np.random.default_rng(0)
    with hidiff_runtime.open(sys.argv[1], verify="size") as bundle:
        for record in bundle.manifest.phases:
            inputs = {spec.name: draw.standard_normal(spec.shape).astype(spec.dtype) for spec in record.inputs}
            inputs["timestep"][:] = 500
            if "window_shifts" in inputs:
                inputs["window_shifts"] = np.abs(inputs["window_shifts"]) % 4
            started = time.perf_counter()
            engine = bundle.engine(record.phase)
            opened = time.perf_counter()
            engine.run(inputs)
            print(
                f"{record.phase.name}: opened in {opened - started:.1f} s, "
                f"evaluated in {time.perf_counter() - opened:.1f} s, {resident_gb():.2f} GB resident"
            )


if __name__ == "__main__":
    main()
