"""``config.pbtxt``: what Triton is told of a model, as the text of a protocol buffer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hidiff_runtime.serving.triton.schema import MOST_ROWS, Tensor

WARM_UP = "warmup"
"""The folder with the values of the warm-up request, beside the model's versions."""


@dataclass(frozen=True)
class Queue:
    """How a model's requests wait.

    Args:
        size: requests that may wait; more are refused at once.
        seconds: that one may wait before it is refused; a request's own ``timeout`` may be shorter, not longer.
        together: whether a model is given several at once, as many as their rows fit; one at a time otherwise.
    """

    size: int = 64
    seconds: float = 60.0
    together: bool = False


@dataclass(frozen=True)
class InstancePlacement:
    """Where a model's instances are.

    Args:
        gpus: one instance on each of these; empty where Triton is to bind none of them to a GPU.
        count: instances that are bound to none.
    """

    gpus: tuple[int, ...] = ()
    count: int = 1

    @property
    def instances(self) -> int:
        """How many there are."""
        return len(self.gpus) or self.count


@dataclass(frozen=True)
class ModelConfig:
    """A model of Triton's Python backend.

    Args:
        name: of the model and its folder.
        inputs: without the rows.
        outputs: without the rows.
        places: of its instances.
        queue: of its requests.
        parameters: texts that the model reads.
        decoupled: whether it sends any number of responses.
        warm_up: inputs of the request that is made before the model is ready; texts lie in files of their names.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    places: InstancePlacement
    queue: Queue
    parameters: Mapping[str, str]
    decoupled: bool = False
    warm_up: tuple[Tensor, ...] = ()

    def text(self) -> str:
        """Returns the file's content."""
        parts = [
            f"name: {_quoted(self.name)}",
            'backend: "python"',
            f"max_batch_size: {MOST_ROWS}",
            f"input {_tensors_text(self.inputs)}",
            f"output {_tensors_text(self.outputs)}",
            f"instance_group [\n  {_group_text(self.places)}\n]",
            _waiting(self.queue),
        ]
        if self.decoupled:
            parts.append("model_transaction_policy { decoupled: true }")
        if self.warm_up:
            parts.append(_warm_up(self.warm_up))
        parts += (_parameter_text(key, value) for key, value in self.parameters.items())
        return "\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    """Returns a string of the text format: JSON's escapes are among its own."""
    return json.dumps(text, ensure_ascii=False)


def _parameter_text(key: str, value: str) -> str:
    """Returns a parameter of a model."""
    return f"parameters {{ key: {_quoted(key)} value: {{ string_value: {_quoted(value)} }} }}"


def _tensors_text(tensors: Iterable[Tensor]) -> str:
    """Returns a list of inputs or outputs."""
    return "[\n" + ",\n".join(f"  {_tensor(tensor)}" for tensor in tensors) + "\n]"


def _tensor(tensor: Tensor) -> str:
    optional = " optional: true" if tensor.optional else ""
    return f"{{ name: {_quoted(tensor.name)} data_type: {tensor.datatype} dims: {_dims(tensor)}{optional} }}"


def _dims(tensor: Tensor) -> str:
    return f"[ {', '.join(str(size) for size in tensor.dims)} ]"


def _group_text(places: InstancePlacement) -> str:
    """Returns where a model's instances are."""
    if places.gpus:
        return f"{{ kind: KIND_GPU count: 1 gpus: [ {', '.join(str(gpu) for gpu in places.gpus)} ] }}"
    return f"{{ kind: KIND_CPU count: {places.count} }}"


def _waiting(queue: Queue) -> str:
    """Requests are put together where the model looks itself which of them one run draws."""
    return "\n".join(
        (
            "dynamic_batching {",
            f"  preferred_batch_size: [ {MOST_ROWS if queue.together else 1} ]",
            "  default_queue_policy {",
            "    timeout_action: REJECT",
            f"    default_timeout_microseconds: {round(queue.seconds * 1e6)}",
            "    allow_timeout_override: true",
            f"    max_queue_size: {queue.size}",
            "  }",
            "}",
        )
    )


def _warm_up(tensors: Sequence[Tensor]) -> str:
    inputs = "\n".join(
        f"    inputs {{ key: {_quoted(tensor.name)} value: {{ data_type: {tensor.datatype} dims: {_dims(tensor)} "
        f"input_data_file: {_quoted(tensor.name)} }} }}"
        for tensor in tensors
    )
    return f'model_warmup [\n  {{\n    name: "picture"\n    batch_size: 1\n{inputs}\n  }}\n]'
