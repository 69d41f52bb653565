"""ONNX Runtime on the CPU beside PyTorch eager, phase by phase, on one bundle; and what its memory comes to.

    python benchmarks/onnxruntime_cpu.py speed BUNDLE --pairs 2
    python benchmarks/onnxruntime_cpu.py memory BUNDLE

`speed` evaluates the same inputs with the phase's engine (weights packed, and shared) and with its PhaseUNet in PyTorch
eager, in one process, in turn and back, all on the same number of threads. `memory` opens the engines as a server does,
each way in a process of its own, and gives the resident set after the last engine was opened and at its highest. Both
print Markdown. Needs `hidiff-export`; nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import hidiff_runtime
from hidiff_runtime.format.manifest import GraphRecord

WAYS = ("packed", "shared")


def random_inputs(record: GraphRecord) -> dict[str, Any]:
    """Standard normal inputs, timestep 500, shifts from 0 to 3."""
    draw = np.random.default_rng(0)
    inputs = {spec.name: draw.standard_normal(spec.shape).astype(spec.dtype) for spec in record.inputs}
    inputs["timestep"][:] = 500
    if "window_shifts" in inputs:
        inputs["window_shifts"] = draw.integers(0, 4, inputs["window_shifts"].shape, dtype=np.int32)
    return inputs


def seconds(action: Callable[[], object]) -> float:
    """How long ``action`` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def memory_gb(key: str) -> float:
    """``VmRSS``, ``RssAnon`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024 / 1e9


def speed(folder: Path, pairs: int) -> None:
    """Prints one row a phase."""
    import torch

    from hidiff_export.modules.phase_unet import PhaseUNet
    from hidiff_export.recipe import Recipe
    from hidiff_export.reference.reference_weights import networks_of_store

    manifest = hidiff_runtime.open(folder, verify="size").manifest
    recipe = Recipe.from_dict(manifest.recipe)
    unet = networks_of_store(folder, recipe).unet
    print("| phase | PyTorch eager, s | packed, s | shared, s | packed / PyTorch | shared / PyTorch |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for record in manifest.phases:
        inputs = random_inputs(record)
        module = PhaseUNet(unet, recipe.unet_layout, record.phase, recipe.latent_height, recipe.latent_width)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}

        def eager(module: PhaseUNet = module, tensors: dict[str, Any] = tensors) -> None:
            with torch.inference_mode():
                module(**PhaseUNet.arguments(tensors))

        took: dict[str, list[float]] = {"PyTorch": []} | {way: [] for way in WAYS}
        for pair in range(pairs):
            order = list(took) if pair % 2 == 0 else list(took)[::-1]
            for name in order:
                if name == "PyTorch":
                    took[name].append(seconds(eager))
                    continue
                with hidiff_runtime.open(folder, verify="size", weights=name) as bundle:
                    took[name].append(seconds(partial(bundle.engine(record.phase).run, inputs)))
        middle = {name: statistics.median(values) for name, values in took.items()}
        ratios = [middle[way] / middle["PyTorch"] for way in WAYS]
        cells = [*(f"{value:.1f}" for value in middle.values()), *(f"{ratio:.2f}" for ratio in ratios)]
        print(f"| {record.phase.name} | {' | '.join(cells)} |", flush=True)


def serve(folder: Path, resident: str, weights: str) -> dict[str, Any]:
    """Evaluates every phase in turn, and asks for the first again; what it took and what memory that left."""
    with hidiff_runtime.open(folder, verify="size", resident=resident, weights=weights) as bundle:
        opened, evaluated = [], []
        for record in bundle.manifest.phases:
            opened.append(seconds(partial(bundle.engine, record.phase)))
            evaluated.append(seconds(partial(bundle.engine(record.phase).run, random_inputs(record))))
        opened.append(seconds(partial(bundle.engine, bundle.manifest.phases[0].phase)))
        return {
            "open": opened,
            "evaluate": evaluated,
            "resident": memory_gb("VmRSS"),
            "own": memory_gb("RssAnon"),
            "highest": memory_gb("VmHWM"),
        }


def memory(folder: Path) -> None:
    """Prints one row for each way to keep engines and weights."""
    print("| engines kept | weights | resident, GB | of it own, GB | highest, GB | open each, s | evaluate each, s |")
    print("| --- | --- | ---: | ---: | ---: | --- | --- |")
    for resident in ("current", "all"):
        for weights in WAYS:
            command = [sys.executable, __file__, "serve", str(folder), "--resident", resident, "--weights", weights]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells = [f"{found[key]:.2f}" for key in ("resident", "own", "highest")]
            cells += [", ".join(f"{value:.1f}" for value in found[key]) for key in ("open", "evaluate")]
            print(f"| {resident} | {weights} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "serve"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--resident", default="current", help="for serve")
    parser.add_argument("--weights", default="packed", help="for serve")
    given = parser.parse_args()
    if given.what == "speed":
        speed(given.folder, given.pairs)
    elif given.what == "memory":
        memory(given.folder)
    else:
        print(json.dumps(serve(given.folder, given.resident, given.weights)))


if __name__ == "__main__":
    main()
