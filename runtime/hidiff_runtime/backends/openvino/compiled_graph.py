"""A graph that OpenVINO has compiled, and the part of it that is computed in float32 before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.external_data import files_of, link_targets
from hidiff_runtime.backends.openvino.compile_record import CompileRecord
from hidiff_runtime.backends.openvino.forked_process import check_process
from hidiff_runtime.backends.openvino.host_memory import HostArray
from hidiff_runtime.backends.openvino.linked_weights import read_linked
from hidiff_runtime.backends.openvino.quiet_import import openvino
from hidiff_runtime.backends.openvino.released_pages import released_pages
from hidiff_runtime.backends.option_checks import no_profile
from hidiff_runtime.backends.protocol import DeviceArray, check_tensors
from hidiff_runtime.backends.signature import signature_faults
from hidiff_runtime.errors import BundleError, EngineError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.dtypes import BY_TAG
from hidiff_runtime.format.manifest import GraphRecord, TensorSpec

HINTS = {"float32": "f32", "bfloat16": "bf16"}
"""OpenVINO's names of precisions."""


@dataclass(frozen=True)
class Part:
    """A compiled part of a graph.

    Args:
        request: what evaluates it.
        inputs: names of what it takes.
        outputs: names of what it gives, in order.
    """

    request: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluates it on its inputs among ``given``. Raises RuntimeError where OpenVINO fails."""
        found = self.request.infer([given[name] for name in self.inputs], share_inputs=True)
        return {name: found[index] for index, name in enumerate(self.outputs)}


class OpenVinoSession:
    """One engine; compiled on entering, freed on leaving.

    Args:
        engine: the compile record.
        record: of the graph.
        core: OpenVINO's.
        precision: ``float32`` or ``bfloat16``.
        settings: of the compilation, the precision aside.
    """

    def __init__(
        self,
        engine: Path,
        record: GraphRecord,
        core: Any,
        precision: str,
        settings: Mapping[str, Any],
    ) -> None:
        self._engine = engine
        self._record = record
        self._core = core
        self._precision = precision
        self._settings = settings
        self._parts: tuple[Part, ...] = ()
        self._mapped: list[Any] = []

    def __enter__(self) -> OpenVinoSession:
        """Compiles the graph.

        Raises:
            BundleError: the compile record or the graph is not what the manifest says.
            EngineError: OpenVINO refuses the graph, has no memory for it, or computed before this process was forked.
        """
        check_process()
        how = CompileRecord.read(self._engine)
        graph = self._engine.parent / how.graph
        try:
            stores = files_of(graph)[1:]
            with released_pages(stores):
                model = self._read(graph, stores)
                self._check_signature(model, graph)
                names = tuple(_name(output, self._record.outputs) for output in model.outputs)
                first = self._float32_part(model, how)
                _expose_ambiguous_attention(model)
                self._parts = (*first, self._compile(model, names, self._precision))
        except (RuntimeError, MemoryError, UnicodeDecodeError) as error:  # the last for names that are no text
            raise _failure("OpenVINO cannot load an engine.", error, graph) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._parts, self._mapped = (), []

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluates the engine; raises EngineError for an input that its record does not list, or a failure."""
        if not self._parts:
            raise EngineError("The engine is not open.", given=self._engine, advice="Run it inside 'with session:'.")
        check_process()
        check_tensors("inputs", self._record.inputs, inputs)
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            for part in self._parts:
                feed |= part.run(feed)
        except (RuntimeError, MemoryError) as error:
            raise _failure("OpenVINO failed while evaluating.", error, self._engine) from error
        return {spec.name: feed[spec.name] for spec in self._record.outputs}

    def operator_seconds(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Evaluates the engine; see `ProfiledSession`. Raises EngineError where it was opened without a profile."""
        if not self._settings["PERF_COUNT"]:
            raise no_profile(self._engine)
        self.run(inputs)
        found: Counter[str] = Counter()
        for part in self._parts:
            for node in part.request.get_profiling_info():
                found[node.node_type] += node.real_time.total_seconds()
        return {name: seconds for name, seconds in found.most_common() if seconds}

    def execute(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Evaluates the engine from tensors into tensors; raises as `run` does."""
        check_tensors("inputs", self._record.inputs, inputs)
        check_tensors("outputs", self._record.outputs, outputs)
        found = self.run({name: cast(HostArray, array).value for name, array in inputs.items()})
        for name, array in outputs.items():
            np.copyto(cast(HostArray, array).value, found[name])

    def _read(self, graph: Path, stores: Sequence[Path]) -> Any:
        targets = link_targets(graph, stores)
        if targets is None:
            return self._core.read_model(str(graph))
        model, self._mapped = read_linked(self._core, graph, targets)
        return model

    def _compile(self, model: Any, outputs: tuple[str, ...], precision: str) -> Part:
        inputs = tuple(parameter.get_friendly_name() for parameter in model.get_parameters())
        settings = {**self._settings, "INFERENCE_PRECISION_HINT": HINTS[precision]}
        return Part(self._core.compile_model(model, "CPU", settings).create_infer_request(), inputs, outputs)

    def _float32_part(self, model: Any, how: CompileRecord) -> tuple[Part, ...]:
        """Takes the nodes that stay in float32 out of the graph, compiled as one of their own; nothing without any.

        Raises:
            BundleError: the graph has no such node.
        """
        if not how.float32:
            return ()
        nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
        if missing := [name for name in how.float32 if name not in nodes]:
            raise BundleError(
                "A compile record names nodes that the graph does not have.",
                given=f"{self._engine.name}: {', '.join(missing[:3])}",
                advice=REBUILD,
            )
        results = [nodes[name].output(0) for name in how.float32]
        library = openvino()
        part = library.Model(results, _parameters_before(results), "float32")
        compiled = self._compile(part, how.float32, "float32")
        for name, result in zip(how.float32, results, strict=True):
            parameter = library.opset13.parameter(result.get_shape(), result.get_element_type())
            parameter.set_friendly_name(name)
            result.replace(parameter.output(0))
            model.add_parameters([parameter])
        used = {parameter.get_friendly_name() for parameter in _parameters_before(model.outputs)}
        for parameter in model.get_parameters():
            if parameter.get_friendly_name() not in used:
                model.remove_parameter(parameter)
        return (compiled,)

    def _check_signature(self, model: Any, graph: Path) -> None:
        """Refuses a graph whose inputs or outputs are not those that the bundle says it has. Raises BundleError."""
        faults: list[str] = []
        for kind, due, tensors in (
            ("input", self._record.inputs, model.inputs),
            ("output", self._record.outputs, model.outputs),
        ):
            found = {_name(tensor, due): _described(tensor) for tensor in tensors}
            faults += signature_faults(kind, due, found, "the manifest")
        if faults:
            raise BundleError(
                f"The engine is not of the graph {self._record.graph} that the manifest names.",
                given=f"{graph}: {'; '.join(faults)[:1000]}",
                advice=REBUILD,
            )


def _expose_ambiguous_attention(model: Any) -> None:
    """Makes an output of each attention that has as many queries as heads.

    OpenVINO (2026.4.1) takes attention and the transpositions round it into one kernel, which in bfloat16 mixes up
    queries and heads where there are as many of the one as of the other, and leaves 6 dB. What is an output is left
    out of such kernels.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ScaledDotProductAttention":
            *_, heads, queries, _ = node.get_output_shape(0)
            if heads == queries:
                model.add_outputs([node.output(0)])


def _name(tensor: Any, due: Sequence[TensorSpec]) -> str:
    """Returns the name of an input or output: the one that is due where it has several, as behind an Identity."""
    names = tensor.get_names()
    return next((spec.name for spec in due if spec.name in names), min(names, default=""))


def _described(tensor: Any) -> str:
    """Returns type and shape of a graph's input or output: ``float32[2, 4, 64, 64]``."""
    name = tensor.get_element_type().get_type_name()
    known = BY_TAG.get(name.upper())
    shape = tensor.get_partial_shape()
    sizes = list(shape.to_shape()) if shape.is_static else str(shape)
    return f"{name if known is None else known.name}{sizes}"


def _parameters_before(outputs: Sequence[Any]) -> list[Any]:
    """Returns the graph's inputs that these outputs depend on."""
    found, seen, left = [], set(), [output.get_node() for output in outputs]
    while left:
        node = left.pop()
        name = node.get_friendly_name()
        if name in seen:
            continue
        seen.add(name)
        if node.get_type_name() == "Parameter":
            found.append(node)
        left += [value.get_node() for value in node.input_values()]
    return found


def _failure(summary: str, error: Exception, given: Path) -> EngineError:
    """Returns what OpenVINO raised, as this package's error."""
    return EngineError(
        summary,
        given=f"{given}: {str(error)[:1000]}",
        advice="Build the bundle again, or install the openvino version that this release names. Where memory is "
        "short, open the bundle with resident='current' (--resident current).",
    )
