"""The model that answers once: it asks the stream model, which holds the engines, and gives what that made."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from hidiff_runtime.serving.heartbeat import Heartbeat
from hidiff_runtime.serving.metrics import Meter
from hidiff_runtime.serving.triton import rows
from hidiff_runtime.serving.triton.answers import answer, refusal, timeout_of, told
from hidiff_runtime.serving.triton.cancel import Tokens
from hidiff_runtime.serving.triton.meter import TritonSink
from hidiff_runtime.serving.triton.parameters import STREAM
from hidiff_runtime.serving.triton.schema import RESULT
from hidiff_runtime.serving.triton.stream import TOKEN

_POLL = 0.05
"""Seconds between two looks whether the client has cancelled."""


class TritonPythonModel:
    """Has no engine and no weights."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Reads which model to ask. Raises KeyError where the configuration does not say."""
        self._stream = json.loads(args["model_config"])["parameters"][STREAM]["string_value"]
        self._tokens = Tokens(os.getppid())
        self._heartbeat = Heartbeat(Meter(TritonSink(args["model_name"], args["model_instance_name"])))
        self._heartbeat.start()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Forgets its tokens."""
        self._heartbeat.stop()
        self._tokens.close()

    def _answer(self, request: Any) -> Any:
        try:
            with self._watched(request) as token:
                found = self._ask(request, token)
            return answer(rows.joined(found))
        except _Refused as error:
            return refusal(*error.args)
        except Exception as error:
            return refusal(*told(error))

    def _ask(self, request: Any, token: str) -> list[rows.Arrays]:
        """The finished rows."""
        asked = pb_utils.InferenceRequest(
            model_name=self._stream,
            requested_output_names=["event", *RESULT],
            inputs=request.inputs(),
            parameters={TOKEN: token},
            timeout=timeout_of(request),
        )
        found = []
        for response in asked.exec(decoupled=True):
            if response.has_error():  # not the stream model's own words: its queue is full, or its process is gone
                pb_utils.Logger.log_error(f"{self._stream}: {response.error().message()}")
                raise _Refused("The server cannot take the request now.", "expired")
            # Copies: the memory is the server's again when the response goes.
            message = {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
            if not message:  # the end of the stream
                continue
            if refused := rows.refused(message):
                raise _Refused(*refused)
            found.append(message)
        return found

    @contextmanager
    def _watched(self, request: Any) -> Iterator[str]:
        """A token that is set when the client cancels."""
        token, done = self._tokens.new(), threading.Event()

        def watch() -> None:
            while not done.wait(_POLL):
                if request.is_cancelled():
                    self._tokens.cancel(token)
                    return

        thread = threading.Thread(target=watch, name="hidiff-cancel", daemon=True)
        thread.start()
        try:
            yield token
        finally:
            done.set()
            thread.join()
            self._tokens.forget(token)


class _Refused(Exception):  # noqa: N818 - names the outcome
    """What the stream model said: message and kind."""
