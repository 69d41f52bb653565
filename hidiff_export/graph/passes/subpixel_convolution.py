"""Convolutions of an enlarged tensor, on the tensor as it was before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass, produced_by, static_shape

_TAPS = 3
"""Of the kernel, along either side."""


@dataclass(frozen=True)
class _Share:
    """What the kernel's taps come to along one axis, for some of the positions that one element becomes.

    Args:
        positions: which of them, counted from the element's first.
        sums: for each element that they read, which of the taps fall on it.
        before: elements that are read before their own.
        after: elements that are read after it.
    """

    positions: tuple[int, ...]
    sums: tuple[tuple[int, ...], ...]
    before: int = 0
    after: int = 0


class SubpixelConvolution(RewritePass):
    """Turns a 3x3 convolution of what a nearest ``Resize`` by a whole number enlarged into smaller ones before it.

    Several taps of the kernel fall on one and the same element: twice enlarged, each of the four positions that an
    element becomes reads 2x2 elements, by sums of taps, so that 16 products are left of 36; four times enlarged 25 of
    144, since the positions in an element's middle are alike. The sums are new initializers, added up in float32 and
    rounded once to the weight's type; they are computed when they are read.

    Requires: shapes known; weights that are constants of the graph.
    Ensures: no such convolution is left but where `declined` says why.

    Attributes:
        kernels: the new initializers by the factor that their tensor is enlarged by, from the latest call.
    """

    operators = frozenset({("", "Conv")})

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[int, list[ir.Value]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Runs over the main graph."""
        self.kernels = {}
        return super().call(model)

    def rewrite(self, node: ir.Node) -> Outcome:
        """Takes one convolution apart."""
        resize = produced_by(node.inputs[0], "Resize")
        if resize is None:
            return None
        small, large = static_shape(resize.inputs[0]), static_shape(node.inputs[0])
        if small is None or large is None or len(small) != 4:
            return Declined("a shape is not known")
        factor = large[2] // small[2]
        if large != (*small[:2], small[2] * factor, small[3] * factor) or factor < 2 or not _repeats(resize):
            return Declined("what it reads is not each element repeated, as often along both sides")
        if not _is_plain(node):
            return Declined(f"it is not {_TAPS}x{_TAPS} with one element of zeros around, at every position")
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or static_shape(weight) is None:
            return Declined("its weight is computed")
        return [self._convolutions(node, resize.inputs[0], factor)]

    def _convolutions(self, node: ir.Node, tensor: ir.Value | None, factor: int) -> ir.Value:
        """Makes the convolutions, whose channels then become the positions."""
        shares = tuple(_shares(factor))
        made = {
            (row, column): self._convolution(node, tensor, factor, down, across)
            for down, across in itertools.product(shares, shares)
            for row, column in [(down.positions[0], across.positions[0])]
        }
        first = {position: share.positions[0] for share in shares for position in share.positions}
        places = itertools.product(range(factor), range(factor))
        stacked = self.build.op("Concat", *(made[first[row], first[column]] for row, column in places), axis=1)
        return self.build.op("DepthToSpace", stacked, blocksize=factor, mode="DCR")

    def _convolution(
        self, node: ir.Node, tensor: ir.Value | None, factor: int, down: _Share, across: _Share
    ) -> ir.Value:
        weight, *bias = node.inputs[1:]
        assert weight is not None  # checked before
        kernel = self._kernel(weight, factor, down, across)
        return self.build.op(
            "Conv",
            tensor,
            kernel,
            *bias,
            kernel_shape=[len(down.sums), len(across.sums)],
            pads=[down.before, across.before, down.after, across.after],
        )

    def _kernel(self, weight: ir.Value, factor: int, down: _Share, across: _Share) -> ir.Value:
        """Makes the initializer with the sums of taps."""
        whole = weight.const_value
        assert whole is not None  # checked before

        def summed() -> ir.TensorProtocol:
            exact = whole.numpy().astype(np.float32)
            return ir.tensor(_summed(_summed(exact, down, 2), across, 3).astype(whole.dtype.numpy()), name=name)

        name = f"{weight.name}[{factor}x, {_named(down)}, {_named(across)}]"
        outputs, inputs, *_ = static_shape(weight) or ()
        shape = ir.Shape((outputs, inputs, len(down.sums), len(across.sums)))
        kernel = self.build.initializer(ir.LazyTensor(summed, whole.dtype, shape, name=name))
        self.kernels.setdefault(factor, []).append(kernel)
        return kernel


def _shares(factor: int) -> Iterator[_Share]:
    """Yields the positions that an element becomes along one axis, those together that read alike."""
    yield _Share((0,), ((0,), (1, 2)), before=1)
    if factor > 2:
        yield _Share(tuple(range(1, factor - 1)), ((0, 1, 2),))
    yield _Share((factor - 1,), ((0, 1), (2,)), after=1)


def _summed(kernel: NDArray[np.float32], share: _Share, axis: int) -> NDArray[np.float32]:
    return np.concatenate([kernel.take(taps, axis).sum(axis, keepdims=True) for taps in share.sums], axis)


def _named(share: _Share) -> str:
    return " ".join("+".join(map(str, taps)) for taps in share.sums)


def _repeats(resize: ir.Node) -> bool:
    """Returns whether a node picks, for each position, the element that it lies in."""
    meant = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    return all(name in resize.attributes and resize.attributes[name].value == due for name, due in meant.items())


def _is_plain(node: ir.Node) -> bool:
    due = {
        "kernel_shape": (_TAPS, _TAPS),
        "pads": (1, 1, 1, 1),
        "strides": (1, 1),
        "dilations": (1, 1),
        "group": 1,
        "auto_pad": "NOTSET",
    }
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    found = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in given.items()}
    stated = {"strides": (1, 1), "dilations": (1, 1), "group": 1, "auto_pad": "NOTSET", **found}
    return all(stated.get(name) == value for name, value in due.items())
