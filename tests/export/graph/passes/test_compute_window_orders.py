"""Window orders by arithmetic are those of the table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.families.geometry import SHIFTS, WindowShape
from hidiff_export.graph.passes.compute_window_orders import ComputeWindowOrders
from hidiff_export.modules.window_attention import token_orders
from tests.export.graph.small import evaluate, graph, operators

SHAPES = [(32, 32), (8, 4), (4, 8), (12, 20), (6, 64), (7, 9)]


def lookups(*tables: np.ndarray, batch: int = 1) -> ir.Model:
    """As the network looks orders up: a row of each table for the same shifts."""
    nodes = [make_node("Gather", [f"t{number}", "s"], [f"y{number}"], axis=0) for number in range(len(tables))]
    constants = {f"t{number}": table for number, table in enumerate(tables)}
    model = graph(nodes, {"s": [batch]}, [f"y{number}" for number in range(len(tables))], constants, integers=["s"])
    for value in model.graph.outputs:
        value.type = ir.TensorType(ir.DataType.INT32)
    return model


def computed(model: ir.Model) -> list[list[np.ndarray]]:
    return [evaluate(model, {"s": np.array([shift], np.int32)}) for shift in range(SHIFTS)]


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_every_shift_there_and_back(size: tuple[int, int]) -> None:
    tables = [table.numpy() for table in token_orders(WindowShape(*size))]
    model, lower = lookups(*tables), ComputeWindowOrders()
    assert lower(model).modified
    assert not lower.declined
    assert operators(model)["Gather"] == 0
    assert max(value.const_value.size for value in model.graph.initializers.values() if value.uses()) <= 5
    for shift, found in enumerate(computed(model)):
        for order, table in zip(found, tables, strict=True):
            np.testing.assert_array_equal(order[0], table[shift])


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_every_picture_has_its_own_shift(size: tuple[int, int]) -> None:
    tables = [table.numpy() for table in token_orders(WindowShape(*size))]
    model = lookups(*tables, batch=3)
    assert ComputeWindowOrders()(model).modified
    assert operators(model)["Gather"] == 0
    for shifts in ([0, 1, 2], [3, 3, 0]):
        found = evaluate(model, {"s": np.array(shifts, np.int32)})
        for orders, table in zip(found, tables, strict=True):
            np.testing.assert_array_equal(orders, table[shifts])


def test_it_counts_once_for_all_blocks() -> None:
    tables = [table.numpy() for table in token_orders(WindowShape(12, 20))]
    model = lookups(*tables, *tables)
    ComputeWindowOrders()(model)
    assert operators(model)["CumSum"] == 2  # rows and columns


@pytest.mark.parametrize("column", [0, 5])
def test_a_table_that_orders_no_windows_is_a_reason(column: int) -> None:
    (table, _) = (table.numpy() for table in token_orders(WindowShape(4, 8)))
    table = table.copy()
    table[2, [column, column + 1]] = table[2, [column + 1, column]]
    model, lower = lookups(table), ComputeWindowOrders()
    assert not lower(model).modified
    (reason,) = lower.declined.values()
    assert reason == "the table is not of four windows that move by the same rows and columns for each shift"


@pytest.mark.parametrize(
    "table",
    [np.zeros((4, 8), np.int32), token_orders(WindowShape(2, 6)).gather.numpy()],
    ids=["no order", "windows of one row, which move nothing"],
)
def test_other_integers_are_a_reason(table: np.ndarray) -> None:
    model, lower = lookups(table), ComputeWindowOrders()
    assert not lower(model).modified
    assert len(lower.declined) == 1


def test_other_gathers_are_none_of_its_business() -> None:
    constants = {"rows": np.zeros((3, 8), np.int32), "numbers": np.zeros((4, 8), np.float32)}
    nodes = [
        make_node("Gather", ["rows", "s"], ["a"], axis=0),
        make_node("Cast", ["a"], ["y"], to=1),
        make_node("Gather", ["numbers", "s"], ["z"], axis=0),
    ]
    model, lower = graph(nodes, {"s": [1]}, ["y", "z"], constants, integers=["s"]), ComputeWindowOrders()
    assert not lower(model).modified
    assert not lower.declined
    assert operators(model) == Counter(Gather=2, Cast=1)
