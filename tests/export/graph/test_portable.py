"""Graphs that are read from a bundle: their weights may lie in files with several names, and nowhere else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from hidiff_export.engines.onnxruntime import lower
from hidiff_export.graph.portable import load_graph

GRAPH, WEIGHTS = "windowed.onnx", "weights.safetensors"


@pytest.fixture
def linked(sd15_bundle: Path, tmp_path: Path) -> Path:
    """A UNet's folder whose files have two names each, as ``cp -al`` leaves them."""
    folder = tmp_path / "linked"
    shutil.copytree(sd15_bundle / "unet", tmp_path / "unet")
    shutil.copytree(tmp_path / "unet", folder, copy_function=os.link)
    return folder


def largest(model: ir.Model) -> ir.ExternalTensor:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return max((one for one in tensors if isinstance(one, ir.ExternalTensor)), key=lambda tensor: tensor.nbytes)


def test_weights_in_a_file_with_two_names_are_read(linked: Path, sd15_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hard link"):
        largest(ir.load(linked / GRAPH)).numpy()
    alone = shutil.copytree(sd15_bundle / "unet", tmp_path / "alone")
    expected = largest(ir.load(alone / GRAPH)).numpy()
    assert np.array_equal(largest(load_graph(linked / GRAPH)).numpy(), expected)


def test_the_engine_of_such_a_graph_is_the_same(linked: Path, sd15_bundle: Path) -> None:
    lower(linked / GRAPH, linked / "engine.onnx")
    assert (linked / "engine.onnx").read_bytes() == (sd15_bundle / "unet/windowed.onnxruntime.onnx").read_bytes()


@pytest.mark.parametrize("location", [WEIGHTS, "../secret"])
def test_weights_elsewhere_are_refused(linked: Path, tmp_path: Path, location: str) -> None:
    secret = tmp_path / "secret"
    (linked / WEIGHTS).replace(secret)
    (linked / WEIGHTS).symlink_to(secret)
    model = ir.load(linked / GRAPH)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
            )
    (linked / GRAPH).write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(ValueError, match="outside the base directory"):
        largest(load_graph(linked / GRAPH)).numpy()
