"""The stream model where engines are models of their own: the same pipeline, proven by the model's warm-up request."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.serving.triton import decoupled_model
from hidiff_runtime.serving.triton.backend import TritonBackend
from hidiff_runtime.serving.triton.bls import ask
from hidiff_runtime.serving.triton.layout import ENGINES, PREFIX, engine_models
from hidiff_runtime.serving.triton.model_parameters import Parameters
from hidiff_runtime.serving.triton.responses import refusal


class TritonPythonModel(decoupled_model.TritonPythonModel):
    """Asks no model while it is initialised, which Triton forbids; its first request, the warm-up, does it all.

    Triton takes the model as loaded, and as ready, when the warm-up request has been answered. A bundle that is not
    proven ends the server, as it does where one model holds all engines. The warm-up itself never fails: Triton 2.51
    may break down at that.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Leaves everything to the warm-up request."""
        self._args = args
        self._asked = self._proven = False

    def execute(self, requests: list[Any]) -> None:
        """Answers the warm-up request with nothing; then each request as the base does, unless the server is ending."""
        if not self._asked:
            self._asked = True
            self._proven = self._prove()
            for request in requests:
                request.get_response_sender().send(flags=decoupled_model.FINAL)
        elif self._proven:
            super().execute(requests)
        else:
            for request in requests:
                request.get_response_sender().send(
                    refusal("The server is ending.", "expired"), flags=decoupled_model.FINAL
                )

    def finalize(self) -> None:
        """Closes the bundle, if it is open."""
        if self._proven:
            super().finalize()

    def _prove(self) -> bool:
        """Opens and proves the bundle; where that fails, says why in the server's log and ends the server."""
        try:
            super().initialize(self._args)
        except Exception as error:
            pb_utils.Logger.log_error(f"The server ends: {self._args['model_name']} is not proven. {error}")
            os.kill(os.getppid(), signal.SIGTERM)
            return False
        return True

    def _opening(self, args: Mapping[str, str], parameters: Parameters, manifest: Manifest) -> dict[str, Any]:
        """The server's other models as the backend; where they run is in their own configuration."""
        given = json.loads(args["model_config"])["parameters"]
        engines, prefix = (given[name]["string_value"] for name in (ENGINES, PREFIX))
        return {**parameters.options, "backend": TritonBackend(engines, engine_models(manifest, prefix), ask)}
