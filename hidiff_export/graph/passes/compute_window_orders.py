"""Token orders of shifted windows, computed from the shift instead of looked up in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hidiff_export.families.geometry import SHIFTS
from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass, static_shape

_MOST = 1 << 24
"""Elements of a table that is looked at."""


class ComputeWindowOrders(RewritePass):
    """Turns a ``Gather`` from a table of window orders into arithmetic on rows and columns.

    TensorRT writes constants among the weights, in the order in which the network needs them. Phases whose feature maps
    differ in size have other tables, behind which the weights of their plans lie at other places: a small SDXL's pooled
    and windowed phases have 0.9 of 5.6 MB in the same place, and 4.9 MB without tables. Nor are there megabytes of
    tables to read.

    Requires: shapes known; shifts of 0 to 3, as the network takes them.
    Ensures: no table of window orders is left but where `declined` says why.
    """

    operators = frozenset({("", "Gather")})

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[ir.Value, _Windows | None] = {}
        self._counts: dict[int, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Runs over the main graph."""
        self._tables, self._counts = {}, {}
        return super().call(model)

    def rewrite(self, node: ir.Node) -> Outcome:
        """Replaces one look-up."""
        table, shift = node.inputs
        shape = static_shape(table)
        if table is None or shift is None or table.const_value is None or table.dtype != ir.DataType.INT32:
            return None
        shifts = static_shape(shift)
        if shape is None or len(shape) != 2 or shape[0] != SHIFTS or shifts is None or len(shifts) != 1:
            return None
        if "axis" in node.attributes and node.attributes["axis"].as_int() != 0:
            return None
        if shape[1] > _MOST or shift.dtype != ir.DataType.INT32:
            return Declined("the table is too large, or the shift is not int32")
        if table not in self._tables:
            self._tables[table] = _Windows.of(np.asarray(table.const_value.numpy()))
        windows = self._tables[table]
        if windows is None:
            return Declined("the table is not of four windows that move by the same rows and columns for each shift")
        return [_Arithmetic(self.build, shift, shifts[0], self._counts).order(windows)]


@dataclass(frozen=True)
class _Windows:
    """Four windows, and what a table says of them.

    Args:
        height: rows of one window; ``width`` likewise.
        rows: by which a shift of one moves them; ``columns`` likewise.
        restore: whether the table leads back from windows to the feature map.
    """

    height: int
    width: int
    rows: int
    columns: int
    restore: bool

    @classmethod
    def of(cls, table: NDArray[Any]) -> _Windows | None:
        """Finds the windows that ``table``, int32 [4, tokens], orders, if it orders any."""
        for restore in (False, True):
            if (windows := cls._guess(np.argsort(table, axis=1) if restore else table, restore)) is not None and (
                np.array_equal(windows.table(), table)
            ):
                return windows
        return None

    @classmethod
    def _guess(cls, table: NDArray[Any], restore: bool) -> _Windows | None:
        """Guesses from the first row's first jump and the second row's first token: they can be nothing else."""
        tokens = table.shape[1]
        jumps = np.flatnonzero(table[0] != np.arange(tokens))
        width = int(jumps[0]) if jumps.size else 0
        if width == 0 or tokens % (4 * width):
            return None
        rows, columns = divmod(int(table[1, 0]), 2 * width)
        return cls(tokens // (4 * width), width, rows, columns, restore)

    def table(self) -> NDArray[Any]:
        """Computes the orders of all shifts, int32 [4, tokens], as the nodes do."""
        height, width = 2 * self.height, 2 * self.width
        sign = -1 if self.restore else 1
        orders = []
        for shift in range(SHIFTS):
            y = (np.arange(height) + sign * shift * self.rows) % height
            x = (np.arange(width) + sign * shift * self.columns) % width
            if self.restore:
                (tall, low), (wide, narrow) = self.strides
                y = y // self.height * tall + y % self.height * low
                x = x // self.width * wide + x % self.width * narrow
                orders.append((y[:, None] + x[None, :]).reshape(-1))
            else:
                whole = (y * width)[:, None] + x[None, :]
                cut = whole.reshape(2, self.height, 2, self.width).transpose(0, 2, 1, 3)
                orders.append(cut.reshape(-1))
        table: NDArray[Any] = np.stack(orders).astype(np.int32)
        return table

    @property
    def strides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Tokens between windows one above the other and between their rows; the same for columns."""
        area = self.height * self.width
        return (2 * area, self.width), (area, 1)


class _Arithmetic:
    """The nodes that compute one order for each of ``batch`` shifts."""

    def __init__(self, build: NodeBuilder, shift: ir.Value, batch: int, counts: dict[int, ir.Value]) -> None:
        self._build = build
        self._shift = build.reshape(shift, (batch, 1))
        self._batch = batch
        self._counts = counts

    def order(self, windows: _Windows) -> ir.Value:
        """Makes the orders, int32 [batch, tokens]."""
        batch, height, width, restore = self._batch, 2 * windows.height, 2 * windows.width, windows.restore
        y = self._moved(height, windows.rows, restore)
        x = self._moved(width, windows.columns, restore)
        if restore:
            y = self._strided(y, windows.height, windows.strides[0])
            x = self._strided(x, windows.width, windows.strides[1])
        else:
            y = self._by("Mul", y, width)
        order = self._build.op("Add", self._build.reshape(y, (-1, height, 1)), self._build.reshape(x, (-1, 1, width)))
        if not restore:
            apart = self._build.reshape(order, (-1, 2, windows.height, 2, windows.width))
            order = self._build.op("Transpose", apart, perm=(0, 1, 3, 2, 4))
        return self._build.reshape(order, (batch, height * width))

    def _moved(self, size: int, step: int, back: bool) -> ir.Value:
        """Makes positions 0 to ``size`` - 1 for each shift, moved by it times ``step`` and wrapped around."""
        if step == 0:
            return self._count(size)
        # Backwards as forwards by the rest, since ONNX and TensorRT differ on remainders of negative numbers.
        moved = self._by("Mul", self._shift, size - step if back else step)
        return self._by("Mod", self._build.op("Add", self._count(size), moved), size)

    def _strided(self, position: ir.Value, size: int, strides: tuple[int, int]) -> ir.Value:
        """Makes what a row or column of the feature map adds to a token's place among the windows."""
        window = self._by("Mul", self._by("Div", position, size), strides[0])
        inside = self._by("Mul", self._by("Mod", position, size), strides[1])
        return self._build.op("Add", window, inside)

    def _count(self, size: int) -> ir.Value:
        """Counts to ``size`` - 1 while running: as a constant it would stand among the weights like a table."""
        if size not in self._counts:
            one = self._by("Add", self._by("Div", self._shift, SHIFTS), 1)
            ones = self._build.op("Expand", one, self._build.constant([self._batch, size]))
            counted = self._build.op("CumSum", ones, self._build.constant(1, np.int32))
            self._counts[size] = self._by("Sub", counted, 1)
        return self._counts[size]

    def _by(self, op_type: str, value: ir.Value, number: int) -> ir.Value:
        return self._build.op(op_type, value, self._build.constant(number, np.int32))
