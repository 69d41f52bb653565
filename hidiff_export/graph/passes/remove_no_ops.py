"""Removal of nodes that give back what they are given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass, constant, static_shape


class RemoveNoOps(RewritePass):
    """Removes factors and divisors of one, and casts, reshapes, transpositions and expansions that change nothing.

    Requires: nothing; declines where a shape or type is not known.
    Ensures: the values of every output are the same to the last bit.
    """

    def rewrite(self, node: ir.Node) -> Outcome:
        """Passes the input on when it is the output."""
        outcome = _CHECKS[node.op_type](node)
        if outcome is True:
            (value, *_) = node.inputs
            assert value is not None  # every operator listed requires its first input
            return [value]
        return Declined(outcome) if isinstance(outcome, str) else None


def _is_division_by_one(node: ir.Node) -> bool | str:
    divisor = constant(node.inputs[1])
    if divisor is None or not np.all(divisor == 1):
        return False
    return _same_shape(node)


def _is_cast_to_same(node: ir.Node) -> bool | str:
    (value,) = node.inputs
    if value is None or value.dtype is None:
        return "the input's type is not known"
    return value.dtype == node.attributes["to"].as_int()


def _is_identity_order(node: ir.Node) -> bool | str:
    order = node.attributes.get("perm")
    return order is not None and list(order.as_ints()) == sorted(order.as_ints())


def _same_shape(node: ir.Node) -> bool | str:
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if before is None or after is None:
        return "a shape is not known"
    return before == after


_CHECKS: dict[str, Callable[[ir.Node], bool | str]] = {
    "Div": _is_division_by_one,
    "Mul": _is_division_by_one,
    "Cast": _is_cast_to_same,
    "Transpose": _is_identity_order,
    "Reshape": _same_shape,
    "Expand": _same_shape,
}

RemoveNoOps.operators = frozenset(("", op_type) for op_type in _CHECKS)
