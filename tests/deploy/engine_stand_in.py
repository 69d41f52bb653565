"""Stands in for Triton's ONNX Runtime backend, which the tests' server does not have.

Each ``platform: "onnxruntime_onnx"`` becomes a Python model that opens the same ``model.onnx`` with onnxruntime and
answers with the same names, types and shapes. The rest of the configuration, files and calls stay what they are.
"""

from __future__ import annotations

from pathlib import Path

PLATFORM = 'platform: "onnxruntime_onnx"'

_MODEL = """
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_reuse = options.enable_mem_pattern = False
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            outputs = self._session.run(request.requested_output_names(), inputs)
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnx runtime error: {error}"))
        named = zip(request.requested_output_names(), outputs)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in named])
"""


def stand_in(repository: Path) -> list[str]:
    """Replaces what runs the engines of a repository; the names of their models."""
    found = []
    for config in sorted(repository.glob("*/config.pbtxt")):
        text = config.read_text(encoding="utf-8")
        if PLATFORM in text:
            config.write_text(text.replace(PLATFORM, 'backend: "python"'), encoding="utf-8")
            (config.parent / "1/model.py").write_text(_MODEL, encoding="utf-8")
            found.append(config.parent.name)
    return found
