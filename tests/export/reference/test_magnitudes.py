"""The largest magnitudes of the reference: what is measured, what is told, and what float16 recipes refuse."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.compiler.stages.reference import ReferenceStage
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.compiler.stages.weights import WeightsStage
from hidiff_export.errors import BundleError, CheckpointError
from hidiff_export.families.family import Family, Task, Width, default_scheduler
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe import Recipe
from hidiff_export.reference.diffusers_run import Networks
from hidiff_export.reference.evaluation_plan import EvaluationPoint
from hidiff_export.reference.flops_progress import FlopsProgress
from hidiff_export.reference.magnitude_recorder import MagnitudeRecorder
from hidiff_export.reference.magnitudes import FILE, FLOAT16_MAX, Magnitude, Magnitudes
from hidiff_export.reference.random_inputs import arrays, mixed_shifts, random_inputs
from hidiff_export.reference.reference import courses, run_reference
from tests.loras import peft, scaling

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PRODUCT = f"{BLOCK}.ff.net.0 (mul)"
SMALL = {"width": 64, "height": 64, "vae": False, "steps": [3]}


def feed_forward(factor: float) -> dict[tuple[Component, str], float]:
    """Both halves of a feed-forward's product times ``factor``, and what comes after as much smaller."""
    return {(Component.UNET, f"{BLOCK}.ff.net.0.proj"): factor, (Component.UNET, f"{BLOCK}.ff.net.2"): factor**-2}


def lora(path: Path, by: dict[tuple[Component, str], float]) -> Path:
    """A LoRA for the tiny recipe's weights that multiplies layers."""
    weights = {}
    for component, module in by:
        tensors = load(component, "random:0", Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY).state_dict
        weights[component, module] = tensors[f"{module}.weight"]
    return peft(scaling(weights, by), path)


def record(folder: Path, by: dict[tuple[Component, str], float], **changes: Any) -> tuple[Path, list[str]]:
    """The stages of weights and reference with a LoRA that multiplies layers: the record's path, and what was told."""
    files = [{"path": str(lora(folder / "lora.safetensors", by))}] if by else []
    values = {"family": "sd15", "source": "random:0", "unet_width": "tiny", "lora": files, **SMALL, **changes}
    told: list[str] = []
    context = StageContext(Recipe.from_dict({"precision": "float16", **values}), folder / "bundle", told.append)
    for stage in (WeightsStage(), SchedulerTablesStage()):
        stage.run(context, lambda *_: None)
    told.clear()
    written = ReferenceStage().run(context, lambda *_: None)
    path = context.folder / "reference" / FILE
    assert (path in written) == path.exists()
    return path, told


@pytest.mark.parametrize(
    ("precision", "target", "other"),
    [("float16", "cpu", "float32"), ("int8", "cpu", "float32"), ("float16", "cuda", "bfloat16 or float32")],
)
def test_a_product_that_float16_does_not_hold_is_refused_by_name(
    tmp_path: Path, precision: str, target: str, other: str
) -> None:
    with pytest.raises(CheckpointError) as refused:
        record(tmp_path, feed_forward(200), precision=precision, targets=[target])
    error = refused.value
    assert "beyond float16's largest number, 65,504" in error.summary
    assert str(error.given).startswith(f"{PRODUCT} reaches 337,")
    assert "in windowed, step 2 of 3" in str(error.given)
    assert error.advice == f"Build with --set precision={other}, or give its LoRA a lower weight."
    assert error.exit_code == 3
    assert not (tmp_path / "bundle" / "reference").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_has_the_range_takes_the_same_lora(tmp_path: Path, precision: str) -> None:
    path, told = record(tmp_path, feed_forward(200), precision=precision, targets=["cuda"])
    assert told == []
    assert not path.exists()


def test_what_comes_near_the_end_of_the_range_is_told(tmp_path: Path) -> None:
    path, told = record(tmp_path, feed_forward(80))
    (notice,) = told
    assert notice.startswith("1 tensor comes within a factor of 4 of float16's largest number, 65,504: ")
    assert f"{PRODUCT} reaches 54,0" in notice
    assert "in windowed, step 2 of 3." in notice
    found = Magnitudes.read(path)
    assert [one.name for one in found.near] == [PRODUCT]
    assert {one.graph for one in found.largest} == {"strided", "windowed", "text_encoder"}


def test_a_text_encoder_is_looked_at_too(tmp_path: Path) -> None:
    layer = "encoder.layers.1.mlp"
    by = {(Component.TEXT_ENCODER, f"{layer}.fc1"): 1e5, (Component.TEXT_ENCODER, f"{layer}.fc2"): 1e-4}
    with pytest.raises(CheckpointError) as refused:
        record(tmp_path, by, precision="int8")
    assert str(refused.value.given).startswith(f"{layer}.")
    assert "in text_encoder" in str(refused.value.given)


def test_attention_scores_are_float32_and_not_counted(tmp_path: Path) -> None:
    by = {(Component.UNET, f"{BLOCK}.attn1.to_{name}"): 1000.0 for name in "qk"}
    path, told = record(tmp_path, by)
    assert told == []
    assert largest_score(stored_unet(path.parents[1], torch.float32)) > 10 * FLOAT16_MAX
    assert max(one.value for one in Magnitudes.read(path).largest) < FLOAT16_MAX / 4


def stored_unet(bundle: Path, dtype: torch.dtype) -> Any:
    """diffusers' UNet over the weights that a bundle stores."""
    from safetensors.torch import load_file

    config = json.loads((bundle / "unet" / "config.json").read_text())
    config.pop("_class_name")
    return build(Component.UNET, config, load_file(bundle / "unet" / "weights.safetensors"), dtype)


def noise_of(unet: Any) -> torch.Tensor:
    """What a UNet predicts of random latents."""
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 32, generator=generator)
    with torch.inference_mode():
        noise: torch.Tensor = unet(latents.to(unet.dtype), 999, embeds.to(unet.dtype), return_dict=False)[0]
    return noise


def largest_score(unet: Any) -> float:
    """Of the block's self-attention, on random latents."""
    kept: dict[str, torch.Tensor] = {}
    attention = unet.get_submodule(f"{BLOCK}.attn1")
    for name in ("to_q", "to_k"):
        attention.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: kept.__setitem__(name, output)
        )
    noise_of(unet)
    query, key = (kept[name].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k"))
    return float((query @ key.transpose(-1, -2) * attention.scale).abs().max())


@pytest.mark.parametrize(("factor", "holds"), [(1, True), (80, True), (200, False)])
def test_pytorch_in_float16_fails_where_a_build_refuses(tmp_path: Path, factor: float, holds: bool) -> None:
    try:
        record(tmp_path, feed_forward(factor))
        refused = False
    except CheckpointError:
        refused = True
    half, full = (noise_of(stored_unet(tmp_path / "bundle", dtype)) for dtype in (torch.float16, torch.float32))
    assert full.isfinite().all()
    assert bool(half.isfinite().all()) is holds
    assert refused is not holds


def test_the_demo_has_nothing_to_tell(tmp_path: Path) -> None:
    path, told = record(tmp_path, {})
    assert told == []
    found = Magnitudes.read(path)
    assert found.near == ()
    assert all(1 < one.value < 100 for one in found.largest)


def of(case: str) -> Recipe:
    common = {"source": "random:0", "unet_width": "tiny", "width": 128, "height": 128, "steps": [3], "text": False}
    return Recipe.from_dict({**common, "vae": False, "precision": "float16", "targets": ["cuda"], **CASES[case]})


CASES: dict[str, dict[str, Any]] = {
    "sd15": {"family": "sd15"},
    "sd21": {"family": "sd21"},
    "sdxl": {"family": "sdxl", "steps": [7]},
    "control": {"family": "sd15", "width": 768, "height": 64, "task": "controlnet", "controlnet": "random:1"},
}


@cache
def network(recipe: Recipe, component: Component) -> Any:
    config = recipe.unet_config() if component is Component.UNET else recipe.controlnet_config()
    return build(component, config, synthesize(component, config, 0))


class Independent:
    """The largest magnitudes of what goes into and comes out of modules, by hooks on each of them."""

    def __init__(self, root: nn.Module) -> None:
        self.inputs: dict[str, float] = {}
        self.outputs: dict[str, float] = {}
        for name, module in root.named_modules():
            module.register_forward_pre_hook(self._take(self.inputs, name))
            module.register_forward_hook(self._take(self.outputs, name))

    @staticmethod
    def _take(found: dict[str, float], name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Any = None) -> None:
            value = args[0] if output is None and args else output
            if isinstance(value, torch.Tensor):
                found[name] = max(found.get(name, 0.0), float(value.abs().max()))

        return hook


def measured(case: str, index: int) -> tuple[dict[tuple[str, str], Magnitude], Independent, nn.Module]:
    """One phase of a UNet on random inputs: what the recorder found by tensor and operator, and what hooks did."""
    recipe = of(case)
    phase = recipe.phase_rule().phases()[index]
    module = PhaseUNet(
        network(recipe, Component.UNET), recipe.unet_layout, phase, recipe.latent_height, recipe.latent_width
    )
    hooks = Independent(module.unet)
    inputs = random_inputs(module.input_specs(2), timestep=999.0, width=128, height=128, seed=1)
    values = {**arrays(inputs), "window_shifts": mixed_shifts((len(recipe.unet_layout.windowed_blocks),), 1)}
    tensors = {name: torch.from_numpy(value) for name, value in values.items() if value.size}
    recorder = MagnitudeRecorder(recipe)
    recorder.follow([EvaluationPoint(phase, 0, 3, 999.0)], random=True)
    with recorder.recording(), torch.inference_mode():
        module(**PhaseUNet.arguments(tensors))
    assert {(one.phase, one.step, one.steps, one.random) for one in recorder.tensors} == {(phase.name, 0, 3, True)}
    return {(one.tensor, one.operator): one for one in recorder.tensors}, hooks, module.unet


@pytest.mark.parametrize(("case", "index"), [("sd15", 0), ("sd21", 1), ("sdxl", 0), ("sdxl", 1), ("sdxl", 2)])
def test_figures_are_those_of_hooks_on_the_modules(case: str, index: int) -> None:
    found, hooks, unet = measured(case, index)
    kinds = {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.GroupNorm: "group_norm", nn.LayerNorm: "layer_norm"}
    compared = 0
    for name, module in unet.named_modules():
        operator = next((operator for kind, operator in kinds.items() if isinstance(module, kind)), None)
        if type(module).__name__ == "GEGLU":
            operator = "mul"
        if type(module).__name__ == "ResnetBlock2D":
            operator = "add"  # of the residual; the time embedding's is added before the normalization
            assert found[name, operator].value >= hooks.outputs[name]
            operator = "div"  # by 1: the output itself
        if operator is not None and name in hooks.outputs:
            compared += 1
            assert found[name, operator].value == hooks.outputs[name], name
    assert compared > 100
    assert found["conv_in", "conv2d"].value == hooks.outputs["conv_in"]
    assert found["sample", "input"].value == hooks.inputs["conv_in"]


def test_sums_and_concatenations_are_seen() -> None:
    found, hooks, unet = measured("sd15", 1)
    for index, block in enumerate(unet.up_blocks):
        joined = max(hooks.inputs[f"up_blocks.{index}.resnets.{part}"] for part in range(len(block.resnets)))
        assert found[f"up_blocks.{index}", "cat"].value == joined
    assert found[BLOCK, "add"].value >= hooks.outputs[BLOCK]
    assert found[f"{BLOCK}.ff.net.0", "gelu"].value > 0
    assert found["conv_act", "silu"].value == hooks.outputs["conv_act"]


def test_the_timestep_and_its_sinusoids_are_float32_and_not_counted() -> None:
    for case, index in (("sd15", 0), ("sdxl", 2)):
        found, hooks, _ = measured(case, index)
        assert hooks.inputs["time_proj"] == 999
        assert not [tensor for tensor, _ in found if "time_proj" in tensor or tensor == "timestep"]
        assert max(one.value for one in found.values()) < 100
        assert ("time_embedding.linear_1", "linear") in found


def test_a_controlnet_is_told_by_its_own_step() -> None:
    recipe = of("control")
    networks = Networks(network(recipe, Component.UNET), network(recipe, Component.CONTROLNET))
    config = default_scheduler(recipe.family)[1]
    (course,) = courses(recipe, config)
    recorder = MagnitudeRecorder(recipe)
    with recorder.recording():
        run_reference(networks, recipe, config, course, FlopsProgress(recipe, networks.config, None), recorder)
    control = {(one.tensor, one.operator): one for one in recorder.tensors if one.network == "controlnet"}
    image = control["controlnet_cond", "input"]
    assert (image.phase, image.step, image.steps, image.random) == (None, 0, 3, False)
    assert ("controlnet_cond_embedding.conv_in", "conv2d") in control
    with_control = {point.step for point in course.points if point.phase.control}
    assert {one.step for one in control.values()} == with_control == {0, 1}
    assert not [one for one in recorder.tensors if one.network == "unet" and one.phase is None]


def test_nothing_is_measured_without_float16_or_outside_the_context() -> None:
    recipe = of("sd15")
    unet = network(recipe, Component.UNET)
    for precision, some in (("float16", True), ("bfloat16", False), ("float32", False)):
        values = {**recipe.to_dict(), "precision": precision, "parity": {}}
        recorder = MagnitudeRecorder(Recipe.from_dict(values))
        noise_of(unet)
        assert not recorder.tensors
        with recorder.recording():
            noise_of(unet)
        assert bool(recorder.tensors) is some
        found = recorder.tensors
        noise_of(unet)
        assert recorder.tensors == found


def test_no_hook_stays_after_an_error() -> None:
    recorder = MagnitudeRecorder(of("sd15"))
    with pytest.raises(ZeroDivisionError), recorder.recording():
        raise ZeroDivisionError
    before = len(recorder.tensors)
    with torch.inference_mode():
        network(of("sd15"), Component.UNET)(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 32))
    assert len(recorder.tensors) == before == 0


def magnitude(value: float, tensor: str = "conv_in", phase: str | None = "windowed") -> Magnitude:
    return Magnitude("unet", tensor, "conv2d", value, phase, 1, 3)


def test_the_margin_is_a_factor_of_four_and_the_end_is_exact() -> None:
    values = [16375.0, 16377.0, 65504.0, 65505.0]
    found = Magnitudes.of(magnitude(value, f"tensor_{value:.0f}") for value in values)
    assert [one.tensor for one in found.near] == ["tensor_65505", "tensor_65504", "tensor_16377"]
    assert [one.tensor for one in found.beyond] == ["tensor_65505"]
    (notice,) = found.notices
    assert notice.startswith("2 tensors come within a factor of 4")
    assert "65505" not in notice


def test_the_first_few_are_named_and_the_rest_counted() -> None:
    found = Magnitudes.of(magnitude(20000.0 + index, f"t{index}") for index in range(10))
    (notice,) = found.notices
    assert notice.startswith("10 tensors come")
    assert "t9 (conv2d) reaches 20,009 in windowed, step 2 of 3; t8 " in notice
    assert "; and 7 more. " in notice


def test_what_is_not_finite_in_float32_is_not_float16s_fault() -> None:
    found = Magnitudes.of([magnitude(math.inf), magnitude(7.0, phase="strided")])
    with pytest.raises(CheckpointError, match="infinities or NaN, in PyTorch and float32 too") as refused:
        found.refuse_overflow(of("sd15"))
    assert str(refused.value.given) == "conv_in (conv2d) is infinite or NaN in float32 too in windowed, step 2 of 3"
    assert "LoRA" not in str(refused.value.advice)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_never_passed_over(value: float) -> None:
    recipe = of("sd15")
    unet = network(recipe, Component.UNET)
    recorder = MagnitudeRecorder(recipe)
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 0, 0, 0] = value
    with recorder.recording(), torch.inference_mode():
        unet(latents, 1, torch.zeros(1, 77, 32))
    found = {(one.tensor, one.operator): one.value for one in recorder.tensors}
    assert found["conv_in", "conv2d"] == math.inf


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = Magnitudes.of([magnitude(math.inf), magnitude(7.0, phase="strided"), magnitude(0.0, phase="pooled")])
    path = found.write(tmp_path)
    assert Magnitudes.read(path) == found
    data = json.loads(path.read_text())
    assert [(one["phase"], one["magnitude"]) for one in data["largest"]] == [
        *(("windowed", "inf"), ("strided", 7.0), ("pooled", 0.0)),
    ]
    assert data["largest"][1]["headroom"] == pytest.approx(FLOAT16_MAX / 7)


@pytest.mark.parametrize(
    "damage", ['{"limit": 1}', "[]", "{", '{"limit": 1, "margin": 4, "largest": [{}], "near": []}']
)
def test_a_damaged_record_is_an_error_and_no_traceback(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(BundleError):
        Magnitudes.read(tmp_path / FILE)
