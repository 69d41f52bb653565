"""The VAE at full width: what decoding takes with ONNX Runtime on the CPU, and what a tile is as a TensorRT-RTX plan.

    python benchmarks/vae.py export FOLDER --family sdxl --pixels 1024
    python benchmarks/vae.py decode FOLDER --pixels 2048
    python benchmarks/vae.py encode FOLDER --pixels 2048
    python benchmarks/vae.py tensorrt FOLDER

`export` writes a fabricated VAE as a bundle holds it, graphs and engines of the tile that a picture of `--pixels` gets.
`decode` and `encode` run one picture through it in a process of its own, as the runtime does, and print a row of
Markdown: seconds to open the engine, of a tile, of a tile on all processors together, and of the picture; and the
highest resident memory in GB. `tensorrt` builds plans of the same graphs for sm89: seconds, then GB of memory while
building, of the plan, of its weights and of its scratch memory. Needs `hidiff-export`; nothing here is asserted by the
test-suite.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hidiff_runtime.backends.onnxruntime import OnnxRuntimeBackend
from hidiff_runtime.format.manifest import GraphRecord, TensorSpec
from hidiff_runtime.format.specs import VaeRecord
from hidiff_runtime.pipeline.vae import decode_tiles, encode_tiles

WEIGHTS, RECORD = "weights.safetensors", "record.json"
HALVES = ("decoder", "encoder")


def highest_gb() -> float:
    """The most resident memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e9


def export(folder: Path, family: str, pixels: int) -> None:
    """Writes weights, portable graphs, ONNX Runtime's engines and what `record` reads."""
    from hidiff_export.checkpoints.component import Component
    from hidiff_export.checkpoints.load import build, load
    from hidiff_export.checkpoints.weight_store import WeightStore
    from hidiff_export.engines.onnxruntime import lower
    from hidiff_export.families.family import Family, Task
    from hidiff_export.families.vae_tiling import VaeTiles
    from hidiff_export.graph.portable import write_graph
    from hidiff_export.modules.vae import VaeDecoder, VaeEncoder
    from hidiff_export.recipe.field_types import Precision

    folder.mkdir(parents=True)
    checkpoint = load(Component.VAE, "random:0", Family(family), Task.TEXT_TO_IMAGE)
    store = WeightStore.write(checkpoint.state_dict, folder / WEIGHTS, Precision.FLOAT32)
    vae = build(Component.VAE, checkpoint.config, store.state_dict())
    tiles = VaeTiles.of(pixels, pixels, None)
    for half, module in zip(HALVES, (VaeDecoder(vae, tiles), VaeEncoder(vae, tiles)), strict=True):
        write_graph(module, 1, store, folder / f"{half}.onnx")
        lower(folder / f"{half}.onnx", folder / f"{half}.onnxruntime.onnx")
    content = {"tile": tiles.height, "overlap": tiles.overlap, "scaling_factor": checkpoint.config["scaling_factor"]}
    (folder / RECORD).write_text(json.dumps({"family": family, **content}))


def record(folder: Path) -> tuple[dict[str, Any], VaeRecord]:
    """What `export` wrote, and the manifest's record of it."""
    content = json.loads((folder / RECORD).read_text())
    side = content["tile"]
    latents = TensorSpec("latents", (1, 4, side // 8, side // 8), "float32")
    image = TensorSpec("image", (1, 3, side, side), "float32")
    moments = TensorSpec("moments", (1, 8, side // 8, side // 8), "float32")
    decoder = GraphRecord("decoder.onnx", {}, (latents,), (image,))
    encoder = GraphRecord("encoder.onnx", {}, (image,), (moments,))
    return content, VaeRecord(decoder, encoder, content["scaling_factor"], content["overlap"], ())


class Enough(Exception):  # noqa: N818 - no error
    """As many tiles were run as were asked for."""


def run(folder: Path, half: str, pixels: int, threads: int, most: int | None) -> None:
    """Prints a row: one picture through one half of the VAE, or the first tiles of it."""
    content, vae = record(folder)
    decoding = half == "decoder"
    side, channels = (pixels // 8, 4) if decoding else (pixels, 3)
    given = np.random.default_rng(0).standard_normal((1, channels, side, side), np.float32)
    done: list[float] = []
    total = 0

    def progress(tile: int, tiles: int) -> None:
        nonlocal total
        done.append(time.perf_counter())
        total = tiles
        print(f"{half} {pixels}: tile {tile} of {tiles}, {highest_gb():.2f} GB", file=sys.stderr, flush=True)
        if tile == most:
            raise Enough

    backend, graph = OnnxRuntimeBackend(), vae.decoder if decoding else vae.encoder
    started = time.perf_counter()
    with (
        backend.device({"device": "cpu", "threads": threads}) as device,
        device.open(folder / f"{half}.onnxruntime.onnx", {"vae": folder / WEIGHTS}, graph) as session,
    ):
        opened, before = time.perf_counter(), time.process_time()
        with suppress(Enough):
            (decode_tiles if decoding else encode_tiles)(session, vae, given, progress)
        busy = time.process_time() - before
    each = (done[-1] - opened) / len(done)
    tiles = f"{total} of {content['tile']} px" + ("" if len(done) == total else f", {len(done)} run")
    times = [opened - started, each, busy / len(done), each * total]
    figures = [*(f"{seconds:.1f}" for seconds in times), f"{highest_gb():.2f}"]
    print("| " + " | ".join([content["family"], half, str(pixels), tiles, str(content["overlap"]), *figures]) + " |")


def tensorrt(folder: Path) -> None:
    """Prints a row for each half's plan."""
    from hidiff_export.engines.protocol import PortableGraph
    from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
    from hidiff_export.engines.tensorrt.built_plans import Built
    from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX
    from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord

    content, vae = record(folder)
    for half in HALVES:
        graph = PortableGraph(folder / f"{half}.onnx", getattr(vae, half))
        builder = TensorRtBuilder(TENSORRT_RTX, ("sm89",))
        builder.build([graph], lambda _done, _total, _note: None)
        (path,) = builder.engines([graph])
        plan = PlanRecord.read(path)
        built = Built.read(path)
        assert built is not None
        size = sum(part.stat().st_size for part in plan.paths(path))
        sizes = [built.costs["peak_bytes"], size, plan.options["weights_bytes"], plan.options["scratch_bytes"]]
        figures = [f"{built.costs['seconds']:.0f}", *(f"{nbytes / 1e9:.2f}" for nbytes in sizes)]
        print("| " + " | ".join([content["family"], half, f"{content['tile']} px", *figures]) + " |", flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "decode", "encode", "tensorrt"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="sdxl", help="for export")
    parser.add_argument("--pixels", type=int, default=1024, help="side of the picture")
    parser.add_argument("--tiles", type=int, help="how many to run, for an estimate; all by default")
    parser.add_argument("--threads", type=int, default=0, help="0 for all cores")
    given = parser.parse_args()
    if given.what == "export":
        export(given.folder, given.family, given.pixels)
    elif given.what == "tensorrt":
        tensorrt(given.folder)
    else:
        run(given.folder, f"{given.what}r", given.pixels, given.threads, given.tiles)


if __name__ == "__main__":
    main()
