"""A phase against the published package at a step of that phase: the same UNet, inputs and window shifts.

Every family and task, every phase it has at any size, and square, oblong and odd latents. The package runs from its own
step counters, thresholds and random numbers; the comparison must fail on a wrong phase, shift or weight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.families.family import Family, Task, unet_config
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.hidiffusion_rules import Layout, phase_rule
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.reference.random_inputs import arrays, random_inputs
from hidiff_runtime.phases import Phase, PhaseKind, PhasePlan
from tests.parity import published
from tests.parity.pipelines import network

MAX_ABS = 1e-6
"""Of outputs with a standard deviation of one. Here all are bit-equal; another machine's convolutions may round."""

STEPS = 50
SEED = 1

SIZES = {"square": (32, 32), "oblong": (40, 32), "odd": (35, 38)}
"""Latents. At 32 SDXL's inner windows still shift, by one row a quarter."""

FAMILIES = [
    (Family.SD15, Task.TEXT_TO_IMAGE),
    (Family.SD15, Task.INPAINTING),
    (Family.SD21, Task.TEXT_TO_IMAGE),
    (Family.SDXL, Task.TEXT_TO_IMAGE),
    (Family.SDXL, Task.INPAINTING),
    (Family.SDXL, Task.CONTROLNET),
    (Family.SDXL, Task.CONTROLNET_IMAGE_TO_IMAGE),
    (Family.SDXL_TURBO, Task.TEXT_TO_IMAGE),
    (Family.PLAYGROUND, Task.TEXT_TO_IMAGE),
]

# The extreme thresholds bring phases that smaller pictures do not have. With latents of 256 and 512 these tests would
# take hours, so the package is told to use those thresholds at any size; what it then does depends on no size.
_PIXELS = {False: 1024, True: 4096}


@dataclass(frozen=True)
class Case:
    """A phase of a family, and the first and last step that it has under the thresholds that bring it."""

    family: Family
    task: Task
    phase: Phase
    steps: tuple[int, int]
    extreme: bool

    def __str__(self) -> str:
        return f"{self.family.value}-{self.task.value}-{self.phase.name}"


def cases() -> Iterator[Case]:
    for family, task in FAMILIES:
        seen: set[Phase] = set()
        for extreme, pixels in _PIXELS.items():
            for span in PhasePlan(phase_rule(family, task, pixels, pixels), STEPS).spans:
                if span.phase not in seen:
                    seen.add(span.phase)
                    yield Case(family, task, span.phase, (span.first, span.last), extreme)


CASES = list(cases())


@functools.cache
def unet_of(family: Family, task: Task) -> Any:
    return network(Component.UNET, family, task).requires_grad_(False).eval()


def inputs_of(phase_unet: PhaseUNet) -> dict[str, torch.Tensor]:
    """By name, without the window shifts."""
    given = random_inputs(phase_unet.input_specs(2), timestep=501, width=1024, height=1536, seed=0)
    return {name: torch.from_numpy(array) for name, array in arrays(given).items()}


def predict(phase_unet: PhaseUNet, inputs: dict[str, torch.Tensor], shifts: torch.Tensor) -> torch.Tensor:
    return phase_unet(**PhaseUNet.arguments({**inputs, "window_shifts": shifts}))


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The one comparison of this file, for what must pass and for what must fail."""
    assert found.shape == expected.shape
    assert torch.isfinite(expected).all()
    assert 0.5 < float(expected.std()) < 2.0  # else the bound would not mean what it says
    assert float((found - expected).abs().max()) <= MAX_ABS  # a NaN fails too


OBLONG = (Family.SD15, Family.SDXL)
"""Families whose phases are compared at every size: the others' UNets have the same two layouts."""


@pytest.mark.parametrize(
    ("case", "size"),
    [
        pytest.param(case, size, id=f"{case}-{size}")
        for case in CASES
        for size in SIZES
        if size != "oblong" or (case.family in OBLONG and case.task is Task.TEXT_TO_IMAGE)
    ],
)
def test_a_phase_is_the_published_one(case: Case, size: str) -> None:
    unet, layout = unet_of(case.family, case.task), Layout.of(case.family)
    phase_unet = PhaseUNet(unet, layout, case.phase, *SIZES[size])
    inputs = inputs_of(phase_unet)
    step = case.steps[size == "square"]
    evaluation = published.Evaluation(case.family, case.task, step, STEPS, case.extreme)
    expected = published.predict(unet, evaluation, inputs, SEED)
    check(predict(phase_unet, inputs, published.drawn_shifts(SEED, len(layout.windowed_blocks))), expected)


def test_every_kind_of_phase_is_there() -> None:
    assert {case.phase.kind for case in CASES} == set(PhaseKind)
    assert {case.phase.kind for case in CASES if case.phase.control} == set(PhaseKind)
    assert {case.phase.kind for case in CASES if case.family is Family.SD15} == set(PhaseKind) - {PhaseKind.POOLED}


def test_sizes_and_seed_exercise_the_shifts() -> None:
    for family in (Family.SD15, Family.SDXL):
        assert set(published.drawn_shifts(SEED, len(Layout.of(family).windowed_blocks)).tolist()) == {0, 1, 2, 3}
        for height, width in SIZES.values():
            geometry = UNetGeometry.of(
                unet_config(family, Task.TEXT_TO_IMAGE), Layout.of(family), Phase(PhaseKind.POOLED), height, width
            )
            assert all(len({shape.shift(quarters) for quarters in range(4)}) == 4 for shape in geometry.windows)


@dataclass(frozen=True)
class Control:
    """What the negative controls start from: a comparison that holds."""

    family: Family
    phase_unet: PhaseUNet
    inputs: dict[str, torch.Tensor]
    shifts: torch.Tensor
    expected: torch.Tensor

    @classmethod
    @functools.cache
    def of(cls, family: Family) -> Control:
        unet, layout = unet_of(family, Task.TEXT_TO_IMAGE), Layout.of(family)
        phase_unet = PhaseUNet(unet, layout, Phase(PhaseKind.STRIDED), *SIZES["square"])
        inputs = inputs_of(phase_unet)
        evaluation = published.Evaluation(family, Task.TEXT_TO_IMAGE, step=0)
        expected = published.predict(unet, evaluation, inputs, SEED)
        shifts = published.drawn_shifts(SEED, len(layout.windowed_blocks))
        return cls(family, phase_unet, inputs, shifts, expected)

    def other(self, unet: Any, kind: PhaseKind = PhaseKind.STRIDED) -> PhaseUNet:
        return PhaseUNet(unet, Layout.of(self.family), Phase(kind), *SIZES["square"])

    def refuses(self, phase_unet: PhaseUNet, shifts: torch.Tensor) -> None:
        found = predict(phase_unet, self.inputs, shifts)
        with pytest.raises(AssertionError, match="max"):
            check(found, self.expected)


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
class TestWhatMustFail:
    """At a size where the package's own thresholds bring the phase; the same check as above."""

    def test_nothing_changed_passes(self, family: Family) -> None:
        control = Control.of(family)
        check(predict(control.phase_unet, control.inputs, control.shifts), control.expected)

    @pytest.mark.parametrize("kind", [kind for kind in PhaseKind if kind is not PhaseKind.STRIDED])
    def test_wrong_phase(self, family: Family, kind: PhaseKind) -> None:
        control = Control.of(family)
        control.refuses(control.other(unet_of(family, Task.TEXT_TO_IMAGE), kind), control.shifts)

    def test_one_wrong_shift_in_any_block(self, family: Family) -> None:
        control = Control.of(family)
        for block in range(len(control.shifts)):
            wrong = control.shifts.clone()
            wrong[block] = (wrong[block] + 1) % 4
            control.refuses(control.phase_unet, wrong)

    def test_shifts_in_another_order(self, family: Family) -> None:
        control = Control.of(family)
        control.refuses(control.phase_unet, control.shifts.flip(0))

    def test_two_weights_swapped(self, family: Family) -> None:
        control = Control.of(family)
        unet = network(Component.UNET, family).requires_grad_(False)
        resnet = unet.down_blocks[1].resnets[1]
        resnet.conv1.weight, resnet.conv2.weight = resnet.conv2.weight, resnet.conv1.weight
        control.refuses(control.other(unet), control.shifts)

    def test_one_weight_perturbed(self, family: Family) -> None:
        control = Control.of(family)
        unet = network(Component.UNET, family).requires_grad_(False)
        unet.mid_block.resnets[0].conv1.weight[0, 0, 1, 1] += 0.01
        control.refuses(control.other(unet), control.shifts)
