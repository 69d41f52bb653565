"""What torch exports, each network once however many tests and processes of a run build a bundle with it.

Tracing is most of the time of a tiny bundle. What torch made of a network is kept without its weights, under all that
it is a function of: the modules with their settings, shapes and types, the code that they run, the batch. Everything
behind the tracing is done anew each time.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import CodeType, FunctionType, MethodType

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from hidiff_export.modules.graph_module import GraphModule

Capture = Callable[[GraphModule, int], ir.Model]

OWN = ("hidiff_export.modules", "hidiff_export.families")
"""Whose functions a test may put others in place of: their code is part of what is asked for."""


WHERE_FROM = {"_name_or_path", "_commit_hash", "_diffusers_version", "transformers_version"}
"""What a configuration says of itself and not of its network."""


class TracedOnce:
    """Stands before `hidiff_export.graph.capture.capture`.

    Args:
        capture: the real one.
        folder: shared by the processes of a run.
        worker: name of this process.
    """

    def __init__(self, capture: Capture, folder: Path, worker: str) -> None:
        self._capture = capture
        self._folder = folder
        self._worker = worker

    def __call__(self, module: GraphModule, model_batch: int) -> ir.Model:
        path = self._folder / f"{key_of(module, model_batch)}.onnx"
        if path.is_file():
            return _with_weights(path, module)
        model = self._capture(module, model_batch)
        unfinished = path.with_suffix(f".{self._worker}")
        unfinished.write_bytes(_without_weights(model, module).SerializeToString())
        unfinished.replace(path)
        return model


def key_of(module: GraphModule, model_batch: int) -> str:
    """Returns a digest of everything that tracing looks at but the values of the weights."""
    found = hashlib.sha256(repr((model_batch, module.input_specs(model_batch), torch.__version__)).encode())
    for name, part in module.named_modules():
        found.update(f"{name} {type(part).__module__}.{type(part).__qualname__}\n".encode())
        for key, value in sorted(vars(part).items()):
            if key not in vars(torch.nn.Module()):
                found.update(f"{key}={_described(value)}\n".encode())
    for name, tensor in module.named_parameters():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for name, tensor in module.named_buffers():
        found.update(f"{name} {tensor.dtype} {tensor.tolist()}\n".encode())
    for line in _code():
        found.update(line.encode())
    return found.hexdigest()


def _described(value: object) -> str:
    """A setting of a module, the same in each process."""
    if isinstance(value, dict):
        kept = {str(key): _described(entry) for key, entry in value.items() if key not in WHERE_FROM}
        return repr(sorted(kept.items()))
    if isinstance(value, torch.nn.Module):
        return type(value).__qualname__  # it is among the network's parts
    if isinstance(value, FunctionType | MethodType):
        return f"{value.__module__}.{value.__qualname__} {_digest(value.__code__)}"
    if isinstance(value, torch.Tensor):
        return repr((value.dtype, value.tolist()))
    if (
        isinstance(value, (str, int, float, tuple, list, Enum))
        or value is None
        or hasattr(value, "__dataclass_fields__")
    ):
        return repr(value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(type(value))) + _described(dict(getattr(value, "__dict__", {})))


def _code() -> Iterator[str]:
    """The functions and methods of our own modules, as they are at this moment."""
    for name, module in sorted(sys.modules.items()):
        if module is not None and name.startswith(OWN):
            for key, value in sorted(vars(module).items()):
                members = vars(value).items() if isinstance(value, type) else [(key, value)]
                for inner, member in members:
                    function = getattr(member, "__func__", member)
                    if isinstance(function, FunctionType):
                        yield f"{name}.{key}.{inner} {_digest(function.__code__)}\n"


def _digest(code: CodeType) -> str:
    inner = [_digest(constant) if isinstance(constant, CodeType) else repr(constant) for constant in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, sorted(inner))).encode()).hexdigest()


def _tensors(module: GraphModule) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _without_weights(model: ir.Model, module: GraphModule) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    tensors = _tensors(module)
    for initializer in proto.graph.initializer:
        if initializer.name in tensors:
            initializer.ClearField("raw_data")
    return proto


def _with_weights(path: Path, module: GraphModule) -> ir.Model:
    proto = onnx.ModelProto.FromString(path.read_bytes())
    tensors = _tensors(module)
    for initializer in proto.graph.initializer:
        if initializer.name in tensors:
            initializer.raw_data = b"\0" * (tensors[initializer.name].nbytes)
    model = ir.from_proto(proto)
    for name, value in model.graph.initializers.items():
        if name in tensors:
            value.const_value = TorchTensor(tensors[name], name=name)
    return model
