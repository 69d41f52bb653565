"""A store of tensors that are computed when they are written, which graphs refer to before."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from hidiff_export.errors import StorageError
from hidiff_export.graph.derived_store import DerivedStore
from hidiff_runtime.format.safetensors import SafetensorsFile

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(-3, 4, dtype=np.int8),
    "c": np.linspace(0, 1, 8).astype(ml_dtypes.bfloat16),
}


def tensors(asked: list[str]) -> dict[str, ir.TensorProtocol]:
    """Tensors that say when they are computed."""

    def lazy(name: str, array: np.ndarray) -> ir.LazyTensor:
        def compute() -> ir.TensorProtocol:
            asked.append(name)
            return ir.tensor(array)

        return ir.LazyTensor(compute, ir.tensor(array).dtype, ir.Shape(array.shape), name=name)

    return {name: lazy(name, array) for name, array in ARRAYS.items()}


def test_what_is_referred_to_is_what_is_written(tmp_path: Path) -> None:
    asked: list[str] = []
    store = DerivedStore(tmp_path / "weights.more.safetensors", tensors(asked))
    references = {name: store.reference(name) for name in ARRAYS}
    assert not asked
    done: list[float] = []
    store.write(done.append)
    assert sorted(asked) == sorted(store.names) == sorted(ARRAYS)
    assert done == sorted(done)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(references[name].numpy(), array)
        assert references[name].dtype == ir.tensor(array).dtype
    assert {*SafetensorsFile.open(store.path)} == {*ARRAYS}


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    store = DerivedStore(tmp_path / "nowhere/weights.safetensors", tensors([]))
    with pytest.raises(StorageError):
        store.write(lambda _: None)
