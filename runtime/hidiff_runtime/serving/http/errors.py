"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hidiff_runtime.errors import Cancelled, Expired, HidiffError, InputError
from hidiff_runtime.serving.messages import public_message
from hidiff_runtime.serving.metrics import Meter

log = logging.getLogger(__name__)

REQUEST, SERVER, KEY, BUSY = "invalid_request_error", "server_error", "authentication_error", "rate_limit_error"
"""What OpenAI calls kinds of errors."""

NO_RETRY = {"x-should-retry": "false"}
"""Keeps OpenAI's clients from asking again for what took long and failed."""


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
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: BaseException) -> ApiError:
    """What a client is told of any error."""
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


def log_fault(error: BaseException) -> None:
    """Tells the operator of what the client is told little of."""
    if not isinstance(error, (ApiError, Cancelled, InputError)):
        log.error("A request failed: %s", error, exc_info=not isinstance(error, HidiffError))


def add_handlers(app: FastAPI, meter: Meter) -> None:
    """Makes every error of the application one of OpenAI's form."""

    def answer(_request: Request, error: Exception) -> JSONResponse:
        log_fault(error)
        return api_error(error).response()

    def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        meter.failed("input")
        return validation_error(error.errors()[0]).response()

    def http(_request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
        told = ApiError(error.status_code, str(error.detail), code=codes.get(error.status_code), headers=error.headers)
        return told.response()

    handlers: dict[type[Exception], Any] = {
        ApiError: answer,
        HidiffError: answer,
        RequestValidationError: invalid,
        HTTPException: http,
        Exception: lambda _request, error: api_error(error).response(),  # uvicorn logs it
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def validation_error(found: Mapping[str, Any]) -> ApiError:
    """What pydantic found, without the value."""
    where = [str(part) for part in found["loc"] if part != "body" and not isinstance(part, int)]
    param = ".".join(where) or None
    told = InputError(f"{param or 'The body'}: {found['msg']}.")
    return ApiError(400, public_message(told), code="invalid_value", param=param)
