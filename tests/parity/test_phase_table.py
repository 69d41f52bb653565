"""Which phase runs at which step: this project's rule against the published package's own modules, step by step.

The package decides inside its patched modules, from counters. They are driven here as a pipeline drives them, with
stand-ins for the tensors, and what each does in each step is written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.families.hidiffusion_rules import Layout, phase_rule
from hidiff_runtime.phases import Phase, PhaseKind, PhasePlan, PhaseRule, StepRange
from tests.parity import published

MOST_STEPS = 200
RUNS = (*range(1, 61), 75, 90, 99, 100, 125, 150, 170, 180, MOST_STEPS)
"""Numbers of steps that every case is compared at; the last control below goes through all of them."""
TABULATED = (4, 20, 30, 50)
"""Runs in which the way up is driven too, which has to undo what the way down did."""


@dataclass(frozen=True)
class Case:
    """A family, a task and a size of the picture in pixels."""

    family: Family
    task: Task
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.family.value}-{self.task.value}-{self.width}x{self.height}"

    @property
    def rule(self) -> PhaseRule:
        return phase_rule(self.family, self.task, self.width, self.height)


def _cases(family: Family, task: Task, *sizes: tuple[int, int]) -> list[Case]:
    return [Case(family, task, width, height) for width, height in sizes]


_SDXL_SIZES = ((2048, 2048), (4096, 4096), (4096, 2048))
CASES = [
    *_cases(Family.SD15, Task.TEXT_TO_IMAGE, (512, 512), (1024, 1024), (2048, 2048), (2040, 2048), (2048, 1024)),
    *_cases(Family.SD21, Task.IMAGE_TO_IMAGE, (1024, 1024), (2048, 2048)),
    *_cases(Family.SD15, Task.INPAINTING, (1024, 1024)),
    *_cases(Family.SDXL, Task.TEXT_TO_IMAGE, *_SDXL_SIZES),
    *_cases(Family.SDXL, Task.INPAINTING, *_SDXL_SIZES),
    *_cases(Family.SDXL_TURBO, Task.TEXT_TO_IMAGE, (1024, 1024), (4096, 4096)),
    *_cases(Family.PLAYGROUND, Task.TEXT_TO_IMAGE, *_SDXL_SIZES),
    *_cases(Family.SDXL, Task.CONTROLNET, *_SDXL_SIZES),
    *_cases(Family.SDXL, Task.CONTROLNET_IMAGE_TO_IMAGE, *_SDXL_SIZES),
]


@dataclass
class Recorder:
    """Stands in for ``torch.nn.functional`` inside the package: notes what is asked for and passes the input on."""

    asked: list[str] = field(default_factory=list)

    def conv2d(self, image: Any, *parameters: Any) -> Any:
        if parameters[2] == (4, 4):
            self.asked.append("strided")
        return image

    def avg_pool2d(self, image: Any, **_: Any) -> Any:
        self.asked.append("pooled")
        return image

    def interpolate(self, image: Any, **_: Any) -> Any:
        self.asked.append("restored")
        return image


def _resnet(image: Any, *_: Any) -> Any:
    return image


def _attention(image: Any, **_: Any) -> Any:
    return (image,)


def _emptied(block: Any) -> Any:
    """A patched block whose layers do nothing, so that only the package's own decisions are left."""
    count = len(block.attentions)
    del block.resnets, block.attentions
    block.resnets, block.attentions = count * [_resnet], count * [_attention]
    block.downsamplers = block.upsamplers = None
    return block


class Driver:
    """The package's patched modules, called once a step as a UNet would call them."""

    def __init__(self, pipe: Any, case: Case, recorder: Recorder) -> None:
        self.pipe, self.recorder = pipe, recorder
        layout = Layout.of(case.family)
        modules = dict(pipe.unet.named_modules())
        self.downsampler = modules[f"{layout.downsampler}.conv"]
        self.down = _emptied(modules[layout.pooled_attention.rpartition(".attentions")[0]])
        self.up = _emptied(modules[layout.restored_attention.rpartition(".attentions")[0]])
        pipe.unet.info["size"] = (case.height // 8, case.width // 8)
        pipe.unet.info["text_to_img_controlnet"] = case.task is Task.CONTROLNET
        self.image: Any = SimpleNamespace(shape=(1, 1, 1, 1))
        self.control = case.task.has_control
        self.control_rate = published.package().controlnet_apply_steps_rate

    def run(self, steps: int) -> list[Phase]:
        """The phases of a run of ``steps``."""
        self.pipe._num_timesteps = steps
        return [self._step(step, steps) for step in range(steps)]

    def _step(self, step: int, steps: int) -> Phase:
        self.recorder.asked.clear()
        # Straight to forward: the modules have no hooks, and calling them costs most of this test's time.
        if hasattr(self.downsampler, "_parent"):  # Turbo's is left as it is
            self.downsampler.forward(self.image)
        self.down.forward(self.image)
        asked = self.recorder.asked
        if steps in TABULATED:
            self.up.forward(self.image, 3 * (self.image,))
            assert ("pooled" in asked) == ("restored" in asked)
        kind = PhaseKind.of(strided="strided" in asked, pooled="pooled" in asked)
        # The package's pipeline hands the residuals over under this condition.
        return Phase(kind, control=self.control and step < self.control_rate * steps)


@contextmanager
def _driver(case: Case) -> Iterator[Driver]:
    config = Component.UNET.config(case.family, case.task, Width.TINY)
    kind = published.ControlNetPipeline if case.task.has_control else published.DiffusionPipeline
    pipe = kind(Component.UNET.empty(config), published.checkpoint_name(case.family, case.task), 50)
    recorder = Recorder()
    with (
        published.applied(pipe),
        mock.patch.object(published.package(), "F", recorder),
        mock.patch.object(torch, "cat", lambda images, dim: images[0]),  # noqa: ARG005 - torch's signature
    ):
        yield Driver(pipe, case, recorder)


def _runs(rule: PhaseRule, steps: int) -> list[Phase]:
    return [span.phase for span in PhasePlan(rule, steps).spans for _ in range(span.steps)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_has_the_packages_phase(case: Case) -> None:
    with _driver(case) as driver:
        for steps in RUNS:
            assert _runs(case.rule, steps) == driver.run(steps), steps


def test_the_comparison_sees_a_threshold_off_by_one_step() -> None:
    case = Case(Family.SDXL, Task.TEXT_TO_IMAGE, 2048, 2048)
    wrong = PhaseRule(StepRange(0, 9 / 50), StepRange(9 / 50, 0.4))
    with _driver(case) as driver:
        assert _runs(wrong, 50) != driver.run(50)


def test_the_comparison_sees_an_exact_product_where_the_package_truncates() -> None:
    case = Case(Family.SD15, Task.TEXT_TO_IMAGE, 2048, 2048)
    exact = PhaseRule(StepRange(0, 0.7 + 1e-9), StepRange(0, 0.3))
    with _driver(case) as driver:
        differing = [steps for steps in range(1, MOST_STEPS + 1) if _runs(exact, steps) != driver.run(steps)]
    assert differing == [90, 170, 180]
    assert set(differing) <= set(RUNS)
