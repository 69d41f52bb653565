"""Engines for OpenVINO: the portable graph with products and convolutions that it runs fast, and a record of how it
compiles that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from hidiff_export.engines.protocol import PortableGraph, Report
from hidiff_export.graph.derived_store import DerivedStore
from hidiff_export.graph.float32_ops import FLOAT32_OPERATIONS, Means
from hidiff_export.graph.passes.gemm_to_mat_mul import GemmToMatMul
from hidiff_export.graph.passes.linear_to_gemm import LinearToGemm
from hidiff_export.graph.passes.merge_reshapes import MergeReshapes
from hidiff_export.graph.passes.name_by_module import NameByModule
from hidiff_export.graph.passes.split_attention import SplitAttention
from hidiff_export.graph.passes.split_gemm import SplitGemm
from hidiff_export.graph.passes.subpixel_convolution import SubpixelConvolution
from hidiff_export.graph.portable import load_graph, run_passes, save
from hidiff_export.quantization.integer_store import integer_tensors, quantized_weights, read_integers, store_name
from hidiff_runtime.backends.openvino.compile_record import FORMAT, CompileRecord

AS_TRACED = frozenset[str]().union(
    *(operation.operators for operation in FLOAT32_OPERATIONS if operation.means is Means.AS_TRACED)
)
"""Operators that the network computes in float32 whatever its precision. OpenVINO rounds them, and what they take, to
bfloat16 all the same, whatever types the graph states: what stays float32 has to be compiled by itself."""


class OpenVinoBuilder:
    """Lowers portable graphs for OpenVINO's CPU plugin, and says how it compiles each on the CPU that it runs on.

    Args:
        split_attention: whether attention over many keys is computed a piece of them at a time, which is twice as fast
            in bfloat16. Not for networks that score keys in the thousands; see `SplitAttention`.
    """

    name = "openvino"

    def __init__(self, *, split_attention: bool = True) -> None:
        self._split_attention = split_attention

    def check(self) -> None:
        """Accepts everything: lowering takes no library of the backend."""

    def key(self) -> Any:
        """Returns the format of the records, and what may be split; what else they say follows from the graphs."""
        return {"format": FORMAT, "split_attention": self._split_attention}

    def engines(self, graphs: Sequence[PortableGraph]) -> tuple[Path, ...]:
        """Returns ``strided.openvino.json`` beside ``strided.onnx``."""
        return tuple(graph.path.with_suffix(f".{self.name}.json") for graph in graphs)

    def build(self, graphs: Sequence[PortableGraph], report: Report) -> tuple[Path, ...]:
        """Writes records and lowered graphs; see :class:`~hidiff_export.engines.protocol.Builder`.

        What is computed from weights, sums of them and the integers of a quantized graph, is written once for all
        graphs: OpenVINO would make it anew whenever it opens an engine.
        """
        work = 2 * len(graphs)
        written: list[Path] = []
        begun = []
        for index, graph in enumerate(graphs):
            report(index / 4, work, graph.path.stem)
            begun.append(begin_lowering(graph.path))
        stores = sum_stores(begun)
        for index, (lowering, engine) in enumerate(zip(begun, self.engines(graphs), strict=True)):
            report((len(graphs) + 3 * index) / 4, work, lowering.path.stem)
            model = finish_lowering(lowering, stores, split_attention=self._split_attention)
            lowered = lowered_path(lowering.path)
            save(model, lowered)
            compile_record(model, lowered.name).write(engine)
            written += (lowered, engine)
        for index, store in enumerate(stores.values()):

            def part(done: float, index: int = index, name: str = store.path.name) -> None:
                report(work / 2 + (index + done) / len(stores) * work / 2, work, name)

            store.write(part)
        return (*written, *stores)


@dataclass(frozen=True)
class Lowering:
    """A graph on its way from portable to OpenVINO's.

    Args:
        path: of the portable graph.
        model: the graph.
        sums: new initializers, sums of a weight's taps, by the factor of the enlargement that they are for.
    """

    path: Path
    model: ir.Model
    sums: Mapping[int, Sequence[ir.Value]]


def lowered_path(path: Path) -> Path:
    """Returns where OpenVINO's graph goes: beside the portable one."""
    return path.with_suffix(".openvino.onnx")


def begin_lowering(path: Path) -> Lowering:
    """Reads a portable graph and takes the convolutions of enlarged tensors apart. Raises ExportError."""
    model, subpixel = load_graph(path), SubpixelConvolution()
    run_passes(model, ir.passes.Sequential(LinearToGemm(), MergeReshapes(), subpixel), lowered_path(path).name)
    return Lowering(path, model, subpixel.kernels)


def sum_stores(begun: Iterable[Lowering]) -> dict[Path, DerivedStore]:
    """Returns a store for each folder and factor of enlargement: graphs of several phases and sizes have them in
    common.
    """
    found: dict[tuple[Path, int], dict[str, ir.TensorProtocol]] = {}
    for lowering in begun:
        for factor, values in lowering.sums.items():
            tensors = found.setdefault((lowering.path.parent, factor), {})
            tensors |= {value.name: value.const_value for value in values if value.name and value.const_value}
    stores = {}
    for (folder, factor), tensors in found.items():
        told = hashlib.sha256(
            repr(sorted((name, str(one.shape), one.dtype.name) for name, one in tensors.items())).encode()
        )
        path = folder / f"weights.sums{factor}x-{told.hexdigest()[:8]}.safetensors"
        stores[path] = DerivedStore(path, tensors)
    return stores


def finish_lowering(lowering: Lowering, stores: dict[Path, DerivedStore], *, split_attention: bool) -> ir.Model:
    """Returns OpenVINO's graph, whose weights are all in stores.

    Args:
        lowering: the graph.
        stores: those of sums, to which one of integers is added that the graph takes.
        split_attention: whether attention over many keys is split where the graph computes in bfloat16.

    Raises:
        ExportError: a pass fails.
    """
    model, path = lowering.model, lowering.path
    places = {name: store for store in stores.values() if store.path.parent == path.parent for name in store.names}
    for value in (value for values in lowering.sums.values() for value in values):
        assert value.name is not None  # by `SubpixelConvolution`
        value.const_value = places[value.name].reference(value.name)
    if nodes := quantized_weights(model.graph):
        file = path.with_name(store_name(nodes))
        if file not in stores:
            stores[file] = DerivedStore(file, integer_tensors(nodes))
        read_integers(model, stores[file])
    split = (SplitAttention(),) if split_attention and in_bfloat16(model) else ()
    passes = (SplitGemm(), GemmToMatMul(), *split, MergeReshapes(), common.RemoveUnusedNodesPass(), NameByModule())
    run_passes(model, ir.passes.Sequential(*passes), lowered_path(lowering.path).name)
    return model


def in_bfloat16(model: ir.Model) -> bool:
    """Says whether OpenVINO is to compute in bfloat16: a graph of such tensors, and what is left of a quantized one."""
    graph = model.graph
    values = (*graph.initializers.values(), *(value for node in graph for value in node.outputs))
    half = any(value.dtype is ir.DataType.BFLOAT16 for value in values)
    return half or any(node.op_type == "QuantizeLinear" for node in graph)


def compile_record(model: ir.Model, name: str) -> CompileRecord:
    """Returns how OpenVINO compiles a graph of this file name.

    All that is not for bfloat16 computes in float32, what is float16 in other recipes' graphs too (the text encoders of
    an int8 recipe): the CPU has no float16, and OpenVINO asked for it takes bfloat16, silently.
    """
    float32 = tuple(node.name or "" for node in model.graph if node.domain == "" and node.op_type in AS_TRACED)
    return CompileRecord(name, "bfloat16" if in_bfloat16(model) else "float32", float32)
