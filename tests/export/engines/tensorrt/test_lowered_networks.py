"""Where the lowered graphs of tiny networks are float32, by their types and by the network that TensorRT parses."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX
from hidiff_export.engines.tensorrt.lowering import lower
from hidiff_export.families.family import Family, Task, Width, unet_config
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.graph.float32_ops import FLOAT32_OPERATIONS
from hidiff_export.graph.passes.decompose_attention import HEAD_SIZES
from hidiff_export.graph.passes.float32_operations import computes_in_float32
from hidiff_export.graph.portable import save, write_graph
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.phases import Phase, PhaseKind
from tests.export.engines.tensorrt import kernel_source
from tests.export.engines.tensorrt.parsed import check_float32_operations, parse

pytestmark = pytest.mark.slow

SIZE = 16
FLOAT32_OPERATORS = frozenset().union(*(operation.operators for operation in FLOAT32_OPERATIONS))
MOVED = frozenset({"Cast", "Transpose", "Split", "Concat", "Reshape", "Expand", "Unsqueeze", "Slice"})
"""Operators that compute nothing, so that their type does not matter."""


@dataclass(frozen=True)
class Case:
    """The windowed phase of a tiny UNet."""

    family: Family
    precision: Precision

    def __str__(self) -> str:
        return f"{self.family.value}-{self.precision.value}"

    @property
    def half(self) -> ir.DataType:
        """The graph's type."""
        return ir.DataType[self.precision.name]


# SD2.1's is among tests/parity/test_graphs.py's.
CASES = (
    Case(Family.SD15, Precision.FLOAT16),
    Case(Family.SDXL, Precision.BFLOAT16),
)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def portable(case: Case, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.5's with a ControlNet's residuals, of a bundle; SDXL's for inpainting, exported here."""
    folder = tmp_path_factory.mktemp("unet")
    if case.family is Family.SD15:
        unet = request.getfixturevalue("tensorrt_bundle") / "unet"
        shutil.copy(unet / "weights.safetensors", folder)
        return Path(shutil.copy(unet / "windowed-control.onnx", folder / "phase.onnx"))
    checkpoint = load(Component.UNET, "random:0", case.family, Task.INPAINTING, Width.TINY)
    store = WeightStore.write(checkpoint.state_dict, folder / "weights.safetensors", case.precision)
    write_graph(phase_unet(case, store), 2, store, folder / "phase.onnx")
    return folder / "phase.onnx"


def phase_unet(case: Case, store: WeightStore) -> PhaseUNet:
    """The module that is exported, over the weights as they are stored."""
    config = unet_config(case.family, Task.INPAINTING, Width.TINY)
    unet = build(Component.UNET, config, store.state_dict(), PRECISIONS[case.precision][1])
    own = case.family is Family.SDXL  # as a batch of several pictures has it
    return PhaseUNet(unet, Layout.of(case.family), Phase(PhaseKind.WINDOWED), SIZE, SIZE, own_shifts=own)


@pytest.fixture(scope="module")
def lowered(portable: Path) -> Path:
    model = ir.load(portable)
    lower(model)
    save(model, portable.with_name("lowered.onnx"))
    return portable.with_name("lowered.onnx")


def strays(path: Path) -> set[str]:
    """Operators that the table wants in float32 and that are not."""
    return {
        node.op_type
        for node in ir.load(path).graph
        if node.op_type in FLOAT32_OPERATORS and not computes_in_float32(node)
    }


def test_the_table_holds(lowered: Path) -> None:
    assert strays(lowered) == set()


def test_it_would_not_without_the_lowering(portable: Path) -> None:
    assert strays(portable) == {"Attention", "LayerNormalization"}


def check_sums(text: str) -> None:
    """Holds a plan's kernels against the table: what adds up, and what normalizes, does so in float32."""
    assert kernel_source.reductions(text, "Add") == {"float"}
    assert kernel_source.group_sums(text) == {"float"}
    normalizing = [name for name in kernel_source.kernels(text) if re.search("Gnor|Inor|Mean", name)]
    prebuilt = normalizing.count(kernel_source.PREBUILT_NORMALIZATION)
    assert prebuilt < len(normalizing) / 10


def test_nothing_else_is_float32(case: Case, lowered: Path) -> None:
    wide: Counter[str] = Counter()
    for node in ir.load(lowered).graph:
        kinds = {value.dtype for value in node.outputs} & {ir.DataType.FLOAT}
        if kinds and node.op_type not in FLOAT32_OPERATORS | MOVED:
            module = (node.name or "").rpartition("/")[0].rpartition(".")[2]
            wide[f"{module}/{node.op_type}"] += 1
    # SD1.5's graph takes a ControlNet's residuals, and resizes them before they get its type.
    projections = {"time_proj/Mul", "add_time_proj/Mul" if case.family.is_sdxl else "/Resize"}
    # Attention of head sizes that have no kernel is written out: scaled, multiplied twice.
    assert set(wide) - {"attn1/Mul", "attn1/MatMul", "attn2/Mul", "attn2/MatMul"} == projections
    written_out = sum(node.op_type == "Softmax" for node in ir.load(lowered).graph)
    assert wide["attn1/MatMul"] + wide["attn2/MatMul"] == 2 * written_out
    assert (written_out > 0) is (case.family is Family.SD15)  # whose heads are of 8 and 12 channels


def test_fused_attention_is_of_head_sizes_that_have_a_kernel(lowered: Path) -> None:
    sizes = {node.inputs[0].shape[3] for node in ir.load(lowered).graph if node.op_type == "Attention"}
    assert sizes
    assert all(size in HEAD_SIZES for size in sizes)


def test_text_embeds_meet_the_time_projection_in_float32(case: Case, lowered: Path) -> None:
    if not case.family.is_sdxl:
        pytest.skip("only SDXL has pooled text embeddings")
    model = ir.load(lowered)
    (uses,) = (tuple(value.uses()) for value in model.graph.inputs if value.name == "text_embeds")
    (joined,) = (use.node for use in uses)
    assert joined.op_type == "Concat"
    assert {value.dtype for value in joined.inputs if value is not None} == {ir.DataType.FLOAT}
    (after,) = (use.node for use in joined.outputs[0].uses())
    assert (after.op_type, after.outputs[0].dtype) == ("Cast", case.half)


@pytest.mark.needs("tensorrt-rtx")
def test_tensorrt_parses_the_same_types_without_a_warning(case: Case, portable: Path, lowered: Path) -> None:
    half = {"float16": "HALF", "bfloat16": "BF16"}[case.precision.value]
    network = parse(lowered)
    assert network.said == []
    check_float32_operations(network, half)
    before = parse(portable)
    assert before.types("ATTENTION_OUTPUT") == before.types("LAYER_NORMALIZATION") == {half}
    with pytest.raises(AssertionError, match="ATTENTION_INPUT"):
        check_float32_operations(before, half)


@pytest.mark.needs("tensorrt-rtx")
def test_it_becomes_an_engine(case: Case, portable: Path) -> None:
    if case.family is Family.SD15:
        pytest.skip("test_recipes.py looks at the bundle's engines")
    module = phase_unet(case, WeightStore.open(portable.with_name("weights.safetensors")))
    record = GraphRecord(portable.name, {}, module.input_specs(2), module.output_specs(2))
    builder = TensorRtBuilder(TENSORRT_RTX, ("sm89", "sm120"))
    written = builder.build([PortableGraph(portable, record)], lambda _done, _total, _note: None)
    assert {path.name for path in written} >= {"phase.tensorrt-rtx.json", "phase.tensorrt-rtx.plan"}
    check_sums(kernel_source.source(portable.with_name("phase.tensorrt-rtx.plan")))


@pytest.mark.needs("tensorrt-rtx")
def test_the_kernels_of_a_bundle_add_up_in_float32(case: Case, request: pytest.FixtureRequest) -> None:
    if case.family is not Family.SD15:
        pytest.skip("looked at where it is built")
    for record in (request.getfixturevalue("tensorrt_bundle") / "unet").glob("*.tensorrt-rtx.json"):
        check_sums(kernel_source.source_of(record))
