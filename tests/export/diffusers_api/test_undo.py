"""HiDiffusion on a live pipeline leaves nothing behind, and minds no other change to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from hidiff_export import Reuse, apply_hidiffusion
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule
from tests.export.diffusers_api.live import CONTROLNET, SD15, CancelError, cancel, equal, hidiffused
from tests.parity.pipelines import Case, arguments, build, trajectory


def contents(value: Any) -> Any:
    """What has to be the same object afterwards; of containers, what is in them."""
    if isinstance(value, dict):
        return {key: id(item) for key, item in value.items()}
    if isinstance(value, int | float | str | bool | tuple | None):
        return value
    return id(value)


def snapshot(*objects: Any) -> dict[str, Any]:
    """Classes and attributes of every module, and of the other objects."""
    shots: dict[str, Any] = {}
    for index, thing in enumerate(objects):
        modules = thing.named_modules() if isinstance(thing, torch.nn.Module) else [("", thing)]
        for name, module in modules:
            attributes = {key: contents(value) for key, value in vars(module).items()}
            shots[f"{index}.{name}"] = (type(module), attributes)
    return shots


def parts(pipe: Any) -> tuple[Any, ...]:
    return (pipe, pipe.unet, pipe.scheduler, *([pipe.controlnet] if hasattr(pipe, "controlnet") else []))


@pytest.mark.parametrize("reuse", [None, 2])
@pytest.mark.parametrize("case", [SD15, CONTROLNET], ids=["unet", "controlnet"])
def test_everything_is_as_before(case: Case, reuse: int | None) -> None:
    pipe = build(case)
    before = snapshot(*parts(pipe))
    with apply_hidiffusion(pipe, reuse=reuse):
        assert snapshot(*parts(pipe)) != before
    assert snapshot(*parts(pipe)) == before


@pytest.mark.parametrize("step", [0, 3])
def test_everything_is_as_before_after_a_run_that_failed(step: int) -> None:
    pipe, call = build(SD15), arguments(SD15)
    cancel(pipe, call, step)  # what a run leaves in the pipeline and the scheduler is not ours
    before = snapshot(*parts(pipe))
    plain = trajectory(pipe, call)
    with pytest.raises(CancelError), apply_hidiffusion(pipe):  # noqa: PT012
        changed = trajectory(pipe, call)
        pipe.unet.mid_block.register_forward_pre_hook(fail)
        pipe(**call)
    assert not equal(plain, changed)
    pipe.unet.mid_block._forward_pre_hooks.clear()
    cancel(pipe, call, step)
    assert classes_and_names(snapshot(*parts(pipe))) == classes_and_names(before)
    assert equal(trajectory(pipe, call), plain)


def fail(*_: Any) -> None:
    raise CancelError


def test_all_layers_are_back_after_a_shallow_call() -> None:
    pipe, call = build(SD15), arguments(SD15)
    names, before = [name for name, _ in pipe.unet.named_modules()], snapshot(pipe.unet)
    there: list[int] = []
    with apply_hidiffusion(pipe, rule=PhaseRule(), reuse=Reuse(3, 2)) as handle:

        def stop(*_: Any) -> None:
            there.append(len(list(pipe.unet.modules())))
            if len(there) == 3:
                raise CancelError

        hook = pipe.unet.conv_out.register_forward_pre_hook(stop)
        with pytest.raises(CancelError):
            pipe(**call)
        hook.remove()
        assert handle.phase == Phase(PhaseKind.WINDOWED, shallow=True)
        assert [name for name, _ in pipe.unet.named_modules()] == names
        found = trajectory(pipe, call)
    assert there[0] > 4 * there[1] == 4 * there[2]
    assert snapshot(pipe.unet) == before
    assert equal(found, hidiffused(SD15, rule=PhaseRule(), reuse=Reuse(3, 2)))


def classes_and_names(shots: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (kind, sorted(attributes)) for name, (kind, attributes) in shots.items()}


def test_remove_serves_where_a_with_block_does_not() -> None:
    pipe = build(SD15)
    before = snapshot(pipe.unet)
    hidiff = apply_hidiffusion(pipe)
    assert equal(trajectory(pipe, arguments(SD15)), hidiffused(SD15))
    hidiff.remove()
    hidiff.remove()
    assert snapshot(pipe.unet) == before
    assert equal(trajectory(pipe, arguments(SD15)), trajectory(build(SD15), arguments(SD15)))


def test_applied_twice_is_refused_and_harmless() -> None:
    pipe, call = build(SD15), arguments(SD15)
    with apply_hidiffusion(pipe):
        with pytest.raises(InputError, match="already in force"):
            apply_hidiffusion(pipe)
        other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        with pytest.raises(InputError, match="already in force"):
            apply_hidiffusion(other)
        assert equal(trajectory(pipe, call), hidiffused(SD15))
    with apply_hidiffusion(pipe):
        assert equal(trajectory(pipe, call), hidiffused(SD15))


# Beside other changes to the UNet


def with_lora(pipe: Any) -> Any:
    """Adapters on attentions and on the strided downsampler's convolution."""
    from peft import LoraConfig

    targets = ["to_q", "to_v", "to_out.0", "downsamplers.0.conv"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return pipe


def with_freeu(pipe: Any) -> Any:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return pipe


class Halved(diffusers.models.attention_processor.AttnProcessor2_0):
    """A processor of one's own, as IP-Adapter brings."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.5 * super().__call__(*args, **kwargs)


def with_processor(pipe: Any) -> Any:
    pipe.unet.set_attn_processor(Halved())
    return pipe


@pytest.mark.parametrize("reuse", [None, Reuse(2, 4)], ids=["full", "reuse"])
@pytest.mark.parametrize("change", [with_lora, with_freeu, with_processor])
def test_other_changes_work_beside_it(change: Any, reuse: Reuse | None) -> None:
    call = arguments(SD15)
    with apply_hidiffusion(change(before := build(SD15)), reuse=reuse):
        expected = trajectory(before, call)
    with apply_hidiffusion(pipe := build(SD15), reuse=reuse):
        unchanged = trajectory(pipe, call)
        change(pipe)
        assert equal(trajectory(pipe, call), expected)
    assert not torch.allclose(expected[-1], unchanged[-1], atol=1e-2)
    assert equal(trajectory(pipe, call), trajectory(change(build(SD15)), call))


@pytest.mark.parametrize(("offloaded_first", "reuse"), [(False, None), (True, None), (True, 2)])
def test_offloading_works_beside_it(offloaded_first: bool, reuse: int | None) -> None:
    """As ``enable_model_cpu_offload`` does it: accelerate's hooks on the pipeline's networks."""

    def offload(pipe: Any) -> None:
        add_hook_to_module(pipe.unet, ModelHook())
        add_hook_to_module(pipe.controlnet, ModelHook())

    steps = 1 if reuse is None else 2
    pipe, call = build(CONTROLNET), {**arguments(CONTROLNET), "num_inference_steps": steps, "guidance_scale": 1.0}
    plain = trajectory(pipe, call)
    if offloaded_first:
        offload(pipe)
    with apply_hidiffusion(pipe, reuse=reuse):
        changed = trajectory(pipe, call)
        if not offloaded_first:
            offload(pipe)
        assert equal(trajectory(pipe, call), changed)
    assert equal(trajectory(pipe, call), plain)
    assert not equal(plain, changed)


def test_a_lora_scale_reaches_the_adapters() -> None:
    # With a scale, SD1.5's pipeline wants a text encoder to scale too; SDXL's does not.
    case = Case("StableDiffusionXLPipeline", Family.SDXL, steps=3, height=8, width=8)
    unadapted = hidiffused(case)

    def run(**kwargs: float) -> list[torch.Tensor]:
        with apply_hidiffusion(pipe := with_lora(build(case))):
            return trajectory(pipe, {**arguments(case), "cross_attention_kwargs": kwargs})

    assert not torch.allclose(run(scale=1.0)[-1], run(scale=0.2)[-1], atol=1e-2)
    assert torch.allclose(run(scale=0.0)[-1], unadapted[-1], atol=1e-3)
