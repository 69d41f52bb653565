"""The model that loads those that ask other models, which they cannot be proven without, once the server answers.

While Triton loads the models it starts with, none of them may ask another one. A pipeline whose engines are models of
their own could be proven only later, when Triton has said long ago that it is ready. So that pipeline is left out at
the start (``--model-control-mode=explicit``), and this model loads it as soon as requests are answered. Until the
pipeline is loaded, which its warm-up request decides, Triton's own readiness is false.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from hidiff_runtime.serving.triton.layout import LOADED, LOADS, PING

_PAUSE = 0.02
"""Seconds between two questions whether the server answers: so long it may call itself ready too early."""


class TritonPythonModel:
    """The model; its methods are called by Triton's Python backend alone."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Prepares a thread. It begins with the warm-up request: asking the server earlier may end it, in 2.51."""
        self._name = args["model_name"]
        self._loaded = 0
        self._over = threading.Event()
        models = json.loads(args["model_config"])["parameters"][LOADS]["string_value"].split(",")
        self._thread = threading.Thread(target=self._load, args=(models,), name="hidiff-start", daemon=True)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Says how many models are loaded."""
        if self._thread.ident is None:
            self._thread.start()
        loaded = np.array([self._loaded], np.int32)
        return [pb_utils.InferenceResponse([pb_utils.Tensor(LOADED.name, loaded)]) for _ in requests]

    def finalize(self) -> None:
        """Ends the waiting."""
        self._over.set()

    def _load(self, models: Sequence[str]) -> None:
        """Loads model after model; stops at one that does not load, and Triton stays not ready and logs why."""
        while not self._answered():
            if self._over.wait(_PAUSE):
                return
        for model in models:
            try:
                pb_utils.load_model(model_name=model)
            except pb_utils.TritonModelException as error:
                pb_utils.Logger.log_error(f"{model} did not load, so nothing is served: {error}")
                return
            self._loaded += 1

    def _answered(self) -> bool:
        """Whether the server answers requests: it refuses this one, to this model itself, until it does."""
        ping = pb_utils.Tensor(PING.name, np.zeros(1, np.int32))
        request = pb_utils.InferenceRequest(model_name=self._name, requested_output_names=[LOADED.name], inputs=[ping])
        return not request.exec().has_error()
