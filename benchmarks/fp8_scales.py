"""Measures what fp8 scales cost a UNet: ModelOpt's, those that use the whole range, and those with room.

    python benchmarks/fp8_scales.py --work /tmp/fp8 > benchmarks/fp8_scales.md

SD1.5 in the windowed phase, weights fabricated; ``--gains`` spreads the gains of normalizations (the deviation of their
logarithm), which gives activations the heavy tails that trained networks have. Ranges are measured on three
evaluations; judged are six others of new seeds, and three whose prompt embeddings are 1.5 times as large, as emphasis
in a prompt makes them. Reference is PyTorch in float32, engine ONNX Runtime's CPU provider, which emulates fp8.
Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
from hidiff_export.families.family import Family, Task, Width, unet_config
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.graph.portable import write_graph
from hidiff_export.graph.quantized_tensor import FP8_LARGEST, INT8_LARGEST, MODELOPT_FP8
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.quantization.quantize import quantize_graph
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.random_inputs import arrays, mixed_shifts, random_inputs
from hidiff_runtime.phases import Phase, PhaseKind
from hidiff_runtime.verification.comparison import Metrics

LATENTS = 16
WIDER = {"block_out_channels": [96, 192, 384, 384], "norm_num_groups": 16}
LAYOUT = Layout.of(Family.SD15)
WHOLE, ROOM, MODELOPT = 1 / FP8_LARGEST, 1 / INT8_LARGEST, MODELOPT_FP8
"""What the largest number is multiplied by."""

SCALES = {
    "ModelOpt's": (MODELOPT, MODELOPT),
    "weights 448": (WHOLE, MODELOPT),
    "weights 448, inputs 127 (built)": (WHOLE, ROOM),
    "weights 448, inputs 224": (WHOLE, 2 * WHOLE),
    "all 448": (WHOLE, WHOLE),
}
"""Of weights and of what layers read: the number that the largest one becomes."""

Inputs = dict[str, Any]


class Network:
    """A UNet and its graphs in float16 and fp8."""

    def __init__(self, folder: Path, *, wider: bool, gains: float) -> None:
        config = unet_config(Family.SD15, Task.TEXT_TO_IMAGE, Width.FULL if wider else Width.TINY)
        config = {**config, **(WIDER if wider else {})}
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(5)
        tensors = {
            name: tensor * torch.from_numpy(np.exp(gains * random.standard_normal(tensor.shape) - gains**2)).float()
            if tensor.ndim == 1 and name.endswith("weight")
            else tensor
            for name, tensor in synthesize(Component.UNET, config, 0).items()
        }
        store = WeightStore.write(tensors, folder / "weights.safetensors", Precision.FLOAT16)
        self.reference, half = (
            PhaseUNet(
                build(Component.UNET, config, store.state_dict(), kind),
                LAYOUT,
                Phase(PhaseKind.WINDOWED),
                LATENTS,
                LATENTS,
            )
            for kind in (torch.float32, PRECISIONS[Precision.FLOAT16][1])
        )
        self.half, self.fp8 = folder / "half.onnx", folder / "fp8.onnx"
        write_graph(half, 2, store, self.half)
        measured = [self.inputs(11 + index, timestep) for index, timestep in enumerate((901.0, 601.0, 301.0))]
        quantize_graph(self.half, measured, Precision.FP8, self.fp8)

    def inputs(self, seed: int, timestep: float, emphasis: float = 1.0) -> Inputs:
        """One evaluation's inputs."""
        size = 8 * LATENTS
        specs = self.reference.input_specs(2)
        drawn = arrays(random_inputs(specs, timestep=timestep, width=size, height=size, seed=seed))
        drawn["prompt_embeds"] = drawn["prompt_embeds"] * np.float32(emphasis)
        return {**drawn, "window_shifts": mixed_shifts((len(LAYOUT.windowed_blocks),), seed)}

    def expected(self, inputs: Inputs) -> Any:
        """PyTorch's output."""
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
            return self.reference(**PhaseUNet.arguments(tensors)).numpy()

    def rescaled(self, weights: float, activations: float) -> Path:
        """The fp8 graph with other scales than it was built with."""
        model = onnx.load(self.fp8, load_external_data=False)
        nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        factors = {
            node.input[1]: weights / WHOLE
            if any(kept.name == "axis" for kept in node.attribute)
            else activations / ROOM
            for node in nodes
        }
        for tensor in model.graph.initializer:
            if tensor.name in factors:
                scale = onnx.numpy_helper.to_array(tensor).astype(np.float64) * factors[tensor.name]
                tensor.CopyFrom(onnx.numpy_helper.from_array(scale.astype(np.float16), tensor.name))
        path = self.fp8.with_name("rescaled.onnx")
        onnx.save(model, path)
        return path


def snr_db(graph: Path, inputs: Sequence[Inputs], expected: Sequence[Any]) -> str:
    """The mean of the signal-to-noise ratios."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    found = [Metrics.of(due, session.run(None, given)[0]).snr_db for given, due in zip(inputs, expected, strict=True)]
    return f"{np.mean(found):.1f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for weights and graphs")
    parser.add_argument("--gains", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--widths", nargs="+", default=["tiny", "wider"], choices=["tiny", "wider"])
    given = parser.parse_args()
    print("dB against float32 PyTorch: new inputs / with prompt embeddings 1.5 times as large.\n")
    print(f"| width, gains | float16 | {' | '.join(SCALES)} |\n| --- |{' ---: |' * (1 + len(SCALES))}")
    for width in given.widths:
        for gains in given.gains:
            network = Network(given.work / f"{width}-{gains:g}", wider=width == "wider", gains=gains)
            new = [network.inputs(77 + index, timestep) for index, timestep in enumerate(range(950, 199, -150))]
            loud = [network.inputs(77 + index, timestep, 1.5) for index, timestep in enumerate((950, 650, 350))]
            due = [[network.expected(inputs) for inputs in side] for side in (new, loud)]

            def cell(graph: Path, sides: Any = (new, loud), due: Any = due) -> str:
                return " / ".join(snr_db(graph, side, wanted) for side, wanted in zip(sides, due, strict=True))

            row = [cell(network.half), *(cell(network.rescaled(*scales)) for scales in SCALES.values())]
            print(f"| {width}, {gains:g} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
