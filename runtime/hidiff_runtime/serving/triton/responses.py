"""Answers of the models: tensors, and errors that say to the client what it may know."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from hidiff_runtime.serving.public_errors import kind_of, public_message
from hidiff_runtime.text_safety import encodable

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_RETURN = 0.001
"""Seconds in which `execute` returns to Triton."""

_CODES = {"input": "INVALID_ARG", "cancelled": "CANCELLED", "expired": "UNAVAILABLE"}
"""Names of Triton's error codes by the kind of an error: HTTP 400, 499 and 503, and for what is not here 500."""


def tensors_of(request: Any) -> dict[str, NDArray[Any]]:
    """Returns the request's inputs by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def timeout_of(request: Any) -> int:
    """Microseconds that the client allows; 0 for any number.

    Triton's own field, or the parameter that a key of a ``generate`` request's JSON becomes.
    """
    given = json.loads(request.parameters()).get("timeout", 0)
    return request.timeout() or (given if type(given) is int and given > 0 else 0)


def answer(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Returns a response with these outputs."""
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, array) for name, array in arrays.items()])


def refusal(message: str, kind: str) -> Any:
    """Returns a response that is an error of this kind."""
    code = getattr(pb_utils.TritonError, _CODES.get(kind, "INTERNAL"))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def send_last(sender: Any, response: Any) -> None:
    """Sends the last response of a request, once Triton has the instance back that was at it.

    A client that is answered before that may ask again so soon that Triton's scheduler (2.51) finds no instance
    free, and nobody wakes it when one is: the request then waits for half a second.
    """
    time.sleep(_RETURN)
    sender.send(response, flags=_FINAL)


def told(error: Exception) -> tuple[str, str]:
    """Returns message and kind of an error for the client; what is not the client's doing is logged whole."""
    kind = kind_of(error)
    if kind in ("engine", "internal"):
        pb_utils.Logger.log_error(encodable("".join(traceback.format_exception(error))))
    return public_message(error), kind
