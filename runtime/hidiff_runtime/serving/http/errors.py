"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hidiff_runtime.errors import Cancelled, Expired, HidiffError, InputError
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.public_errors import public_message
from hidiff_runtime.text_safety import json_text

log = logging.getLogger(__name__)

REQUEST, SERVER, KEY, BUSY = "invalid_request_error", "server_error", "authentication_error", "rate_limit_error"
"""What OpenAI calls kinds of errors."""

NO_RETRY = {"x-should-retry": "false"}
"""Keeps OpenAI's clients from asking again for what took long and failed."""

ADDRESSES = (
    "POST /v1/images/generations and /v1/images/edits make pictures, GET /v1/models lists the model; "
    "a client's base URL ends in /v1"
)
"""What a client is told that asked for something else."""

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
}
"""What a value must be, by pydantic's names of what it is not."""


class PlainJson(JSONResponse):
    """JSON of any text, half a surrogate pair among it, which UTF-8 has no bytes for."""

    def render(self, content: Any) -> bytes:
        """Returns the body."""
        return json_text(content).encode()


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one sentence.
        kind: the error's ``type``.
        code: a name for programs.
        param: the field at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = REQUEST,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Returns the answer."""
        return PlainJson(self.body, self.status, self.headers)


def api_error(error: BaseException) -> ApiError:
    """Returns what a client is told of any error."""
    if isinstance(error, ApiError):
        return error
    message = public_message(error)
    if isinstance(error, InputError):
        return ApiError(400, message, code="invalid_value")
    if isinstance(error, Expired):
        return ApiError(504, message, kind=SERVER, code="timeout", headers=NO_RETRY)
    if isinstance(error, Cancelled):
        return ApiError(499, message, code="cancelled")
    code = "engine_error" if isinstance(error, HidiffError) else "internal_error"
    return ApiError(500, message, kind=SERVER, code=code, headers=NO_RETRY)


def unavailable(message: str, code: str, seconds: int = 2) -> ApiError:
    """Returns the error for what the server cannot do now, but may in so many seconds."""
    return ApiError(503, message, kind=SERVER, code=code, headers={"Retry-After": str(seconds)})


def unknown_model(asked: str, name: str) -> ApiError:
    """Returns the error for a model that is not the one there is."""
    told = f"There is no model {asked[:60]!r} here: give {name!r}, which is all there is."
    return ApiError(404, told, code="model_not_found", param="model")


def log_fault(error: BaseException) -> None:
    """Tells the operator of what the client is told little of."""
    if not isinstance(error, (ApiError, Cancelled, InputError)):
        log.error("A request failed: %s", error, exc_info=not isinstance(error, HidiffError))


def add_handlers(app: FastAPI, meter: MetricsRecorder) -> None:
    """Makes every error of the application one of OpenAI's form."""

    def answer(_request: Request, error: Exception) -> JSONResponse:
        log_fault(error)
        told = api_error(error)
        if isinstance(error, ApiError) and told.status == 400:  # the service counts what it refuses itself
            meter.failed("input")
        return told.response()

    def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, _of_http(error))

    handlers: dict[type[Exception], Any] = {
        ApiError: answer,
        HidiffError: answer,
        HTTPException: http,
        Exception: lambda _request, error: api_error(error).response(),  # uvicorn logs it
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def validation_error(found: Mapping[str, Any]) -> ApiError:
    """Returns what pydantic found, without the value."""
    param = ".".join(str(part) for part in found["loc"])
    wanted = _WANTED.get(found["type"])
    told = (
        f"{param}: {found['msg']}." if wanted is None else f"{param} must be {wanted.format(**found.get('ctx', {}))}."
    )
    return ApiError(400, public_message(InputError(told)), code="invalid_value", param=param)


def _of_http(error: HTTPException) -> ApiError:
    """Returns what the framework found, with what to do where that is always the same."""
    codes = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
    told = str(error.detail)
    if error.status_code == 404:
        told = f"There is nothing at this address: {ADDRESSES}."
    elif error.status_code == 405:
        told = f"This address takes {(error.headers or {}).get('Allow', 'another method')} alone: {ADDRESSES}."
    return ApiError(error.status_code, told, code=codes.get(error.status_code), headers=error.headers)
