"""Measures what 16-bit sums would cost a normalization, and what casts to float32 round it cost a plan.

    python -m benchmarks.normalizations --work /tmp/normalizations > benchmarks/normalizations.md
    python -m benchmarks.normalizations --work /tmp/normalizations --full >> benchmarks/normalizations.md

Sums are those of ``normalization_sums.py``. Plans are TensorRT-RTX's, for sm89, of the windowed phase in float16 with
random weights: at the tiny width and 128 pixels; with ``--full`` of SD1.5 at full width and 1024 pixels.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.normalization_sums import ELEMENTS, MEANS, TYPES, sums_db
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.graph.passes.base import Operator, Outcome, RewritePass
from hidiff_export.graph.passes.float32_operations import between_casts
from hidiff_export.graph.portable import save, write_graph
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.phases import Phase, PhaseKind


class Casts(RewritePass):
    """Puts casts to float32 round group normalizations, which the lowering leaves."""

    operators = frozenset[Operator]({("", "GroupNormalization")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Wraps one normalization."""
        return between_casts(self.build, node)


@dataclass(frozen=True)
class Plan:
    """What a plan took and holds; bytes and seconds."""

    kernels: int
    size: int
    scratch: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.kernels} | {self.size / 1e6:.1f} | {self.scratch / 1e6:.1f} | {self.seconds:.0f}"


def export(folder: Path, family: Family, width: Width) -> GraphRecord:
    """The windowed phase's portable graph, and the same with casts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    latents = 128 if width is Width.FULL else 16
    checkpoint = load(Component.UNET, "random:0", family, Task.TEXT_TO_IMAGE, width)
    store = WeightStore.write(checkpoint.state_dict, folder / "weights.safetensors", Precision.FLOAT16)
    unet = build(Component.UNET, checkpoint.config, store.state_dict(), PRECISIONS[Precision.FLOAT16][1])
    module = PhaseUNet(unet, Layout.of(family), Phase(PhaseKind.WINDOWED), latents, latents)
    write_graph(module, 2, store, folder / "phase.onnx")
    wrapped = ir.load(folder / "phase.onnx")
    Casts()(wrapped)
    save(wrapped, folder / "casts.onnx")
    return GraphRecord("phase.onnx", {}, module.input_specs(2), module.output_specs(2))


def plan(graph: Path, record: GraphRecord) -> tuple[Plan, str]:
    """Builds a graph; what it took, and in which types its kernels add up."""
    given = PortableGraph(graph, record)
    builder = TensorRtBuilder(TENSORRT_RTX, ("sm89",))
    written = builder.build([given], lambda *_: None)
    (path,) = builder.engines([given])
    made = PlanRecord.read(path)
    text = b"".join(part.read_bytes() for part in made.paths(path)).decode("latin-1")
    for file in written:
        file.unlink()
    kernels = re.findall(r"function=\{ name=(\w+)", text)
    sums = set(re.findall(r"(?:AddOp|norm\w*)<__myln_(\w+)[,>]", text))
    prebuilt = sum(name == "__myl_Inor" for name in kernels)
    note = f"sums in {', '.join(sorted(sums))}; {prebuilt} normalizations prebuilt"
    costs = made.options
    return Plan(len(kernels), len(text), costs["scratch_bytes"], costs["seconds"]), note


def report_sums() -> None:
    """Prints what 16-bit sums cost."""
    print(f"| type | elements | float32 sums | {' | '.join(f'mean {mean}' for mean in MEANS)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(MEANS)}")
    for dtype in TYPES:
        for elements in ELEMENTS:
            wide = sums_db(elements, 0, dtype, wide=True)
            found = (np.mean([sums_db(elements, mean, dtype, wide=False, seed=s) for s in range(5)]) for mean in MEANS)
            print(
                f"| {dtype} | {elements} | {wide:.1f} | {' | '.join(f'{value:.1f}' for value in found)} |", flush=True
            )


def report_casts(work: Path, families: tuple[Family, ...], width: Width) -> None:
    """Prints what casts round group normalizations cost."""
    print("\n| plan | group normalizations | kernels | plan, MB | scratch, MB | built in, s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for family in families:
        folder = work / f"{family.value}-{width.value}"
        record = export(folder, family, width)
        for name, words in (("phase.onnx", "as built"), ("casts.onnx", "with casts")):
            costs, note = plan(folder / name, record)
            print(f"| {family.value}, {width.value} | {words}; {note} | {costs} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for weights, graphs and plans")
    parser.add_argument("--full", action="store_true", help="SD1.5 at full width only: 6 GB of memory")
    given = parser.parse_args()
    if not given.full:
        report_sums()
        report_casts(given.work, (Family.SD15, Family.SD21, Family.SDXL), Width.TINY)
    else:
        report_casts(given.work, (Family.SD15,), Width.FULL)


if __name__ == "__main__":
    main()
