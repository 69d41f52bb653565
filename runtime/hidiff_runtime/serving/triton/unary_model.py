"""The model that answers once: it asks the stream model, which holds the engines, and gives what that made."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from hidiff_runtime.errors import EngineError, Expired
from hidiff_runtime.serving.heartbeat import Heartbeat
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.triton import tensor_codec
from hidiff_runtime.serving.triton.background_thread import BackgroundThread
from hidiff_runtime.serving.triton.metrics_sink import TritonSink
from hidiff_runtime.serving.triton.model_parameters import STREAM, at_once
from hidiff_runtime.serving.triton.responses import answer, refusal, send_last, timeout_of, told
from hidiff_runtime.serving.triton.run_tokens import RunTokens
from hidiff_runtime.serving.triton.schema import RESULT
from hidiff_runtime.serving.triton.streamed_request import TOKEN

_POLL = 0.05
"""Seconds between two looks at a run."""


class TritonPythonModel:
    """Has no engine and no weights."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Reads which model to ask. Raises KeyError where the configuration does not say."""
        config = json.loads(args["model_config"])
        self._stream = config["parameters"][STREAM]["string_value"]
        self._tokens = RunTokens(os.getppid())
        count = at_once(config)
        # Triton's stub (2.51) lets go of a finished answer in a thread of its own without the interpreter's lock. Where
        # that was the last hold on it, its arrays are freed while other code runs: one process in thousands of requests
        # crashed. So the last answers are kept here.
        self._asked: deque[Any] = deque(maxlen=2 * count)
        self._askers = [_thread() for _ in range(count)]
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="hidiff-front") if count > 1 else None
        self._room = threading.Semaphore(count - 1)
        self._heartbeat = Heartbeat(MetricsRecorder(TritonSink(args["model_name"], args["model_instance_name"])))
        self._heartbeat.start()

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Returns one response for each request; None where they are answered from other threads, as they are done.

        It then returns once there is room for one more request, so that the others wait in Triton's queue, by its
        rules, and in its memory.
        """
        if self._pool is None:
            return [self._answer(request, request.is_cancelled) for request in requests]
        for request in requests:
            self._pool.submit(self._send, request, request.get_response_sender())
            self._room.acquire()
        return None

    def finalize(self) -> None:
        """Forgets its tokens."""
        self._heartbeat.stop()
        if self._pool is not None:
            self._pool.shutdown()
        for asker in self._askers:
            asker.close()
        self._tokens.close()

    def _send(self, request: Any, sender: Any) -> None:
        """Answers a request beside others."""
        try:
            response = self._answer(request, sender.is_cancelled)
        finally:
            self._room.release()
        try:
            send_last(sender, response)
        except Exception as error:
            pb_utils.Logger.log_error(f"answering: {error!r}")

    def _answer(self, request: Any, gone: Callable[[], bool]) -> Any:
        try:
            return answer(tensor_codec.joined(self._finished(request, gone)))
        except _Refused as error:
            return refusal(*error.args)
        except Exception as error:
            return refusal(*told(error))

    def _finished(self, request: Any, gone: Callable[[], bool]) -> list[tensor_codec.Arrays]:
        """Returns the finished rows. Looks now and then whether the client has cancelled, and the stream model's
        process lives.

        Raises:
            EngineError: that process has ended. Triton itself would let the asking thread wait for ever.
        """
        token, made = self._tokens.new(), Future[list[tensor_codec.Arrays]]()
        asker = self._askers.pop()
        try:
            asker.do(partial(self._fill, made, request, token))
            while not wait([made], _POLL).done:
                if gone():
                    self._tokens.cancel(token)
                if self._tokens.abandoned(token):
                    asker = _thread()  # the other one waits for ever
                    raise EngineError("The process that holds the engines has ended.", given=self._stream)
            return made.result()
        finally:
            self._askers.append(asker)
            self._tokens.forget(token)

    def _fill(self, made: Future[list[tensor_codec.Arrays]], request: Any, token: str) -> None:
        try:
            made.set_result(self._ask(request, token))
        except Exception as error:
            made.set_exception(error)

    def _ask(self, request: Any, token: str) -> list[tensor_codec.Arrays]:
        """Returns the finished rows.

        Raises:
            Expired: the client's time was over before the stream model began; Triton then answers in its place.
        """
        allowed, since = timeout_of(request), time.monotonic()
        asked = pb_utils.InferenceRequest(
            model_name=self._stream,
            requested_output_names=["event", *RESULT],
            inputs=request.inputs(),
            parameters={TOKEN: token},
            timeout=allowed,
        )
        responses = asked.exec(decoupled=True)
        try:
            return self._read(responses, allowed, since)
        finally:
            self._asked.append(responses)

    def _read(self, responses: Any, allowed: int, since: float) -> list[tensor_codec.Arrays]:
        """Returns the finished rows in a stream of responses, as `_ask` does."""
        found = []
        for response in responses:
            if response.has_error():  # not the stream model's own words: its queue is full, or its process is gone
                if allowed and time.monotonic() - since >= allowed / 1e6:
                    raise Expired(advice="Allow more time.")
                pb_utils.Logger.log_error(f"{self._stream}: {response.error().message()}")
                raise _Refused("The server cannot take the request now.", "expired")
            # Copies: the memory is the server's again when the response goes.
            message = {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
            if not message:  # the end of the stream
                continue
            if refused := tensor_codec.refused(message):
                raise _Refused(*refused)
            found.append(message)
        return found


def _thread() -> BackgroundThread:
    """Returns what asks: kept from request to request, since starting a thread takes longer than what it has to do."""
    return BackgroundThread(lambda error: pb_utils.Logger.log_error(f"asking: {error!r}"))


class _Refused(Exception):  # noqa: N818 - names the outcome
    """What the stream model said: message and kind."""
