"""Whole pipelines of diffusers, step by step and bit by bit, against the published package on the same pipeline.

Both sides run diffusers' own pipeline class, scheduler and loop, from the same seed; ``compat="published"`` draws the
window shifts as the package does. What the package cannot do on today's diffusers is shimmed in
``tests/parity/published.py`` (where it looks for ControlNets, the names of tiny UNets, PEFT's presence), and its
ControlNet pipeline has a default of its own for ``controlnet_conditioning_scale``, so the calls below say it. Nothing
of what it computes is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hidiff_export import apply_hidiffusion
from hidiff_export.families.family import Family, Task
from hidiff_export.families.hidiffusion_rules import phase_rule
from hidiff_export.modules.window_attention import WINDOW_ORDERS
from hidiff_runtime.phases import PhaseRule, StepRange
from tests.parity import published
from tests.parity.pipelines import Case, arguments, build, trajectory

T2I, INPAINTING = Task.TEXT_TO_IMAGE, Task.INPAINTING
CONTROL, CONTROL_I2I = Task.CONTROLNET, Task.CONTROLNET_IMAGE_TO_IMAGE
SD, SD_I2I, SD_INPAINT = (f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
XL, XL_I2I, XL_INPAINT, XL_CONTROL, XL_CONTROL_I2I = (
    f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img")
)


def case(pipeline: str, family: Family, task: Task = T2I, **more: Any) -> Case:
    """A case under the name that makes the package see ``family`` and ``task``."""
    return Case(pipeline, family, task, published.checkpoint_name(family, task), **more)


# A ControlNet sees latents of 128 at the longer side. 192 makes that a downscale, and 16 keeps it cheap.
WIDE: dict[str, Any] = {"height": 16, "width": 192, "steps": 4}
CONTROL_CALL = {"controlnet_conditioning_scale": 0.8}

CASES = {
    "sd15": case(SD, Family.SD15),
    "sd15-ddim": case(SD, Family.SD15, scheduler="DDIMScheduler"),
    "sd15-odd": case(SD, Family.SD15, scheduler="DDIMScheduler", height=15, width=13, steps=4),
    "sd15-dpmpp": case(SD, Family.SD15, scheduler="DPMSolverMultistepScheduler"),
    "sd21": case(SD, Family.SD21),
    "sd15-inpainting": case(SD_INPAINT, Family.SD15, INPAINTING),
    "sd15-inpainting-0.5": case(SD_INPAINT, Family.SD15, INPAINTING, steps=8, call={"strength": 0.5}),
    "sd15-inpainting-4-channels": case(SD_INPAINT, Family.SD15, steps=8, call={"strength": 0.65}),
    **{
        f"sd15-image-to-image-{strength}": case(SD_I2I, Family.SD15, steps=steps, call={"strength": strength})
        for strength, steps in ((0.3, 10), (1.0, 4))
    },
    "sdxl": case(XL, Family.SDXL, steps=7),
    "sdxl-wide": case(XL, Family.SDXL, steps=4, height=8, width=24),
    **{
        f"sdxl-image-to-image-{strength}": case(XL_I2I, Family.SDXL, steps=steps, call={"strength": strength})
        for strength, steps in ((0.75, 9),)
    },
    "sdxl-inpainting": case(XL_INPAINT, Family.SDXL, INPAINTING, call={"strength": 1.0}),
    "sdxl-inpainting-4-channels": case(XL_INPAINT, Family.SDXL, steps=10, call={"strength": 0.75}),
    "turbo": case(XL, Family.SDXL_TURBO, steps=4, call={"guidance_scale": 0.0}),
    "turbo-image-to-image": case(XL_I2I, Family.SDXL_TURBO, steps=4, call={"guidance_scale": 0.0, "strength": 0.5}),
    "playground": case(XL, Family.PLAYGROUND),
    "controlnet": case(XL_CONTROL, Family.SDXL, CONTROL, call=CONTROL_CALL, **WIDE),
    "controlnet-guess": case(
        XL_CONTROL, Family.SDXL, CONTROL, call={**CONTROL_CALL, "guess_mode": True}, **{**WIDE, "steps": 2}
    ),
    "controlnet-image-to-image": case(
        XL_CONTROL_I2I, Family.SDXL, CONTROL_I2I, call={**CONTROL_CALL, "strength": 0.8}, **{**WIDE, "steps": 5}
    ),
}
EXTREME = {"sd15": CASES["sd15-ddim"], "sdxl": CASES["sdxl"], "controlnet": CASES["controlnet"]}
EXTREME_PIXELS = 4096


@pytest.fixture(autouse=True)
def _one_convolution_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without oneDNN, which picks a kernel by shape and stride.

    At some sizes it sums the package's stride-4 convolution in another order than the same one with stride 2 on every
    other pixel, and the last bit differs (1.5e-6 of the latents after seven steps, in one of the cases below).
    """
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


@functools.cache
def theirs(case: Case, **options: Any) -> list[torch.Tensor]:
    """The latents after each step with the published package."""
    with published.applied(build(case), **options) as pipe:
        return trajectory(pipe, arguments(case))


def ours(case: Case, change: Callable[[Any], object] | None = None, **options: Any) -> list[torch.Tensor]:
    """The latents after each step with this project, after a ``change`` to the pipeline."""
    with apply_hidiffusion(pipe := build(case), compat="published", **options):
        if change is not None:
            change(pipe)
        return trajectory(pipe, arguments(case))


def first_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> int | None:
    """The first step after which the latents are not the same, bit by bit; None if there is none."""
    assert len(left) == len(right) > 0
    assert all(latents.isfinite().all() for latents in (*left, *right))
    return next((i for i, pair in enumerate(zip(left, right, strict=True)) if not torch.equal(*pair)), None)


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_published_packages(name: str) -> None:
    assert first_difference(ours(CASES[name]), theirs(CASES[name])) is None


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_thresholds_too(name: str) -> None:
    """They begin at sizes too large to test at: the package's are moved down to small latents, ours are named."""
    extreme = EXTREME[name]
    rule = phase_rule(extreme.family, extreme.task, EXTREME_PIXELS, EXTREME_PIXELS)
    expected = theirs(extreme, extreme=True)
    assert first_difference(ours(extreme, rule=rule), expected) is None
    assert first_difference(ours(extreme), expected) is not None


@pytest.mark.parametrize("options", [{"raunet": False}, {"windows": False}])
@pytest.mark.parametrize("name", ["sd15-ddim", "sdxl"])
def test_each_half_alone(name: str, options: dict[str, bool]) -> None:
    expected = theirs(CASES[name], **options)
    assert first_difference(ours(CASES[name], **options), expected) is None
    assert first_difference(ours(CASES[name]), expected) is not None


# Controls: the same comparison notices what it is there to notice.


@pytest.mark.parametrize("name", ["sd15-ddim", "sdxl", "turbo", "controlnet"])
def test_the_stock_pipeline_differs(name: str) -> None:
    stock = trajectory(build(CASES[name]), arguments(CASES[name]))
    assert first_difference(stock, theirs(CASES[name])) == 0


@pytest.mark.parametrize(
    ("name", "rule", "step"),
    [
        ("sd15-ddim", PhaseRule(strided=StepRange(0, 0.6)), 2),  # a step too long
        ("sd15-ddim", PhaseRule(pooled=StepRange(0, 0.4)), 0),  # the other change
        ("sdxl", PhaseRule(pooled=StepRange(0, 0.4)), 0),  # Playground's
        ("sdxl", PhaseRule(StepRange(0, 8 / 50), StepRange(8 / 50, 0.5)), 2),  # ControlNet's
        ("controlnet", replace(phase_rule(Family.SDXL, CONTROL, 128, 1536), control=0.5), 2),  # a step too short
    ],
)
def test_a_wrong_rule_is_noticed_at_its_first_wrong_step(name: str, rule: PhaseRule, step: int) -> None:
    assert first_difference(ours(CASES[name], rule=rule), theirs(CASES[name])) == step


@pytest.mark.parametrize("name", ["sd15-ddim", "sdxl"])
@pytest.mark.parametrize("block", [0, -1])
def test_one_wrong_shift_is_noticed(name: str, block: int) -> None:
    wrong_at = 3

    def shift(pipe: Any) -> None:
        calls = iter(range(CASES[name].steps))

        def before(_unet: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            if next(calls) == wrong_at:
                _shift_by_one_row_more(kwargs["cross_attention_kwargs"], block)

        pipe.unet.register_forward_pre_hook(before, with_kwargs=True)

    assert first_difference(ours(CASES[name], shift), theirs(CASES[name])) == wrong_at


def _shift_by_one_row_more(attention: dict[str, Any], block: int) -> None:
    orders = list(attention[WINDOW_ORDERS])
    order = orders[block]
    tokens = order.gather.numel()
    width = round(tokens**0.5)
    orders[block] = type(order)((order.gather + width) % tokens, order.restore.roll(width))
    attention[WINDOW_ORDERS] = tuple(orders)


@pytest.mark.parametrize("name", ["sd15-ddim", "sdxl"])
def test_a_swapped_weight_is_noticed(name: str) -> None:
    def swap(pipe: Any) -> None:
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        attention.to_v, attention.to_k = attention.to_k, attention.to_v

    assert first_difference(ours(CASES[name], swap), theirs(CASES[name])) == 0


def test_the_native_shifts_are_others() -> None:
    native = apply_hidiffusion(pipe := build(CASES["sdxl"]))
    with native:
        latents = trajectory(pipe, arguments(CASES["sdxl"]))
    assert first_difference(latents, theirs(CASES["sdxl"])) == 0


# What the package gets wrong: there this project goes its own way, and these tests say where.


def test_the_package_switches_phase_within_a_step_of_a_second_order_sampler() -> None:
    heun = case(SD, Family.SD15, scheduler="HeunDiscreteScheduler")
    # Nine evaluations make five steps. Strided: the package's first int(9 * 0.4) = 3 evaluations, one step and a half;
    # ours the first int(5 * 0.4) = 2 steps.
    assert first_difference(ours(heun), theirs(heun)) == 3
    assert first_difference(ours(heun, rule=PhaseRule(StepRange(0, 0.2))), theirs(heun)) == 2


def test_the_package_is_off_after_a_cancelled_run() -> None:
    short = CASES["sd15-ddim"]

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    def rerun(pipe: Any) -> list[torch.Tensor]:
        with pytest.raises(KeyboardInterrupt):
            pipe(**arguments(short), callback_on_step_end=stop)
        return trajectory(pipe, arguments(short))

    fresh = theirs(short)
    with published.applied(build(short)) as pipe:
        assert first_difference(rerun(pipe), fresh) == 1
    with apply_hidiffusion(pipe := build(short), compat="published"):
        assert first_difference(rerun(pipe), fresh) is None
