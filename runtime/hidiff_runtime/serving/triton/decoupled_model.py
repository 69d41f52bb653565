"""The model that holds the engines: decoupled, it sends progress, previews and each row's result as they come."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.serving.heartbeat import Heartbeat
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.public_errors import kind_of
from hidiff_runtime.serving.service import Service, Ticket
from hidiff_runtime.serving.triton import tensor_codec
from hidiff_runtime.serving.triton.background_thread import BackgroundThread
from hidiff_runtime.serving.triton.metrics_sink import TritonSink
from hidiff_runtime.serving.triton.model_parameters import AGAIN, Parameters
from hidiff_runtime.serving.triton.responses import answer, refusal, tensors_of, timeout_of, told
from hidiff_runtime.serving.triton.run_tokens import RunTokens

if TYPE_CHECKING:
    from hidiff_runtime.pipeline.pipeline import PictureStep

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
TOKEN = "hidiff_token"
"""The request parameter by which the front names its token. A request that has one gets no progress."""

_RETURN = 0.001
"""Seconds in which `execute` returns to Triton."""


class TritonPythonModel:
    """Opens and proves the bundle when it is initialized: the server is not ready before that, or ends."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Opens the bundle that the configuration names.

        Raises:
            HidiffError: of the class that says why; the server writes it into its log and ends with exit code 1.
        """
        parameters = Parameters.read(json.loads(args["model_config"]))
        folder = Path(args["model_repository"]) / args["model_version"] / parameters.bundle
        _check_bundle(folder, parameters)
        self._aside = BackgroundThread(lambda error: pb_utils.Logger.log_error(f"beside a run: {error!r}"))
        sink = TritonSink(args["model_name"], args["model_instance_name"])
        self._meter = MetricsRecorder(self._aside.deferred(sink))
        self._tokens = RunTokens(os.getppid())
        gpu = {"device": int(args["model_instance_device_id"])} if args["model_instance_kind"] == "GPU" else {}
        options = {**parameters.options, **gpu, "allow_links": parameters.allow_links}
        self._service = Service.open(folder, limits=parameters.limits, meter=self._meter, **options)
        self._heartbeat = Heartbeat(self._meter)
        self._heartbeat.start()

    def execute(self, requests: list[Any]) -> None:
        """Answers each request by a stream of responses, the last of them marked as such."""
        for request in requests:
            self._serve(request)

    def finalize(self) -> None:
        """Closes every engine."""
        self._heartbeat.stop()
        self._service.close()
        self._tokens.close()
        self._aside.close()

    def _serve(self, request: Any) -> None:
        sender = request.get_response_sender()
        token = _token(request)
        try:
            with self._tokens.running(token) if token else nullcontext():
                self._run(request, sender, token)
        except Exception as error:
            message, kind = told(error)
            self._end(sender, answer(tensor_codec.failed(message, kind)) if token else refusal(message, kind))

    def _end(self, sender: Any, response: Any) -> None:
        """Sends the last response, behind all progress and metrics, once Triton has this instance back.

        A client that is answered before that may ask again so soon that Triton's scheduler (2.51) finds no instance
        free, and nobody wakes it when one is: the request then waits for half a second.
        """

        def send() -> None:
            time.sleep(_RETURN)
            sender.send(response, flags=_FINAL)

        self._aside.do(send)

    def _run(self, request: Any, sender: Any, token: str | None) -> None:
        """Makes the pictures of all rows, in their order; every row is looked at before the first runs."""
        asked = self._rows(request)
        runs = [self._service.request(row.values) for row in asked]
        if token:
            tensor_codec.check_one_tensor(asked, runs)
        allowed = timeout_of(request)
        deadline = time.monotonic() + allowed / 1e6 if allowed else None

        def gone() -> bool:
            return sender.is_cancelled() or (token is not None and self._tokens.cancelled(token))

        with self._aside.watching(gone) as cancelled:
            tickets = []
            for index, (row, run) in enumerate(zip(asked, runs, strict=True)):

                def watch(step: PictureStep, index: int = index, row: tensor_codec.TensorRow = row) -> None:
                    self._aside.do(lambda: sender.send(answer(tensor_codec.progress(index, step, row))))

                tickets.append(Ticket(run, None if token else watch, cancelled.is_set, deadline))
            for index, result in enumerate(self._service.results(tickets)):
                message = answer(tensor_codec.finished(index, result, asked[index].output))
                if index < len(runs) - 1:
                    self._aside.do(partial(sender.send, message))
        self._end(sender, message)

    def _rows(self, request: Any) -> list[tensor_codec.TensorRow]:
        try:
            return tensor_codec.read_rows(tensors_of(request), self._service.limits)
        except InputError as error:
            self._meter.failed(kind_of(error))
            raise


def _token(request: Any) -> str | None:
    """Returns the front's token; anything else that a client sends by that name is none."""
    found = json.loads(request.parameters()).get(TOKEN)
    return found if RunTokens.valid(found) else None


def _check_bundle(folder: Path, parameters: Parameters) -> None:
    """Raises BundleError where the bundle is another than the repository was written for."""
    manifest = BundleFolder(folder, parameters.allow_links).manifest()
    if manifest.digest != parameters.bundle_hash:
        raise BundleError(
            "This is not the bundle that the model repository was written for.",
            given=f"{folder} has {manifest.digest} instead of {parameters.bundle_hash}",
            advice=AGAIN,
        )
