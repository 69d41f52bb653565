"""In which type TensorRT's kernels add up, read from the source of the kernels in a plan of TensorRT-RTX.

A plan carries the kernels that it makes as CUDA source, to be compiled on the user's GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from hidiff_export.build.tensorrt.lowering import lower
from tests.export.build.tensorrt.small_engines import attention, build, model, request

pytestmark = pytest.mark.needs("tensorrt-rtx")

SHAPE = [2, 64, 32, 32]


def source(folder: Path, graph: onnx.ModelProto) -> str:
    made = request(folder, graph)
    build(made)
    return Path(made.plan).read_bytes().decode("latin-1")


def lowered(graph: onnx.ModelProto) -> onnx.ModelProto:
    found = ir.from_proto(graph)
    lower(found)
    return ir.to_proto(found)


def sums(text: str) -> set[str]:
    """Types in which the fused attention kernel's two products add up."""
    return set(re.findall(r"Ampere_hmma_(\w+?)_traits", text))


def test_attention_adds_up_in_float32(tmp_path: Path) -> None:
    assert sums(source(tmp_path, lowered(attention(64)))) == {"fp32"}


def test_attention_as_it_stands_adds_up_in_float16(tmp_path: Path) -> None:
    assert "fp16" in sums(source(tmp_path, attention(64)))


def scale(text: str) -> float:
    """What the kernel multiplies scores by."""
    first, *_ = re.findall(r"\.initialize\(DATA_TYPE[^)]*?, (0x[0-9a-f.]+p[-+]\d+)f,", text)
    return float.fromhex(first)


def test_scores_are_scaled_exactly(tmp_path: Path) -> None:
    assert scale(source(tmp_path, lowered(attention(64)))) == pytest.approx(64**-0.5, rel=1e-6)


def test_as_it_stands_the_scale_is_rounded_to_float16(tmp_path: Path) -> None:
    assert scale(source(tmp_path, attention(64))) != pytest.approx(64**-0.5, rel=1e-4)


def normalisation(*, cast: bool = False) -> onnx.ModelProto:
    """Group normalisation and SiLU, in float16 or between casts."""
    nodes, names, normal = [], ["x", "scale", "bias"], "n"
    if cast:
        nodes = [helper.make_node("Cast", [name], [f"{name}_wide"], to=onnx.TensorProto.FLOAT) for name in names]
        names = [f"{name}_wide" for name in names]
    nodes.append(helper.make_node("GroupNormalization", names, [normal], num_groups=8))
    if cast:
        normal = "narrow"
        nodes.append(helper.make_node("Cast", ["n"], [normal], to=onnx.TensorProto.FLOAT16))
    nodes.append(helper.make_node("Sigmoid", [normal], ["s"]))
    nodes.append(helper.make_node("Mul", [normal, "s"], ["y"]))
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal(SHAPE[1]).astype(np.float16), name) for name in ("scale", "bias")
    ]
    return model(nodes, [("x", "float16", SHAPE)], [("y", "float16", SHAPE)], *weights)


def kernels(text: str) -> set[str]:
    return set(re.findall(r"function=\{ name=(\w+)", text))


def test_a_float16_normalisation_takes_means_in_float32(tmp_path: Path) -> None:
    text = source(tmp_path, lowered(normalisation()))
    assert set(re.findall(r"norm(?:_non_contiguous)?<(\w+),", text)) == {"__myln_float"}
    assert kernels(text) == {"__myl_GnorSilu"}


def test_casts_would_cost_a_normalisation_its_fusion(tmp_path: Path) -> None:
    assert len(kernels(source(tmp_path, normalisation(cast=True)))) > 1
