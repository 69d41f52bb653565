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

from hidiff_export.engines.tensorrt.lowering import lower
from tests.export.engines.tensorrt import kernel_source
from tests.export.engines.tensorrt.kernel_source import group_sums, kernels, reductions
from tests.export.engines.tensorrt.small_engines import TYPES, attention, build, model, request

pytestmark = pytest.mark.needs("tensorrt-rtx")


def source(folder: Path, graph: onnx.ModelProto) -> str:
    made = request(folder, graph)
    build(made)
    return kernel_source.source(Path(made.plan))


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


def random(size: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size).astype(helper.tensor_dtype_to_np_dtype(TYPES[dtype]))


def normalization(shape: list[int], groups: int, dtype: str = "float16", *, cast: bool = False) -> onnx.ModelProto:
    """Group normalization and SiLU, in 16 bits or between casts."""
    nodes, names, normal = [], ["x", "scale", "bias"], "n"
    if cast:
        nodes = [helper.make_node("Cast", [name], [f"{name}_wide"], to=onnx.TensorProto.FLOAT) for name in names]
        names = [f"{name}_wide" for name in names]
    nodes.append(helper.make_node("GroupNormalization", names, [normal], num_groups=groups))
    if cast:
        normal = "narrow"
        nodes.append(helper.make_node("Cast", ["n"], [normal], to=TYPES[dtype]))
    nodes.append(helper.make_node("Sigmoid", [normal], ["s"]))
    nodes.append(helper.make_node("Mul", [normal, "s"], ["y"]))
    weights = [numpy_helper.from_array(random(shape[1], dtype), name) for name in ("scale", "bias")]
    return model(nodes, [("x", dtype, shape)], [("y", dtype, shape)], *weights)


def layer_normalization(dtype: str, **attributes: int) -> onnx.ModelProto:
    shape = [2, 64, 320]
    node = helper.make_node("LayerNormalization", ["x", "scale"], ["y"], "norm", axis=-1, **attributes)
    weight = numpy_helper.from_array(random(320, dtype), "scale")
    return model([node], [("x", dtype, shape)], [("y", dtype, shape)], weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "groups"), [([2, 64, 4, 4], 8), ([2, 64, 32, 32], 8), ([2, 320, 128, 128], 32)], ids=str
)
def test_group_normalizations_take_means_in_float32(shape: list[int], groups: int, dtype: str, tmp_path: Path) -> None:
    text = source(tmp_path, lowered(normalization(shape, groups, dtype)))
    assert group_sums(text) == {"float"}
    assert set(kernels(text)) - {"__myl_Move"} <= {"__myl_GnorSilu", "__myl_SiluGnor"}


def test_casts_would_cost_a_group_normalization_its_fusion(tmp_path: Path) -> None:
    fused, split = (
        len(kernels(source(tmp_path, normalization([2, 64, 32, 32], 8, cast=cast)))) for cast in (False, True)
    )
    assert fused == 1 < split


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layer_normalizations_add_up_in_float32_in_one_kernel_with_their_casts(dtype: str, tmp_path: Path) -> None:
    text = source(tmp_path, lowered(layer_normalization(dtype)))
    assert reductions(text, "Add") == {"float"}
    (kernel,) = kernels(text)
    assert kernel.count("Cast") == 2


@pytest.mark.parametrize("stash_type", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_stash_type_changes_nothing(stash_type: int, tmp_path: Path) -> None:
    without, with_it = (
        source(tmp_path, layer_normalization("float16", **attributes))
        for attributes in ({}, {"stash_type": stash_type})
    )
    assert with_it == without


def test_a_reduction_that_needs_no_float32_is_in_float16(tmp_path: Path) -> None:
    axis = numpy_helper.from_array(np.array([-1], np.int64), "axis")
    shapes = [("x", "float16", [2, 32, 1024])], [("y", "float16", [2, 32, 1])]
    text = source(tmp_path, model([helper.make_node("ReduceMax", ["x", "axis"], ["y"])], *shapes, axis))
    assert reductions(text, "Max") == {"half"}
    assert reductions(text, "Add") == set()
