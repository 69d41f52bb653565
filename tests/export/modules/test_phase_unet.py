"""PhaseUNet as a module: what it shares, what it takes and refuses, and that it traces as one graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hidiff_export.checkpoints.component import Component
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.modules.phase_unet import PhaseUNet, structural_copy
from hidiff_export.reference.random_inputs import arrays, mixed_shifts, random_inputs
from hidiff_runtime.phases import Phase, PhaseKind
from tests.export.checkpoints.snapshots import snapshot
from tests.parity.pipelines import network

BOTH = Phase(PhaseKind.STRIDED_POOLED)
CONTROLLED = Phase(PhaseKind.STRIDED_POOLED, control=True)


def tiny(
    family: Family = Family.SD15, phase: Phase = BOTH, size: tuple[int, int] = (16, 24), windows: bool = True
) -> PhaseUNet:
    layout = Layout.of(family)
    return PhaseUNet(network(Component.UNET, family), layout if windows else layout.without_windows(), phase, *size)


def given(phase_unet: PhaseUNet, seed: int = 0, timestep: float = 501.0) -> dict[str, torch.Tensor]:
    """Every input by name, in order."""
    specs = phase_unet.input_specs(2)
    inputs = arrays(random_inputs(specs, timestep=timestep, width=1024, height=1024, seed=seed))
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    if phase_unet.layout.windowed_blocks:
        tensors["window_shifts"] = torch.from_numpy(mixed_shifts((len(phase_unet.layout.windowed_blocks),), seed))
    return {spec.name: tensors[spec.name] for spec in specs}


def predict(phase_unet: PhaseUNet, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return phase_unet(**PhaseUNet.arguments(inputs))


class TestSharing:
    def test_phases_on_one_unet_hold_its_weights_once(self) -> None:
        unet = network(Component.UNET, Family.SD15)
        layout = Layout.of(Family.SD15)
        phases = [PhaseUNet(unet, layout, Phase(kind), 16, 24) for kind in PhaseKind]
        own = dict(unet.named_parameters())
        for phase_unet in phases:
            held = dict(phase_unet.named_parameters())
            assert {name.removeprefix("unet.") for name in held} == set(own)
            for name, parameter in held.items():
                assert parameter.data_ptr() == own[name.removeprefix("unet.")].data_ptr()
        outputs = [predict(phase_unet, given(phase_unet)) for phase_unet in phases]
        for output, other in pairwise(outputs):
            assert not torch.allclose(output, other, atol=1e-2)

    def test_no_tensor_is_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(tensor: torch.Tensor, _memo: object) -> None:
            raise AssertionError(f"copied a tensor of {tuple(tensor.shape)}")

        unet = network(Component.UNET, Family.SD15)
        monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
        monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
        PhaseUNet(unet, Layout.of(Family.SD15), BOTH, 16, 24)

    def test_tied_weights_stay_tied(self) -> None:
        unet = network(Component.UNET, Family.SD15)
        first, second = (unet.down_blocks[0].resnets[index].conv2 for index in (0, 1))
        second.weight = first.weight
        copied = structural_copy(unet)
        assert copied.down_blocks[0].resnets[0].conv2.weight is first.weight
        assert copied.down_blocks[0].resnets[1].conv2.weight is first.weight

    def test_the_state_dict_is_the_unets(self) -> None:
        assert set(tiny().state_dict()) == {
            f"unet.{name}" for name in network(Component.UNET, Family.SD15).state_dict()
        }

    @pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
    def test_the_unet_is_not_touched(self, family: Family) -> None:
        unet = network(Component.UNET, family)
        before = snapshot(unet)
        phase_unet = PhaseUNet(unet, Layout.of(family), BOTH, 16, 24)
        predict(phase_unet, given(phase_unet))
        assert snapshot(unet) == before

    def test_a_layout_of_another_family_is_refused_and_nothing_touched(self) -> None:
        unet = network(Component.UNET, Family.SD15)
        before = snapshot(unet)
        with pytest.raises(InputError, match="lacks a module"):
            PhaseUNet(unet, Layout.of(Family.SDXL), BOTH, 16, 24)
        assert snapshot(unet) == before


class TestInputs:
    def test_arguments_are_in_order_and_residuals_together(self) -> None:
        phase_unet = tiny(Family.SDXL, CONTROLLED)
        arguments = PhaseUNet.arguments(given(phase_unet))
        assert list(arguments) == [
            "latents",
            "timestep",
            "prompt_embeds",
            "window_shifts",
            "text_embeds",
            "time_ids",
            "down_residuals",
            "mid_residual",
        ]
        assert len(arguments["down_residuals"]) == 9

    @pytest.mark.parametrize(
        "name", ["latents", "timestep", "prompt_embeds", "window_shifts", "text_embeds", "time_ids", "mid_residual"]
    )
    def test_every_input_matters(self, name: str) -> None:
        phase_unet = tiny(Family.SDXL, CONTROLLED, size=(32, 32))
        inputs = given(phase_unet)
        changed = (inputs[name] + 1) % 4 if name == "window_shifts" else inputs[name] * 1.5
        assert not torch.allclose(
            predict(phase_unet, inputs), predict(phase_unet, {**inputs, name: changed}), atol=1e-4
        )

    @pytest.mark.parametrize("index", range(9))
    def test_every_residual_matters(self, index: int) -> None:
        phase_unet = tiny(Family.SDXL, CONTROLLED)
        inputs = given(phase_unet)
        name = f"down_residual_{index:02d}"
        changed = {**inputs, name: inputs[name] * 1.5}
        assert not torch.allclose(predict(phase_unet, inputs), predict(phase_unet, changed), atol=1e-4)

    @pytest.mark.parametrize("size", [(16, 24), (14, 26)], ids=["even", "resized"])
    @pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
    def test_each_latent_of_a_batch_has_its_own_shifts(self, family: Family, size: tuple[int, int]) -> None:
        shared, layout = tiny(family, size=size), Layout.of(family)
        own = PhaseUNet(network(Component.UNET, family), layout, BOTH, *size, own_shifts=True)
        inputs, blocks = given(shared), len(layout.windowed_blocks)
        rows = torch.from_numpy(mixed_shifts((2, blocks), 1))
        found = predict(own, {**inputs, "window_shifts": rows})
        for row, shifts in enumerate(rows):
            alike = predict(shared, {**inputs, "window_shifts": shifts})
            torch.testing.assert_close(found[row], alike[row], atol=1e-4, rtol=1e-4)
            assert not torch.allclose(found[1 - row], alike[1 - row], atol=1e-2)
        (spec,) = (spec for spec in own.input_specs(2) if spec.name == "window_shifts")
        assert spec.shape == (2, blocks)

    def test_without_windows_no_shifts_are_taken(self) -> None:
        phase_unet = tiny(windows=False)
        inputs = given(phase_unet)
        assert "window_shifts" not in inputs
        assert not list(phase_unet.tables.buffers())
        whole = predict(phase_unet, inputs)
        assert not torch.allclose(whole, predict(tiny(), given(tiny())), atol=1e-3)
        with pytest.raises(InputError, match="takes other inputs"):
            predict(phase_unet, {**inputs, "window_shifts": torch.zeros(5, dtype=torch.int32)})

    def test_missing_shifts_are_refused(self) -> None:
        phase_unet = tiny()
        inputs = given(phase_unet)
        del inputs["window_shifts"]
        with pytest.raises(InputError, match="takes other inputs"):
            predict(phase_unet, inputs)

    def test_another_size_is_refused(self) -> None:
        phase_unet = tiny()
        with pytest.raises(InputError, match="latents of 16x24") as caught:
            predict(phase_unet, {**given(phase_unet), "latents": torch.zeros(2, 4, 24, 16)})
        assert caught.value.given == "24x16"

    def test_residuals_are_refused_without_control_and_needed_with_it(self) -> None:
        plain, controlled = tiny(Family.SDXL, BOTH), tiny(Family.SDXL, CONTROLLED)
        with pytest.raises(InputError, match="strided_pooled takes other inputs"):
            predict(plain, given(controlled))
        with pytest.raises(InputError, match="strided_pooled-control takes other inputs"):
            predict(controlled, given(plain))
        inputs = given(controlled)
        del inputs["down_residual_03"]
        with pytest.raises(InputError, match="9 skip connections"):
            predict(controlled, inputs)


class Concatenations(TorchDispatchMode):
    """Notes the types that are joined in each concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[set[torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cat.default:
            self.types.append({tensor.dtype for tensor in args[0]})
        return func(*args, **(kwargs or {}))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
    def test_half_precision_stays_inside(self, family: Family, dtype: torch.dtype) -> None:
        phase = CONTROLLED if family is Family.SDXL else BOTH
        exact = tiny(family, phase)
        inputs = given(exact)
        expected = predict(exact, inputs)
        half = PhaseUNet(halved(family, dtype), exact.layout, phase, 16, 24)
        with Concatenations() as concatenations:
            output = predict(half, inputs)
        assert output.dtype == torch.float32
        error = (output - expected).abs().max()
        assert 0 < error < 20 * torch.finfo(dtype).eps  # the output has a standard deviation of one
        # A strongly typed engine refuses to join different types.
        assert all(len(joined) == 1 for joined in concatenations.types)
        assert {dtype} in concatenations.types


def halved(family: Family, dtype: torch.dtype) -> Any:
    # torch's own, since diffusers' warns that it may lose modules to be kept in float32, of which a UNet has none.
    return torch.nn.Module.to(network(Component.UNET, family), dtype)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


TRACED = [(Family.SDXL, CONTROLLED)]  # which has everything that SD has


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
class TestTracing:
    @pytest.mark.parametrize(("family", "phase"), TRACED, ids=str)
    def test_strict_export(self, family: Family, phase: Phase) -> None:
        phase_unet = tiny(family, phase, size=(19, 24)).requires_grad_(False)
        program = torch.export.export(phase_unet, (), PhaseUNet.arguments(given(phase_unet)), strict=True)
        own = dict(phase_unet.named_parameters())
        assert {name: tensor.data_ptr() for name, tensor in program.state_dict.items()} == {
            name: parameter.data_ptr() for name, parameter in own.items()
        }
        other = given(phase_unet, seed=3, timestep=37.0)
        exported = program.module()(**PhaseUNet.arguments(other))
        assert torch.equal(exported, predict(phase_unet, other))

    def test_compiles_to_one_graph_for_all_steps(self) -> None:
        # SDXL with control has everything that SD has, and windows of two shapes.
        phase_unet = tiny(Family.SDXL, CONTROLLED, size=(19, 24)).requires_grad_(False)
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, _inputs: object) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(phase_unet, fullgraph=True, backend=keep)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(4):
                inputs = given(phase_unet, seed=step, timestep=999.0 - 250 * step)
                output = compiled(**PhaseUNet.arguments(inputs))
                assert torch.equal(output, predict(phase_unet, inputs))
        assert len(graphs) == 1
