"""The one table of types of numbers, held to what each library says of its own."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401 - numpy has bfloat16 by it
import numpy as np
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper

from hidiff_export.checkpoints.state_dict import TORCH_DTYPES
from hidiff_export.graph.onnx_dtypes import DTYPE_NAMES, ONNX_DTYPES
from hidiff_runtime.format.dtypes import BY_NAME, BY_TAG
from hidiff_runtime.format.safetensors import DTYPES, SafetensorsFile


@pytest.mark.parametrize("name", BY_NAME)
def test_every_library_has_the_type_by_the_name_that_is_noted(name: str, tmp_path: Path) -> None:
    known = BY_NAME[name]
    assert str(TORCH_DTYPES[name]) == f"torch.{name}"
    assert ONNX_DTYPES[name].numpy() == np.dtype(name)
    assert DTYPE_NAMES[ONNX_DTYPES[name]] == name
    assert TensorProto.DataType.Value(known.onnx) == int(ONNX_DTYPES[name])
    safetensors.torch.save_file({"x": torch.zeros(3, dtype=TORCH_DTYPES[name])}, tmp_path / "x")
    info = SafetensorsFile.open(tmp_path / "x").info("x")
    assert BY_TAG[info.dtype] is known
    assert DTYPES[info.dtype].itemsize * 3 == info.nbytes == TORCH_DTYPES[name].itemsize * 3


@pytest.mark.parametrize("name", BY_NAME)
def test_onnx_runtime_writes_types_as_noted(name: str) -> None:
    kind = int(ONNX_DTYPES[name])
    values = [helper.make_tensor_value_info(value, kind, [1]) for value in "xy"]
    graph = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=kind)], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (found,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).get_inputs()
    assert found.type == BY_NAME[name].onnxruntime
