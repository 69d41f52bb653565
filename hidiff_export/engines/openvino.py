"""Engines for OpenVINO: a record of how it compiles the portable graph, which it reads as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hidiff_export.engines.protocol import PortableGraph, Report
from hidiff_export.graph.float32_ops import FLOAT32_OPERATIONS, Means
from hidiff_export.graph.portable import load_graph, save
from hidiff_export.quantization.integer_store import (
    IntegerStore,
    quantized_weights,
    read_integers,
    store_name,
    write_integers,
)
from hidiff_runtime.backends.openvino.compile_record import FORMAT, CompileRecord

AS_TRACED = frozenset[str]().union(
    *(operation.operators for operation in FLOAT32_OPERATIONS if operation.means is Means.AS_TRACED)
)
"""Operators that the network computes in float32 whatever its precision. OpenVINO rounds them, and what they take, to
bfloat16 all the same, whatever types the graph states: what stays float32 has to be compiled by itself."""


class OpenVinoBuilder:
    """Says how OpenVINO compiles each portable graph on the CPU that it runs on."""

    name = "openvino"

    def check(self) -> None:
        """Accepts everything: a record takes no library of the backend."""

    def key(self) -> Any:
        """Returns the format of the records; what they say follows from the graphs."""
        return {"format": FORMAT}

    def engines(self, graphs: Sequence[PortableGraph]) -> tuple[Path, ...]:
        """Returns ``strided.openvino.json`` beside ``strided.onnx``."""
        return tuple(graph.path.with_suffix(f".{self.name}.json") for graph in graphs)

    def build(self, graphs: Sequence[PortableGraph], report: Report) -> tuple[Path, ...]:
        """Writes the records; see :class:`~hidiff_export.engines.protocol.Builder`.

        A quantized graph also becomes one that reads its weights as integers, from a store that all of them share:
        OpenVINO would make them anew whenever it opens an engine, in three times the time and twice the memory.
        """
        stores: dict[str, IntegerStore] = {}
        written: list[Path] = []
        for index, (graph, engine) in enumerate(zip(graphs, self.engines(graphs), strict=True)):

            def part(done: float, index: int = index, graph: PortableGraph = graph) -> None:
                report(index + done, len(graphs), graph.path.stem)

            part(0)
            model = load_graph(graph.path)
            record = compile_record(model, graph.path.name)
            if nodes := quantized_weights(model.graph):
                name = store_name(nodes)
                if name not in stores:
                    stores[name] = write_integers(nodes, graph.path.with_name(name), part)
                read_integers(model, stores[name])
                path = graph.path.with_suffix(f".{self.name}.onnx")
                save(model, path)
                written.append(path)
                record = replace(record, graph=path.name)
            record.write(engine)
            written.append(engine)
        return (*written, *(store.path for store in stores.values()))


def compile_record(model: ir.Model, name: str) -> CompileRecord:
    """Returns how OpenVINO compiles a portable graph of this file name.

    A graph of bfloat16 tensors computes in them, and a quantized one does what is not quantized. All else computes in
    float32, what is float16 in other recipes' graphs too (the text encoders of an int8 recipe): the CPU has no float16,
    and OpenVINO asked for it takes bfloat16, silently.
    """
    graph = model.graph
    values = (*graph.initializers.values(), *(value for node in graph for value in node.outputs))
    half = any(value.dtype is ir.DataType.BFLOAT16 for value in values)
    half |= any(node.op_type == "QuantizeLinear" for node in graph)
    float32 = tuple(node.name or "" for node in graph if node.domain == "" and node.op_type in AS_TRACED)
    return CompileRecord(name, "bfloat16" if half else "float32", float32)
