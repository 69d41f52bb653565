"""``config.pbtxt`` of models that answer each request by itself, at once: engines, and what starts their pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hidiff_export.triton.model_config import InstancePlacement, group_text, parameter_text, quoted, tensors_text
from hidiff_runtime.backends.onnxruntime import CUDA_OPTIONS
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.serving.triton.layout import LOADED, LOADS, PING
from hidiff_runtime.serving.triton.schema import Tensor

PLATFORMS = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}
"""Triton's platforms by the backend whose engines they run; the one to be preferred first."""

_DATATYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32"}


@dataclass(frozen=True)
class SingleConfig:
    """A model without batches and without a queue delay, which each step of a run would pay.

    Args:
        name: of the model and its folder.
        kind: the field that says what runs it, such as ``platform``, and its value.
        inputs: with every dimension.
        outputs: likewise.
        places: of its instances.
        parameters: texts for whatever runs it.
        warm_up: whether it gets a request of zeros before it is ready.
        cuda: options of ONNX Runtime's CUDA provider.
    """

    name: str
    kind: tuple[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    places: InstancePlacement
    parameters: Mapping[str, str] = field(default_factory=dict)
    warm_up: bool = False
    cuda: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The file's content."""
        kind, value = self.kind
        parts = [
            f"name: {quoted(self.name)}",
            f"{kind}: {quoted(value)}",
            "max_batch_size: 0",
            f"input {tensors_text(self.inputs)}",
            f"output {tensors_text(self.outputs)}",
            f"instance_group [\n  {group_text(self.places)}\n]",
            *(parameter_text(key, text) for key, text in self.parameters.items()),
        ]
        if self.warm_up:
            parts.append(f'model_warmup [ {{ name: "zeros" batch_size: 1 {_zeros(self.inputs)} }} ]')
        if self.cuda:
            parts.append(_accelerator(self.cuda))
        return "\n".join(parts) + "\n"


def engine_config(name: str, record: GraphRecord, backend: str, places: InstancePlacement) -> SingleConfig:
    """The model of one engine, with the options of ONNX Runtime that the runtime itself opens it with.

    Args:
        name: of the model.
        record: of the engine's graph.
        backend: one of `PLATFORMS`.
        places: of its instances.
    """
    onnxruntime = backend == "onnxruntime"
    return SingleConfig(
        name=name,
        kind=("platform", PLATFORMS[backend]),
        inputs=_tensors(record, "inputs"),
        outputs=_tensors(record, "outputs"),
        places=places,
        parameters={"enable_mem_pattern": "0"} if onnxruntime else {},
        cuda=CUDA_OPTIONS if onnxruntime and places.gpus else {},
    )


def start_config(name: str, loads: tuple[str, ...], parameters: Mapping[str, str]) -> SingleConfig:
    """The model that loads others.

    Args:
        name: of the model.
        loads: the others' names, in order.
        parameters: further ones.
    """
    return SingleConfig(
        name=name,
        kind=("backend", "python"),
        inputs=(PING,),
        outputs=(LOADED,),
        places=InstancePlacement(),
        parameters={LOADS: ",".join(loads), **parameters},
        warm_up=True,
    )


def _tensors(record: GraphRecord, which: str) -> tuple[Tensor, ...]:
    specs = record.inputs if which == "inputs" else record.outputs
    return tuple(Tensor(spec.name, _DATATYPES[spec.dtype], spec.shape) for spec in specs)


def _zeros(tensors: Iterable[Tensor]) -> str:
    return " ".join(
        f"inputs {{ key: {quoted(one.name)} "
        f"value: {{ data_type: {one.datatype} dims: {list(one.dims)} zero_data: true }} }}"
        for one in tensors
    )


def _accelerator(options: Mapping[str, str]) -> str:
    inner = "\n".join(
        f"      parameters {{ key: {quoted(key)} value: {quoted(value)} }}" for key, value in options.items()
    )
    return (
        "optimization {\n  execution_accelerators {\n    gpu_execution_accelerator [ {\n"
        f'      name: "cuda"\n{inner}\n    }} ]\n  }}\n}}'
    )
