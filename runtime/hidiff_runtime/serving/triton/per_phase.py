"""The stream model where engines are models of their own: the same pipeline, proven by the model's warm-up request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from hidiff_runtime.manifest import Manifest
from hidiff_runtime.serving.triton import stream
from hidiff_runtime.serving.triton.backend import TritonBackend
from hidiff_runtime.serving.triton.bls import ask
from hidiff_runtime.serving.triton.layout import ENGINES, PREFIX, engine_models
from hidiff_runtime.serving.triton.parameters import Parameters


class TritonPythonModel(stream.TritonPythonModel):
    """Asks no model while it is initialised, which Triton forbids; its first request, the warm-up, does it all.

    Triton takes the model as loaded, and as ready, when the warm-up request has succeeded.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Leaves everything to the warm-up request."""
        self._args = args
        self._proven = False

    def execute(self, requests: list[Any]) -> None:
        """Opens and proves the bundle where that is still to be done; then answers each request as the base does."""
        if self._proven:
            super().execute(requests)
        else:
            self._prove(requests)

    def finalize(self) -> None:
        """Closes the bundle, if it is open."""
        if self._proven:
            super().finalize()

    def _prove(self, requests: list[Any]) -> None:
        """Answers with nothing, or with what is wrong: then Triton does not load the model, and logs that."""
        senders = [request.get_response_sender() for request in requests]
        try:
            super().initialize(self._args)
        except Exception as error:
            for sender in senders:
                wrong = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
                sender.send(wrong, flags=stream.FINAL)
            return
        self._proven = True
        for sender in senders:
            sender.send(flags=stream.FINAL)

    def _opening(self, args: Mapping[str, str], parameters: Parameters, manifest: Manifest) -> dict[str, Any]:
        """The server's other models as the backend; where they run is in their own configuration."""
        given = json.loads(args["model_config"])["parameters"]
        engines, prefix = (given[name]["string_value"] for name in (ENGINES, PREFIX))
        return {**parameters.options, "backend": TritonBackend(engines, engine_models(manifest, prefix), ask)}
