"""Products with a transposed weight, as OpenVINO compiles them fast."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.gemm_to_mat_mul import GemmToMatMul
from tests.export.graph.small import apply, graph

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((5, 4)).astype(np.float32)
BIAS = RANDOM.standard_normal(5).astype(np.float32)


def product(*inputs: str, weight: np.ndarray = WEIGHT, **attributes: float) -> ir.Model:
    constants = {"w": weight, "b": BIAS}
    nodes = [make_node("Gemm", ["x", *inputs], ["y"], **{"transB": 1, **attributes})]
    return graph(nodes, {"x": [6, 4]}, constants={name: constants[name] for name in inputs})


@pytest.mark.parametrize(("inputs", "expected"), [(["w", "b"], {"Add": 1}), (["w"], {})])
def test_a_product_and_its_bias(inputs: list[str], expected: dict[str, int]) -> None:
    assert apply(product(*inputs), GemmToMatMul()) == {"Transpose": 1, "MatMul": 1, **expected}


@pytest.mark.parametrize(
    ("attributes", "weight"),
    [({"alpha": 0.5}, WEIGHT), ({"beta": 2.0}, WEIGHT), ({"transB": 0}, np.ascontiguousarray(WEIGHT.T))],
)
def test_others_stay(attributes: dict[str, float], weight: np.ndarray) -> None:
    lowering = GemmToMatMul()
    assert apply(product("w", "b", weight=weight, **attributes), lowering) == {"Gemm": 1}
    assert len(lowering.declined) == 1


def test_a_computed_weight_stays() -> None:
    """One that is dequantized, above all: OpenVINO knows a product of integers by its Gemm."""
    nodes = [make_node("Abs", ["w"], ["a"]), make_node("Gemm", ["x", "a"], ["y"], transB=1)]
    model = graph(nodes, {"x": [6, 4]}, constants={"w": WEIGHT})
    assert apply(model, GemmToMatMul()) == {"Abs": 1, "Gemm": 1}
