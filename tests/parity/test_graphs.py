"""A phase's portable graph and its engine against the PyTorch module they were made from, and against themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
from hidiff_export.engines import onnxruntime as onnxruntime_build
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.engines.tensorrt import lowering as tensorrt_build
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.graph.float32_ops import float32_operation_of
from hidiff_export.graph.passes.float32_operations import computes_in_float32
from hidiff_export.graph.portable import save, write_graph
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.random_inputs import arrays, mixed_shifts, random_inputs
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.phases import Phase, PhaseKind
from hidiff_runtime.verification.comparison import Metrics
from tests.export.engines.tensorrt.parsed import check_float32_operations, parse

pytestmark = pytest.mark.slow

BOUND = {Precision.FLOAT32: 80.0, Precision.FLOAT16: 40.0}


@dataclass(frozen=True)
class Case:
    """A phase of a tiny UNet at a size where every window, pool and stride meets an odd number."""

    family: Family
    kind: PhaseKind
    height: int
    width: int
    precision: Precision = Precision.FLOAT32
    control: bool = False

    def __str__(self) -> str:
        return f"{self.family.value}-{self.phase.name}-{self.height}x{self.width}-{self.precision.value}"

    @property
    def phase(self) -> Phase:
        """With a ControlNet's residuals if the case has them."""
        return Phase(self.kind, control=self.control)


CASES = (
    Case(Family.SD15, PhaseKind.STRIDED_POOLED, 11, 14),
    Case(Family.SD21, PhaseKind.STRIDED, 16, 12, Precision.FLOAT16, control=True),
    Case(Family.SDXL, PhaseKind.STRIDED_POOLED, 18, 22, Precision.FLOAT16),  # float32: test_pictures.py
)


@dataclass(frozen=True)
class Exported:
    """A phase on disk, and what PyTorch computes in float32 on the same weights and inputs."""

    case: Case
    folder: Path
    reference: PhaseUNet
    inputs: dict[str, np.ndarray]

    def expected(self, **changed: np.ndarray) -> np.ndarray:
        """PyTorch's output."""
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in {**self.inputs, **changed}.items()}
        with torch.inference_mode():
            return self.reference(**PhaseUNet.arguments(tensors)).numpy()

    def computed(self, name: str) -> np.ndarray:
        """ONNX Runtime's output of the file called ``name``."""
        import onnxruntime

        session = onnxruntime.InferenceSession(self.folder / name, providers=["CPUExecutionProvider"])
        (noise_pred,) = session.run(["noise_pred"], self.inputs)
        return noise_pred


@pytest.fixture(scope="module", params=CASES, ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case = request.param
    folder = tmp_path_factory.mktemp("unet")
    checkpoint = load(Component.UNET, "random:0", case.family, Task.TEXT_TO_IMAGE, Width.TINY)
    store = WeightStore.write(checkpoint.state_dict, folder / "weights.safetensors", case.precision)
    layout, phase = Layout.of(case.family), case.phase
    stored = build(Component.UNET, checkpoint.config, store.state_dict(), PRECISIONS[case.precision][1])
    module = PhaseUNet(stored, layout, phase, case.height, case.width)
    write_graph(module, 2, store, folder / "phase.onnx")
    onnxruntime_build.lower(folder / "phase.onnx", folder / "phase.onnxruntime.onnx")
    lowered = ir.load(folder / "phase.onnx")
    tensorrt_build.lower(lowered)
    save(lowered, folder / "phase.tensorrt.onnx")
    exact = PhaseUNet(
        build(Component.UNET, checkpoint.config, store.state_dict()), layout, phase, case.height, case.width
    )
    given = random_inputs(exact.input_specs(2), timestep=501.0, width=case.width * 8, height=case.height * 8, seed=3)
    shifts = mixed_shifts((len(layout.windowed_blocks),), 3)
    return Exported(case, folder, exact, {**arrays(given), "window_shifts": shifts})


@pytest.mark.parametrize("name", ["phase.onnx", "phase.onnxruntime.onnx", "phase.tensorrt.onnx"])
def test_it_computes_what_pytorch_computes(exported: Exported, name: str) -> None:
    bound = BOUND[exported.case.precision]
    computed = exported.computed(name)
    assert Metrics.of(exported.expected(), computed).snr_db >= bound
    shifts = exported.inputs["window_shifts"].copy()
    shifts[0] = (shifts[0] + 1) % 4
    assert Metrics.of(exported.expected(window_shifts=shifts), computed).snr_db < bound
    for residual in (name for name in exported.inputs if "residual" in name):
        other = -exported.inputs[residual]
        assert Metrics.of(exported.expected(**{residual: other}), computed).snr_db < bound


def test_what_tensorrt_builds_is_float32_where_the_table_says(exported: Exported) -> None:
    left = {
        name: {node.op_type for node in ir.load(exported.folder / name).graph if _strays(node)}
        for name in ("phase.onnx", "phase.tensorrt.onnx")
    }
    half = exported.case.precision is not Precision.FLOAT32
    strays = {"Attention", "LayerNormalization"} if half else set()
    assert left == {"phase.onnx": strays, "phase.tensorrt.onnx": set()}


def _strays(node: ir.Node) -> bool:
    return float32_operation_of(node.op_type) is not None and not computes_in_float32(node)


@pytest.mark.needs("tensorrt-rtx")
def test_tensorrt_rtx_parses_float32_where_the_table_says(exported: Exported) -> None:
    if exported.case.precision is Precision.FLOAT32:
        pytest.skip("all of it is float32")
    check_float32_operations(parse(exported.folder / "phase.tensorrt.onnx"), "HALF")


@pytest.mark.needs("tensorrt-rtx")
def test_tensorrt_rtx_builds_it_at_odd_sizes_and_in_float32(exported: Exported) -> None:
    specs = exported.reference.input_specs(2), exported.reference.output_specs(2)
    graph = PortableGraph(exported.folder / "phase.onnx", GraphRecord("phase.onnx", {}, *specs))
    written = TensorRtBuilder(TENSORRT_RTX, ("sm89",)).build([graph], lambda _done, _total, _note: None)
    assert {path.name for path in written} >= {"phase.tensorrt-rtx.json", "phase.tensorrt-rtx.plan"}


def test_the_graph_is_valid_static_and_holds_no_weight(exported: Exported) -> None:
    onnx.checker.check_model(exported.folder / "phase.onnx")
    model = onnx.load(exported.folder / "phase.onnx", load_external_data=False)
    stored = set(WeightStore.open(exported.folder / "weights.safetensors").names())
    outside = [value for value in model.graph.initializer if value.external_data]
    places = [{entry.key: entry.value for entry in value.external_data} for value in outside]
    assert {place["location"] for place in places} == {"weights.safetensors"}
    assert len({place["offset"] for place in places}) == len(stored)
    inline = sum(len(value.SerializeToString()) for value in model.graph.initializer if not value.external_data)
    assert inline < 200_000
    dimensions = [dim for value in model.graph.input for dim in value.type.tensor_type.shape.dim]
    assert all(dim.HasField("dim_value") for dim in dimensions)
