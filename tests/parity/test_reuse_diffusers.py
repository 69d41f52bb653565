"""Reused features in real pipelines of diffusers: as DeepCache computes them, and as graphs of the phases do."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper

from hidiff_export import Forecast, Reuse, apply_hidiffusion
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family, Task
from hidiff_export.families.graph_io import down_residual_name
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.reuse_depths import DEPTHS
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule, StepRange
from tests.export.diffusers_api.live import CONTROLNET
from tests.export.diffusers_api.test_undo import with_lora
from tests.parity import pipelines

SD15 = pipelines.Case(
    "StableDiffusionPipeline", Family.SD15, name=pipelines.SD15_NAME, scheduler="DDIMScheduler", steps=7
)
SDXL = pipelines.Case("StableDiffusionXLPipeline", Family.SDXL, steps=7)
FROM_PICTURE = pipelines.Case(
    "StableDiffusionImg2ImgPipeline", Family.SD15, name=pipelines.SD15_NAME, steps=9, call={"strength": 0.7}
)
CASES = {"sd15": SD15, "sdxl": SDXL}
EVERY_KIND = PhaseRule(strided=StepRange(0, 0.5), pooled=StepRange(0.25, 0.75))
"""Strided, both, pooled, windowed: a quarter of the run each."""


def run(case: pipelines.Case, generator: Any = None, **options: Any) -> list[torch.Tensor]:
    """The latents after each step of a fresh pipeline under HiDiffusion."""
    with apply_hidiffusion(pipe := pipelines.build(case), **options):
        return pipelines.trajectory(pipe, pipelines.arguments(case), generator=generator)


def deep_cache(case: pipelines.Case, every: int, branch: int) -> list[torch.Tensor]:
    """The same of the published package, on the stock UNet."""
    helper = DeepCacheSDHelper(pipe := pipelines.build(case))
    helper.set_params(cache_interval=every, cache_branch_id=branch)
    helper.enable()
    found = pipelines.trajectory(pipe, pipelines.arguments(case))
    helper.disable()
    return found


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("depth", DEPTHS[Family.SD15])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_stock_unet_runs_as_published(case: pipelines.Case, depth: int, every: int) -> None:
    found = run(case, raunet=False, windows=False, reuse=Reuse(every, depth))
    for one, other in zip(found, deep_cache(case, every, depth - 1), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for other in (deep_cache(case, every, depth % 6), deep_cache(case, every + 1, depth - 1)):
        assert (found[-1] - other[-1]).abs().max() > 1e-3 * found[-1].abs().max()


OTHERS = {
    "from a picture": replace(FROM_PICTURE, scheduler="DDIMScheduler"),
    "inpainting": replace(SD15, pipeline="StableDiffusionInpaintPipeline", task=Task.INPAINTING),
    "inpainting sdxl": replace(SDXL, pipeline="StableDiffusionXLInpaintPipeline", call={"strength": 0.8}),
    # A ControlNet under HiDiffusion sees latents of 128 at the longer side, the stock one whatever there are.
    "controlnet": replace(CONTROLNET, height=8, width=128, steps=4),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_other_pipelines_run_as_published(case: pipelines.Case) -> None:
    options = {"rule": PhaseRule(control=1.0)} if case.task.has_control else {}
    found = run(case, raunet=False, windows=False, reuse=Reuse(3, 2), **options)
    for one, other in zip(found, deep_cache(case, 3, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.allclose(found[-1], deep_cache(case, 3, 2)[-1], rtol=0, atol=1e-3)


def test_pictures_of_a_batch_do_not_depend_on_each_other() -> None:
    case = replace(SD15, call={"num_images_per_prompt": 2})
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = run(case, generators, reuse=Reuse(3, 2))[-1]
    for picture, seed in zip(both, (1, 2), strict=True):
        alone = run(SD15, torch.Generator().manual_seed(seed), reuse=Reuse(3, 2))[-1]
        torch.testing.assert_close(picture, alone[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both[0], both[1], atol=1e-1)


@dataclass(frozen=True)
class Call:
    """What a pipeline's UNet was called with, by the names of a graph's inputs, what it gave, and in which phase."""

    phase: Phase
    inputs: Mapping[str, torch.Tensor]
    output: torch.Tensor


@contextmanager
def recorded(pipe: Any, handle: Any) -> Iterator[list[Call]]:
    """Notes every call of the UNet while it runs."""
    calls: list[Call] = []
    given: dict[str, torch.Tensor] = {}

    def before(_unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents, timestep = args
        given.clear()
        given.update(
            latents=latents, timestep=timestep.reshape(1).float(), prompt_embeds=kwargs["encoder_hidden_states"]
        )
        given.update(kwargs["added_cond_kwargs"] or {})
        if (mid := kwargs.get("mid_block_additional_residual")) is not None:
            given["mid_residual"] = mid
        for index, residual in enumerate(kwargs.get("down_block_additional_residuals") or ()):
            given[down_residual_name(index)] = residual

    def after(_unet: Any, _args: Any, output: Any) -> None:
        inputs = {**given, "window_shifts": handle.window_shifts}
        calls.append(Call(handle.phase, inputs, output[0].clone()))

    hooks = (
        pipe.unet.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        pipe.unet.register_forward_hook(after),
    )
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("depth", [1, 4, 5])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_graphs_of_the_phases_give_what_each_call_gives(case: pipelines.Case, depth: int) -> None:
    case = replace(case, steps=12, height=13, width=18)
    pipe = pipelines.build(case)
    handle = apply_hidiffusion(pipe, rule=EVERY_KIND, reuse=Reuse(2, depth))
    with handle, recorded(pipe, handle) as calls:
        pipelines.trajectory(pipe, pipelines.arguments(case))
    assert [call.phase.shallow for call in calls] == [False, True, False] * 4
    assert list(dict.fromkeys(call.phase.kind for call in calls)) == [
        *(PhaseKind.STRIDED, PhaseKind.STRIDED_POOLED, PhaseKind.POOLED, PhaseKind.WINDOWED)
    ]
    compare(pipe.unet, case, calls, depth)


@pytest.mark.slow
def test_a_controlnets_residuals_come_in_at_every_call() -> None:
    case = replace(CONTROLNET, steps=6)
    pipe = pipelines.build(case)
    handle = apply_hidiffusion(pipe, rule=PhaseRule(StepRange(0, 0.5), control=2 / 3), reuse=Reuse(3, 2))
    with handle, recorded(pipe, handle) as calls:
        pipelines.trajectory(pipe, pipelines.arguments(case))
    # Without residuals the phase is another, so that the fifth is computed whole.
    assert [call.phase.shallow for call in calls] == [False, True, True, False, False, True]
    assert [call.phase.control for call in calls] == [True, True, True, True, False, False]
    compare(pipe.unet, case, calls, 2)
    shallow = calls[1]
    _, deep = evaluate(graph(pipe.unet, case, calls[0].phase, 2), calls[0].inputs)
    other = {**shallow.inputs, "down_residual_01": calls[0].inputs["down_residual_01"], "deep_features": deep}
    assert not near(evaluate(graph(pipe.unet, case, shallow.phase, 2), other), shallow.output)


def compare(unet: Any, case: pipelines.Case, calls: Sequence[Call], depth: int) -> None:
    """Compares each call with what the graph of its phase gives, over the features of the last full one."""
    features: list[torch.Tensor] = []
    for call in calls:
        module = graph(unet, case, call.phase, depth)
        if not call.phase.shallow:
            noise, deep = evaluate(module, call.inputs)
            features.append(deep)
        else:
            noise = evaluate(module, {**call.inputs, "deep_features": features[-1]})
            for other in (0.5 * features[-1], *(each for each in features[:-1] if each.shape == features[-1].shape)):
                assert not near(evaluate(module, {**call.inputs, "deep_features": other}), call.output)
        assert near(noise, call.output)


def test_a_shallow_call_has_window_shifts_of_its_own() -> None:
    case = replace(SD15, steps=2)
    pipe = pipelines.build(case)
    handle = apply_hidiffusion(pipe, rule=PhaseRule(), reuse=Reuse(2, 2))
    with handle, recorded(pipe, handle) as calls:
        pipelines.trajectory(pipe, pipelines.arguments(case))
    first, second = calls
    _, deep = evaluate(graph(pipe.unet, case, first.phase, 2), first.inputs)
    module, inputs = graph(pipe.unet, case, second.phase, 2), {**second.inputs, "deep_features": deep}
    assert near(evaluate(module, inputs), second.output)
    other = (inputs["window_shifts"] + 1) % 4
    assert not near(evaluate(module, {**inputs, "window_shifts": other}), second.output)


def graph(unet: Any, case: pipelines.Case, phase: Phase, depth: int) -> PhaseUNet:
    tokens = pipelines.PROMPT_TOKENS
    layout = Layout.of(case.family)
    return PhaseUNet(unet, layout, phase, case.height, case.width, prompt_tokens=tokens, reuse_depth=depth)


def evaluate(module: PhaseUNet, inputs: Mapping[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return module(**PhaseUNet.arguments({spec.name: inputs[spec.name] for spec in module.input_specs(2)}))


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_shifts_are_drawn_for_every_call_and_block() -> None:
    case, options = SD15, {"rule": PhaseRule(StepRange(0, 0.4))}
    shifts: list[list[list[int]]] = []
    for reuse in (None, 3):
        pipe = pipelines.build(case)
        handle = apply_hidiffusion(pipe, reuse=reuse, **options)
        with handle, recorded(pipe, handle) as calls:
            pipelines.trajectory(pipe, pipelines.arguments(case))
        shifts.append([call.inputs["window_shifts"].tolist() for call in calls])
    assert shifts[0] == shifts[1]


def test_a_run_knows_nothing_of_the_one_before_and_keeps_no_features() -> None:
    pipe = pipelines.build(SDXL)
    given = pipelines.arguments(SDXL)
    with apply_hidiffusion(pipe, reuse=3):
        found, again = (pipelines.trajectory(pipe, given) for _ in range(2))
        longer = pipelines.trajectory(pipe, {**given, "num_inference_steps": 4})
        gc.collect()
        size = (2, 32, SDXL.height, SDXL.width)
        held = [it for it in gc.get_objects() if isinstance(it, torch.Tensor) and it.shape == size]
    assert not held
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(longer[-1], run(replace(SDXL, steps=4), reuse=3)[-1])
    assert not torch.allclose(found[-1], run(SDXL)[-1], rtol=0, atol=1e-3)  # features of an earlier step are others


def shallow_calls(case: pipelines.Case, **options: Any) -> list[bool | None]:
    """Which evaluations of a run are shallow; None is one that is forecast."""
    pipe = pipelines.build(case)
    found: list[bool | None] = []
    handle = apply_hidiffusion(pipe, **options)
    with handle:
        pipe.unet.register_forward_hook(lambda *_: found.append(handle.phase.shallow if handle.computed else None))
        pipelines.trajectory(pipe, pipelines.arguments(case))
    return found


def test_forecast_evaluations_take_no_features() -> None:
    forecast = Forecast(warm_up=3, window=3.0, growth=0.0, last=0.2)
    case = replace(SD15, steps=12)
    computed = forecast.computed(12)
    found = shallow_calls(case, rule=PhaseRule(), forecast=forecast, reuse=4)
    assert [shallow is not None for shallow in found] == list(computed)
    assert tuple(shallow or False for shallow in found) == Reuse(4).shallow([0] * 12, computed)
    assert 2 <= sum(shallow is True for shallow in found) < sum(computed) < 12


def test_a_run_from_a_picture_begins_with_all_layers() -> None:
    found = shallow_calls(FROM_PICTURE, rule=PhaseRule(), reuse=3)
    assert found == [index % 3 > 0 for index in range(len(found))]
    assert 4 < len(found) < 9


def test_two_evaluations_of_a_step_are_two() -> None:
    case = replace(SD15, scheduler="HeunDiscreteScheduler", steps=4)
    assert shallow_calls(case, rule=PhaseRule(), reuse=2) == [False, True] * 3 + [False]


def test_the_rules_own_reuse_is_followed_where_none_is_given() -> None:
    rule = PhaseRule(StepRange(0, 0.5), reuse=Reuse(2))
    assert shallow_calls(SD15, rule=rule) == [False, True, False, False, True, False, True]
    assert shallow_calls(SD15, rule=rule, raunet=False) == [False, True] * 3 + [False]
    assert shallow_calls(SD15, rule=rule, reuse=3, raunet=False) == [False, True, True] * 2 + [False]


@pytest.mark.parametrize("compat", ["native", "published"])
def test_published_shifts_are_drawn_as_in_a_full_run(compat: Any) -> None:
    full = run(SD15, compat=compat, rule=PhaseRule())
    found = run(SD15, compat=compat, rule=PhaseRule(), reuse=2)
    assert torch.equal(found[0], full[0])
    assert not torch.allclose(found[1], full[1], atol=1e-4)


def with_freeu(pipe: Any) -> Mapping[str, Any]:
    pipe.enable_freeu(0.9, 0.2, 1.3, 1.4)
    return {}


def with_scaled_lora(pipe: Any) -> Mapping[str, Any]:
    with_lora(pipe)
    return {"cross_attention_kwargs": {"scale": 0.5}}


# FreeU scales what enters the two inner levels, in place. At depths 4 to 6 of SDXL the package's kept features are of
# that, so that they are scaled anew at each evaluation; here not, as test_shallow_unet.py shows.
@pytest.mark.parametrize(("change", "depth"), [(with_freeu, 3), (with_scaled_lora, 6)])
def test_other_changes_to_the_unet_work_as_beside_the_published_package(change: Any, depth: int) -> None:
    case = replace(SDXL, steps=4, height=8, width=8)
    pipe, cached = pipelines.build(case), pipelines.build(case)
    helper = DeepCacheSDHelper(cached)
    helper.set_params(cache_interval=2, cache_branch_id=depth - 1)
    given = pipelines.arguments(case)
    with apply_hidiffusion(pipe, raunet=False, windows=False, reuse=Reuse(2, depth)):
        without = pipelines.trajectory(pipe, given)
        found = pipelines.trajectory(pipe, {**given, **change(pipe)})
    options = change(cached)
    helper.enable()
    assert torch.equal(found[-1], pipelines.trajectory(cached, {**given, **options})[-1])
    assert not torch.allclose(found[-1], without[-1], atol=1e-3)


def test_a_batch_that_changes_in_mid_run_is_computed_whole() -> None:
    pipe, shallow = pipelines.build(SD15), []

    def halve(pipe: Any, step: int, _timestep: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shallow.append(handle.phase.shallow)
        if step == 3:  # as diffusers' documentation turns guidance off
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1]}
        return {}

    with apply_hidiffusion(pipe, rule=PhaseRule(), reuse=3) as handle:
        inputs = ["latents", "prompt_embeds"]
        given = pipelines.arguments(SD15)
        pipe(**given, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=inputs)
    assert shallow == [False, True, True, False, False, True, False]


@pytest.mark.parametrize(
    ("reuse", "match"),
    [(1, "never reused"), (Reuse(0), "never reused"), (Reuse(3, 7), "at this depth"), (Reuse(3, 0), "at this depth")],
)
def test_what_cannot_be_reused_is_refused(reuse: Any, match: str) -> None:
    pipe = pipelines.build(SD15)
    with pytest.raises(InputError, match=match):
        apply_hidiffusion(pipe, reuse=reuse)
    with pytest.raises(InputError, match=match):
        apply_hidiffusion(pipe, rule=PhaseRule(reuse=Reuse(reuse) if isinstance(reuse, int) else reuse))
    apply_hidiffusion(pipe).remove()  # nothing was left behind


def test_several_calls_for_a_step_are_refused() -> None:
    pipe = pipelines.build(SD15)
    inputs = (torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 32))
    with apply_hidiffusion(pipe, reuse=2), torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        pipe.unet(*inputs)
        pipe.scheduler.step(inputs[0], pipe.scheduler.timesteps[0], inputs[0])
        pipe.unet(*inputs)
        with pytest.raises(InputError, match="more than once for a step"):
            pipe.unet(*inputs)


@pytest.mark.parametrize("name", ["down_intrablock_additional_residuals", "down_block_additional_residuals"])
def test_an_adapter_is_refused(name: str) -> None:
    pipe = pipelines.build(SD15)
    with apply_hidiffusion(pipe, reuse=2), torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        with pytest.raises(InputError, match="T2I-Adapter"):
            pipe.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 32), **{name: [torch.zeros(1)]})
