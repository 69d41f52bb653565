"""Exports the text encoders at full width, compares ONNX Runtime with PyTorch, and builds TensorRT-RTX engines.

    python benchmarks/text_encoders.py --work /tmp/text-encoders > benchmarks/text_encoders.md

Each step runs in a process of its own, whose time and largest resident set are given, the pages of the mapped weight
store included. Weights are random:0. float32 graphs are compared with PyTorch on ONNX Runtime; TensorRT-RTX engines
are built from float16 ones, for sm89, without a GPU. Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hidiff_export.families.family import Family, Task, Width
from hidiff_export.recipe.field_types import Precision

ENCODERS = {
    "CLIP ViT-L (SD1.5, SDXL)": ("sd15", "text_encoder"),
    "OpenCLIP ViT-H (SD2.1)": ("sd21", "text_encoder"),
    "OpenCLIP bigG (SDXL)": ("sdxl", "text_encoder_2"),
}
PROMPT = "a lighthouse at dusk, waves, oil on canvas"
_RUNS = 5


class Encoder:
    """One text encoder in one precision, and its files."""

    def __init__(self, family: str, name: str, precision: str, folder: Path) -> None:
        from hidiff_export.checkpoints.component import Component

        self.family, self.component, self.precision = Family(family), Component(name), Precision(precision)
        self.folder = folder
        self.weights = folder / "weights.safetensors"
        self.graph = folder / "text_encoder.onnx"
        self.engine = folder / "text_encoder.onnxruntime.onnx"

    def store(self) -> dict[str, Any]:
        """Writes the weights."""
        from hidiff_export.checkpoints.load import load
        from hidiff_export.checkpoints.weight_store import WeightStore

        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = load(self.component, "random:0", self.family, Task.TEXT_TO_IMAGE, Width.FULL)
        return {"bytes": WeightStore.write(checkpoint.state_dict, self.weights, self.precision).nbytes}

    def module(self) -> Any:
        """The PyTorch module over the stored weights."""
        from hidiff_export.checkpoints.load import build
        from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
        from hidiff_export.modules.text_encoder import TextEncoderModule

        config = self.component.config(self.family, Task.TEXT_TO_IMAGE, Width.FULL)
        tensors = WeightStore.open(self.weights).state_dict()
        model = build(self.component, config, tensors, PRECISIONS[self.precision][1])
        return TextEncoderModule(model, penultimate=self.family.is_sdxl)

    def record(self) -> Any:
        """What goes in and out."""
        from hidiff_runtime.format.manifest import GraphRecord

        module = self.module()
        return GraphRecord(self.graph.name, {}, module.input_specs(1), module.output_specs(1))

    def export(self) -> dict[str, Any]:
        """Writes the portable graph and ONNX Runtime's."""
        from hidiff_export.checkpoints.weight_store import WeightStore
        from hidiff_export.engines.onnxruntime import lower
        from hidiff_export.graph.portable import write_graph

        write_graph(self.module(), 1, WeightStore.open(self.weights), self.graph)
        lower(self.graph, self.engine)
        return {"bytes": self.graph.stat().st_size}

    def inputs(self) -> dict[str, Any]:
        """A prompt's tokens."""
        from hidiff_export.checkpoints.tokenizer import tokenizer_json
        from hidiff_runtime.format.tokenizer import Tokenizer

        path = self.folder / "tokenizer.json"
        path.write_text(tokenizer_json("random:0", self.component, self.family, Width.FULL), encoding="utf-8")
        ids = Tokenizer.open(path).encode(PROMPT).ids
        return {"input_ids": np.array([ids], np.int32), "clip_skip": np.zeros(1, np.int32)}

    def pytorch(self) -> dict[str, Any]:
        """Keeps what PyTorch gives."""
        import torch

        module = self.module()
        with torch.inference_mode():
            found = module(**{name: torch.from_numpy(array) for name, array in self.inputs().items()})
        names = [spec.name for spec in module.output_specs(1)]
        np.savez(self.folder / "expected.npz", **{n: t.numpy() for n, t in zip(names, found, strict=True)})
        return {}

    def onnxruntime(self) -> dict[str, Any]:
        """The worst output's signal-to-noise ratio, the engine's opening and an evaluation."""
        from hidiff_runtime.backends import get
        from hidiff_runtime.verification.comparison import Metrics

        began = time.perf_counter()
        with (
            get("onnxruntime").device({}) as device,
            device.open(self.engine, {self.folder.name: self.weights}, self.record()) as session,
        ):
            opened = time.perf_counter() - began
            found, seconds = session.run(self.inputs()), []
            for _ in range(_RUNS):
                began = time.perf_counter()
                session.run(self.inputs())
                seconds.append(time.perf_counter() - began)
        expected = np.load(self.folder / "expected.npz")
        worst = min(Metrics.of(expected[name], found[name]).snr_db for name in expected)
        return {"snr_db": worst, "opened": opened, "run": sorted(seconds)[_RUNS // 2]}

    def tensorrt(self) -> dict[str, Any]:
        """Builds the plan."""
        from hidiff_export.engines.protocol import PortableGraph
        from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
        from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX

        record = self.record()
        TensorRtBuilder(TENSORRT_RTX, ("sm89",)).build([PortableGraph(self.graph, record)], lambda *_: None)
        return {"bytes": self.graph.with_name("text_encoder.tensorrt-rtx.plan").stat().st_size}


STEPS: dict[str, Callable[[Encoder], dict[str, Any]]] = {
    "store": Encoder.store,
    "export": Encoder.export,
    "pytorch": Encoder.pytorch,
    "onnxruntime": Encoder.onnxruntime,
    "tensorrt": Encoder.tensorrt,
}
_OF_PRECISION = {
    "float32": ("store", "export", "pytorch", "onnxruntime"),
    "float16": ("store", "export", "tensorrt"),
}


def measure(arguments: list[str]) -> int:
    """One step; prints what it took as JSON. A worker process's memory counts where it was larger."""
    step, family, name, precision, folder = arguments
    began = time.perf_counter()
    found = STEPS[step](Encoder(family, name, precision, Path(folder)))
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": max(peaks) * 1024, **found}))
    return 0


def encoder_rows(title: str, work: Path) -> list[str]:
    """The rows of one text encoder; its files are removed again."""
    family, name = ENCODERS[title]
    rows = []
    for precision, steps in _OF_PRECISION.items():
        folder = work / name
        for step in steps:
            command = [sys.executable, __file__, "--step", step, family, name, precision, str(folder)]
            done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            print(f"{title}: {step} {done}", file=sys.stderr)
            size = f"{done['bytes'] / 1e6:,.1f} MB" if "bytes" in done else ""
            note = ""
            if step == "onnxruntime":
                times = f"opens in {done['opened']:.1f} s; {done['run']:.2f} s a prompt"
                note = f"{done['snr_db']:.0f} dB to PyTorch; {times}"
            cells = (title, precision, step, f"{done['seconds']:.0f} s", f"{done['peak'] / 1e9:.1f} GB", size, note)
            rows.append(f"| {' | '.join(cells)} |")
        shutil.rmtree(folder)
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--step"]:
        return measure(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the files, some 3 GB at a time")
    options = parser.parse_args()
    print("# Text encoders at full width\n")
    print("Written by `python benchmarks/text_encoders.py --work FOLDER > benchmarks/text_encoders.md` on")
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}. Weights are random:0.")
    print("Peak is the largest resident set of the step's process or its worker, mapped weights included.\n")
    print("| text encoder | precision | step | time | peak | size | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for title in ENCODERS:
        print("\n".join(encoder_rows(title, options.work)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
