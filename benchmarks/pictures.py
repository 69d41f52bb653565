"""A whole picture on the CPU without PyTorch: resident memory from prompt to PNG, and the time to the first step.

    python benchmarks/pictures.py memory BUNDLE --steps 4
    python benchmarks/pictures.py start BUNDLE

`memory` draws one picture in a process of its own, once for each way to keep weights, and gives the resident set at its
highest before the first step, while denoising, and while decoding, beside the size of the weights. `start` starts
a process, opens the bundle with hashes by size, encodes a prompt, opens the first phase's engine and stops where
the first evaluation would begin; the files are read once before, so that the disk is warm. Both print Markdown. Nothing
here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import hidiff_runtime
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.errors import Cancelled
from hidiff_runtime.format.manifest import Manifest

WAYS = ("packed", "shared")
STAGES = ("text", "denoise", "decode")
PROMPT = "a lighthouse at dusk, waves, oil on canvas"
_SAMPLE_EVERY = 0.02
_CHUNK = 1 << 24


class Memory:
    """The highest resident set of this process while each stage lasted, in GB."""

    def __init__(self) -> None:
        self.stage = STAGES[0]
        self.highest = dict.fromkeys(STAGES, 0.0)
        self._done = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[Memory]:
        """Looks at the resident set all the while."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_EVERY):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.highest[self.stage] = max(self.highest[self.stage], pages * 4096 / 1e9)


def draw(folder: Path, weights: str, steps: int) -> dict[str, float]:
    """Draws one picture; the highest resident set of each stage."""
    with Memory().watched() as memory, hidiff_runtime.Pipeline.open(folder, verify="size", weights=weights) as pipe:

        def finished(info: Any) -> None:
            memory.stage = STAGES[2] if info.step + 1 == info.steps else STAGES[1]

        engine = Bundle.engine

        def begun(bundle: Bundle, *args: Any, **options: Any) -> Any:
            memory.stage = STAGES[1]
            return engine(bundle, *args, **options)

        with mock.patch.object(Bundle, "engine", begun):
            pipe(PROMPT, seed=1, steps=steps, callback=finished)
    return memory.highest


def start(folder: Path, weights: str) -> None:
    """Goes as far as the first evaluation, then ends."""
    engine = Bundle.engine

    def opened(bundle: Bundle, *args: Any, **options: Any) -> Any:
        engine(bundle, *args, **options)
        raise Cancelled("The first step begins.")

    with (
        mock.patch.object(Bundle, "engine", opened),
        hidiff_runtime.Pipeline.open(folder, verify="size", weights=weights) as pipe,
    ):
        try:
            pipe(PROMPT, seed=1)
        except Cancelled:
            return
    raise SystemExit("The run ended without a step.")


def warm(folder: Path) -> None:
    """Reads every file, so that what follows finds it in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(_CHUNK):
                    pass


def in_a_process(*arguments: object) -> str:
    """Runs one command of this script; what it printed."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report_memory(folder: Path, steps: int) -> None:
    """Prints a row for each way to keep weights."""
    manifest = Manifest.read(folder)
    stored = sum(manifest.files[path].size for path in manifest.weights.values()) / 1e9
    print(f"Weights: {stored:.2f} GB; 1.3 times that: {1.3 * stored:.2f} GB.\n")
    print("| weights | highest before the first step, GB | while denoising | while decoding | of the weights |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way in WAYS:
        highest = json.loads(in_a_process("draw", folder, "--weights", way, "--steps", steps))
        cells = " | ".join(f"{highest[stage]:.2f}" for stage in STAGES)
        print(f"| {way} | {cells} | {max(highest.values()) / stored:.2f}x |", flush=True)


def report_start(folder: Path, runs: int) -> None:
    """Prints a row for each way to keep weights."""
    print("| weights | start to first step, s: median | all |")
    print("| --- | ---: | --- |")
    for way in WAYS:
        took = []
        for _ in range(runs):
            warm(folder)
            started = time.perf_counter()
            in_a_process("first", folder, "--weights", way)
            took.append(time.perf_counter() - started)
        print(f"| {way} | {statistics.median(took):.1f} | {', '.join(f'{s:.1f}' for s in took)} |", flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "start", "draw", "first"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--weights", choices=WAYS, default=WAYS[0], help="for draw and first")
    given = parser.parse_args()
    if given.what == "memory":
        report_memory(given.folder, given.steps)
    elif given.what == "start":
        report_start(given.folder, given.runs)
    elif given.what == "draw":
        print(json.dumps(draw(given.folder, given.weights, given.steps)))
    else:
        start(given.folder, given.weights)


if __name__ == "__main__":
    main()
