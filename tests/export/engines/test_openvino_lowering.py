"""Portable graphs become OpenVINO's: the same results from products and convolutions that it runs fast."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from hidiff_export.engines.openvino import OpenVinoBuilder
from hidiff_export.engines.protocol import PortableGraph
from hidiff_runtime.format.manifest import GraphRecord, Manifest
from hidiff_runtime.format.safetensors import SafetensorsFile


@pytest.fixture(scope="module")
def lowered(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's graphs, with OpenVINO's beside."""
    folder = tmp_path_factory.mktemp("lowered") / "bundle"
    shutil.copytree(sd15_bundle, folder)
    progress: list[float] = []
    records = graphs(folder)
    files = OpenVinoBuilder().build(
        [PortableGraph(folder / record.graph, record) for record in records],
        lambda done, total, _: progress.append(done / total),
    )
    assert all(path.is_file() for path in files)
    assert progress == sorted(progress)
    assert progress[-1] <= 1
    return folder


def graphs(folder: Path) -> list[GraphRecord]:
    manifest = Manifest.read(folder)
    return [*manifest.phases, *(record for _, record in manifest.others())]


def outputs(path: Path, record: GraphRecord) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    given = {
        spec.name: random.integers(0, 4, spec.shape).astype(np.int32)
        if spec.dtype == "int32"
        else random.standard_normal(spec.shape).astype(np.float32)
        for spec in record.inputs
    }
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, given)


def test_each_graph_computes_what_it_did(lowered: Path) -> None:
    for record in graphs(lowered):
        path = lowered / record.graph
        for found, due in zip(outputs(path.with_suffix(".openvino.onnx"), record), outputs(path, record), strict=True):
            noise = ((found - due).astype(np.float64) ** 2).sum()
            assert 10 * np.log10((due.astype(np.float64) ** 2).sum() / max(noise, 1e-300)) > 90, record.graph


def test_enlarged_tensors_gemms_and_splits_are_gone(lowered: Path) -> None:
    for phase in ("strided", "windowed"):
        before, after = (
            Counter(node.op_type for node in ir.load(lowered / f"unet/{phase}{ending}").graph)
            for ending in (".onnx", ".openvino.onnx")
        )
        assert before["Resize"] == 3
        assert after["Resize"] == after["Gemm"] == 0
        assert after["DepthToSpace"] == 3
        assert after["Split"] == 1  # of the window shifts


def test_sums_of_weights_are_stored_once_for_all_phases(lowered: Path) -> None:
    stores = sorted(path.name.partition("-")[0] for path in (lowered / "unet").glob("weights.sums*"))
    assert stores == ["weights.sums2x", "weights.sums4x"]  # the strided phase enlarges one four times
    (twice,) = (lowered / "unet").glob("weights.sums2x-*")
    names = [*SafetensorsFile.open(twice)]
    assert len(names) == 3 * 4
    assert {name.partition(".conv")[0] for name in names} == {f"up_blocks.{block}.upsamplers.0" for block in range(3)}


def test_the_weights_themselves_are_where_they_were(lowered: Path) -> None:
    """Nothing of the network's weights is copied but the sums."""
    for record in graphs(lowered):
        graph = ir.load((lowered / record.graph).with_suffix(".openvino.onnx")).graph
        inside = [v for v in graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
        assert sum(value.const_value.nbytes for value in inside) < 2**20, record.graph
