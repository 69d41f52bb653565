"""The model that holds the engines: decoupled, it sends progress, previews and each row's result as they come."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.pipeline.batching import fill, run_key
from hidiff_runtime.serving.heartbeat import Heartbeat
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.service import Service
from hidiff_runtime.serving.triton.background_thread import BackgroundThread
from hidiff_runtime.serving.triton.metrics_sink import TritonSink
from hidiff_runtime.serving.triton.model_parameters import AGAIN, Parameters
from hidiff_runtime.serving.triton.run_tokens import RunTokens
from hidiff_runtime.serving.triton.streamed_request import StreamedRequest, draw_together

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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
        self._dynamic_batching = parameters.dynamic_batching
        gpu = {"device": int(args["model_instance_device_id"])} if args["model_instance_kind"] == "GPU" else {}
        options = {**parameters.options, **gpu, "allow_links": parameters.allow_links}
        self._service = Service.open(folder, limits=parameters.limits, meter=self._meter, **options)
        self._heartbeat = Heartbeat(self._meter)
        self._heartbeat.start()

    def execute(self, requests: list[Any]) -> None:
        """Answers each request by a stream of responses, the last of them marked as such."""
        found = [StreamedRequest(request, self._aside, self._tokens) for request in requests]
        if self._dynamic_batching:
            self._draw_joined(found)
            return
        for request in found:
            if request.begin(self._service, self._meter):
                request.draw(self._service)

    def finalize(self) -> None:
        """Closes every engine."""
        self._heartbeat.stop()
        self._service.close()
        self._tokens.close()
        self._aside.close()

    def _draw_joined(self, requests: Sequence[StreamedRequest]) -> None:
        """Makes the pictures of all requests, those of one row together that one run can draw."""
        waiting = [request for request in requests if request.begin(self._service, self._meter)]
        self._aside.flush()  # by then it is known who has gone while the request waited
        while waiting:
            together = self._together(waiting)
            waiting = [request for request in waiting if request not in together]
            if len(together) == 1:
                together[0].draw(self._service)
            else:
                draw_together(together, self._service)

    def _together(self, waiting: Sequence[StreamedRequest]) -> list[StreamedRequest]:
        """Returns the first that waits, and those behind it that one run can draw with it."""
        first, *others = waiting
        asked = first.only
        if asked is None:
            return [first]
        key = run_key(asked)
        alike = [other for other in others if (request := other.only) is not None and run_key(request) == key]
        count = fill(self._service.pipeline.bundle.manifest, asked, 1 + len(alike))
        return [first, *alike[: count - 1]]


def _check_bundle(folder: Path, parameters: Parameters) -> None:
    """Raises BundleError where the bundle is another than the repository was written for."""
    manifest = BundleFolder(folder, parameters.allow_links).manifest()
    if manifest.digest != parameters.bundle_hash:
        raise BundleError(
            "This is not the bundle that the model repository was written for.",
            given=f"{folder} has {manifest.digest} instead of {parameters.bundle_hash}",
            advice=AGAIN,
        )
