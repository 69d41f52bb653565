"""The table of float32 operations, and networks that are float32 throughout."""

from __future__ import annotations

import pytest

from hidiff_export.checkpoints.component import Component
from hidiff_export.graph.float32_ops import FLOAT32_OPERATIONS, float32_operation_of, precision_of
from hidiff_export.recipe.field_types import Precision


def test_each_operator_belongs_to_one_float32_operation() -> None:
    operators = [operator for operation in FLOAT32_OPERATIONS for operator in operation.operators]
    assert len(set(operators)) == len(operators)
    assert all(float32_operation_of(operator) in FLOAT32_OPERATIONS for operator in operators)
    assert float32_operation_of("Conv") is None


def test_each_float32_operation_has_a_reason() -> None:
    assert all(operation.reason.endswith(".") for operation in FLOAT32_OPERATIONS)


@pytest.mark.parametrize("component", [component for component in Component if component is not Component.VAE])
@pytest.mark.parametrize("precision", list(Precision))
def test_all_but_the_vae_are_stored_in_the_recipes_precision(component: Component, precision: Precision) -> None:
    stored = Precision.FLOAT16 if precision in (Precision.INT8, Precision.FP8) else precision
    assert precision_of(component.value, precision) is stored


def test_the_vae_is_never_float16() -> None:
    assert {precision: precision_of("vae", precision) for precision in Precision} == {
        Precision.FLOAT32: Precision.FLOAT32,
        Precision.FLOAT16: Precision.FLOAT32,
        Precision.BFLOAT16: Precision.BFLOAT16,
        Precision.INT8: Precision.FLOAT32,
        Precision.FP8: Precision.FLOAT32,
    }
