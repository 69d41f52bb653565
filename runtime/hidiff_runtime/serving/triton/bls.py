"""How a model of the Python backend asks another model of the same server: Triton's business logic scripting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from hidiff_runtime.errors import EngineError

_LONGEST = 300
"""Characters of what the server told."""


def ask(model: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The model's outputs, as arrays of the caller's own; `hidiff_runtime.serving.triton.backend.Call`.

    Works once the server answers requests, and not while the asking model is being initialised. Tensors cross shared
    memory, outputs in the host's.

    Raises:
        EngineError: the server has no such model, or the model failed.
    """
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    try:
        response = request.exec()
    except pb_utils.TritonModelException as error:
        raise _failure(model, str(error)) from error
    if response.has_error():
        raise _failure(model, response.error().message())
    # Copies: the memory is the server's again when the response goes.
    found = {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
    if missing := [name for name in outputs if name not in found]:
        raise _failure(model, f"no output {missing[0]}")
    return found


def _failure(model: str, told: str) -> EngineError:
    """The error for clients is short; what the server told may hold paths, and is for the log."""
    return EngineError(f"The model {model} failed.", given=told[:_LONGEST], advice="The server's log says why.")
