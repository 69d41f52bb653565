"""A shallow phase over the deep features of a full one: the same noise to the bit, and only where they are its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.reuse_depths import DEPTHS
from hidiff_export.graph.portable import write_graph
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.phases import Phase, PhaseKind
from hidiff_runtime.verification.comparison import Metrics
from tests.export.checkpoints.snapshots import snapshot
from tests.export.modules.test_phase_unet import given, halved, predict
from tests.parity.pipelines import network

Tensors = dict[str, torch.Tensor]


def pair(
    family: Family, phase: Phase, depth: int, size: tuple[int, int] = (11, 14), unet: Any = None
) -> tuple[PhaseUNet, PhaseUNet]:
    """The full and the shallow phase."""
    unet = unet or network(Component.UNET, family)
    full, shallow = (
        PhaseUNet(unet, Layout.of(family), each, *size, reuse_depth=depth)
        for each in (phase, replace(phase, shallow=True))
    )
    return full, shallow


def taken(shallow: PhaseUNet, inputs: Tensors, features: torch.Tensor) -> Tensors:
    """What the shallow phase takes of a full one's inputs, and the features."""
    there = {**inputs, "deep_features": features}
    return {spec.name: there[spec.name] for spec in shallow.input_specs(2)}


CASES = [
    (Family.SD15, Phase(PhaseKind.STRIDED)),
    (Family.SD15, Phase(PhaseKind.STRIDED_POOLED, control=True)),
    (Family.SD21, Phase(PhaseKind.POOLED)),
    (Family.SDXL, Phase(PhaseKind.WINDOWED, control=True)),
    (Family.SDXL, Phase(PhaseKind.STRIDED_POOLED)),
    (Family.SDXL, Phase(PhaseKind.POOLED, control=True)),
]


@pytest.mark.parametrize(("family", "phase"), CASES, ids=lambda case: getattr(case, "name", None))
def test_over_features_of_the_same_step_it_gives_the_same_noise(family: Family, phase: Phase) -> None:
    plain = PhaseUNet(network(Component.UNET, family), Layout.of(family), phase, 11, 14)
    inputs = given(plain)
    expected = predict(plain, inputs)
    for depth in DEPTHS[family]:
        full, shallow = pair(family, phase, depth)
        noise, features = predict(full, inputs)
        assert torch.equal(noise, expected)
        assert [features.shape] == [spec.shape for spec in full.output_specs(2)[1:]]
        assert torch.equal(predict(shallow, taken(shallow, inputs, features)), expected)
        other = predict(full, {**inputs, "latents": inputs["latents"] * 0.5})[1]
        assert not torch.allclose(predict(shallow, taken(shallow, inputs, other)), expected, atol=1e-3)


def test_its_own_layers_follow_this_steps_inputs() -> None:
    full, shallow = pair(Family.SD15, Phase(PhaseKind.WINDOWED, control=True), 2, size=(16, 24))
    inputs = given(full)
    noise, features = predict(full, inputs)
    for name in ("latents", "timestep", "prompt_embeds", "down_residual_00", "down_residual_01", "window_shifts"):
        changed = (inputs[name] + 1) % 4 if name == "window_shifts" else inputs[name] * 1.5
        other = taken(shallow, {**inputs, name: changed}, features)
        assert not torch.allclose(predict(shallow, other), noise, atol=1e-4), name


def test_shifts_of_blocks_that_it_lacks_do_not_matter() -> None:
    full, shallow = pair(Family.SD15, Phase(PhaseKind.WINDOWED), 2, size=(16, 24))
    inputs = given(full)
    noise, features = predict(full, inputs)
    computed = torch.tensor([0, 3, 4])  # of two blocks on the way down and three up
    for block in range(5):
        shifts = inputs["window_shifts"].clone()
        shifts[block] = (shifts[block] + 1) % 4
        other = predict(shallow, taken(shallow, {**inputs, "window_shifts": shifts}, features))
        assert torch.equal(other, noise) == (block not in computed)


def test_it_holds_weights_of_its_own_layers_under_their_names() -> None:
    unet = network(Component.UNET, Family.SDXL)
    before = snapshot(unet)
    _, shallow = pair(Family.SDXL, Phase(PhaseKind.STRIDED), 1, unet=unet)
    own = dict(unet.named_parameters())
    held = {name.removeprefix("unet."): parameter for name, parameter in shallow.named_parameters()}
    assert all(parameter.data_ptr() == own[name].data_ptr() for name, parameter in held.items())
    places = {".".join(name.split(".")[:4]) for name in held if "blocks" in name}
    assert places == {"up_blocks.2.resnets.2"}
    assert snapshot(unet) == before


def test_half_precision_stays_inside() -> None:
    full, shallow = pair(
        Family.SD15, Phase(PhaseKind.WINDOWED, control=True), 2, unet=halved(Family.SD15, torch.float16)
    )
    inputs = given(full)
    noise, features = predict(full, inputs)
    assert noise.dtype == features.dtype == torch.float32
    assert torch.equal(predict(shallow, taken(shallow, inputs, features)), noise)


def test_features_stay_as_they_are_beside_freeu() -> None:
    unet = network(Component.UNET, Family.SDXL)
    unet.enable_freeu(0.9, 0.2, 1.3, 1.4)
    full, shallow = pair(Family.SDXL, Phase(PhaseKind.WINDOWED), 5, size=(16, 16), unet=unet)
    inputs = given(full)
    noise, features = predict(full, inputs)
    for _ in range(2):
        assert torch.equal(predict(shallow, taken(shallow, inputs, features)), noise)


def test_features_are_needed_and_no_others_taken() -> None:
    full, shallow = pair(Family.SD15, Phase(PhaseKind.WINDOWED, control=True), 2)
    inputs = given(full)
    features = predict(full, inputs)[1]
    own = taken(shallow, inputs, features)
    with pytest.raises(InputError, match="windowed-control takes other inputs"):
        predict(full, {**inputs, "deep_features": features})
    with pytest.raises(InputError, match="windowed-control-shallow takes other inputs"):
        predict(shallow, {name: tensor for name, tensor in own.items() if name != "deep_features"})
    with pytest.raises(InputError, match="windowed-control-shallow takes other inputs"):
        predict(shallow, {**own, "mid_residual": inputs["mid_residual"]})
    with pytest.raises(InputError, match="2 skip connections"):
        predict(shallow, {**own, "down_residual_02": inputs["down_residual_02"]})


GRAPHS = [
    (Family.SD15, Phase(PhaseKind.STRIDED_POOLED, control=True), 2),
    (Family.SDXL, Phase(PhaseKind.POOLED), 1),
    (Family.SDXL, Phase(PhaseKind.POOLED, control=True), 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "phase", "depth"), GRAPHS)
def test_graphs_compute_what_pytorch_computes(family: Family, phase: Phase, depth: int, tmp_path: Path) -> None:
    unet = network(Component.UNET, family)
    store = WeightStore.write(unet.state_dict(), tmp_path / "weights.safetensors", Precision.FLOAT32)
    full, shallow = pair(family, phase, depth, unet=unet)
    inputs = given(full)
    noise, features = predict(full, inputs)
    other = features + 0.3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    for module, fed in ((full, inputs), (shallow, taken(shallow, inputs, other))):
        write_graph(module, 2, store, tmp_path / "phase.onnx")
        found = run_graph(tmp_path / "phase.onnx", fed)
        expected = predict(module, fed)
        outputs = (expected,) if module is shallow else expected
        assert len(found) == len(outputs)
        for one, tensor in zip(found, outputs, strict=True):
            assert Metrics.of(tensor.numpy(), one).snr_db >= 90
    assert Metrics.of(noise.numpy(), found[0]).snr_db < 60  # the control: the features of this step
    external = {
        value.name
        for value in onnx.load(tmp_path / "phase.onnx", load_external_data=False).graph.initializer
        if value.external_data
    }
    # All of a shallow UNet's weights are in its graph, under their own names.
    assert external == {name.removeprefix("unet.") for name, _ in shallow.named_parameters()}


@pytest.mark.slow
def test_full_and_shallow_phases_compile_to_one_graph_for_all_steps() -> None:
    modules = pair(Family.SDXL, Phase(PhaseKind.POOLED), 4)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    full, shallow = (
        torch.compile(module.requires_grad_(False), fullgraph=True, backend=keep, dynamic=False) for module in modules
    )
    for step in range(3):
        inputs = given(modules[0], seed=step, timestep=999.0 - 250 * step)
        noise, features = full(**inputs)
        assert torch.equal(noise, predict(modules[0], inputs)[0])
        assert torch.equal(shallow(**taken(modules[1], inputs, features)), noise)
    torch._dynamo.reset()
    assert len(graphs) == 2


def run_graph(path: Path, inputs: Tensors) -> list[np.ndarray]:
    """What ONNX Runtime computes; every phase takes the inputs that it says, used or not."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(inputs)
    found: list[np.ndarray] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return found
