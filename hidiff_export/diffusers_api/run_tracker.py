"""Where a pipeline's denoising run stands: observed from outside, without a counter in any module."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hidiff_export.diffusers_api.method_patches import MethodPatches
from hidiff_export.errors import InputError

_TAKES_GENERATOR = ("prepare_latents", "prepare_extra_step_kwargs")
"""Methods of diffusers' pipelines that are handed ``generator``; not every class has, and not every run calls, both."""


class _EarlierCount(int):
    """The number of timesteps of the run before, told apart by its type from one that this run has set."""


def as_generators(given: torch.Generator | Sequence[torch.Generator]) -> tuple[torch.Generator, ...]:
    """Returns what a pipeline was called with as ``generator``: one for all pictures, or one for each."""
    return (given,) if isinstance(given, torch.Generator) else tuple(given)


class RunTracker:
    """Follows the runs of one pipeline through its scheduler.

    ``scheduler.set_timesteps`` begins a run, whatever became of the one before, and ``scheduler.step`` ends an
    evaluation, however many UNet calls it took. A scheduler put into the pipeline later is followed too.

    Args:
        pipe: a diffusers pipeline.
        overrides: takes what is put over the pipeline's and the schedulers' methods.

    Attributes:
        begun: whether the run at hand was followed from its beginning.
        generators: that the run at hand was called with: none, one for all pictures, or one for each.
    """

    def __init__(self, pipe: Any, overrides: MethodPatches) -> None:
        self._pipe = pipe
        self._overrides = overrides
        self._schedulers: list[object] = []
        self._evaluations = 0
        self.begun = False
        self.generators: tuple[torch.Generator, ...] = ()
        for name in _TAKES_GENERATOR:
            if hasattr(pipe, name):
                overrides.wrap(pipe, name, self._see_generator)
        self._follow_scheduler()

    def position(self) -> tuple[int, int]:
        """Returns the logical step at hand, from 0, and how many the run has.

        A second-order scheduler evaluates the UNet twice a step; PNDM counts its extra evaluation as a step, as the
        published package does.

        Raises:
            InputError: no timesteps have been set.
        """
        return self._position_of(*self.evaluation())

    def positions(self) -> list[tuple[int, int]]:
        """Returns the same of each evaluation of the run at hand.

        Raises:
            InputError: no timesteps have been set.
        """
        _, count = self.evaluation()
        return [self._position_of(index, count) for index in range(count)]

    def _position_of(self, index: int, count: int) -> tuple[int, int]:
        order = getattr(self._pipe.scheduler, "order", 1)
        return index // order, math.ceil(count / order)

    def evaluation(self) -> tuple[int, int]:
        """Returns the evaluation at hand, from 0, and how many the run has.

        Raises:
            InputError: no timesteps have been set.
        """
        self._follow_scheduler()
        scheduler = self._pipe.scheduler
        if not self.begun and getattr(scheduler, "num_inference_steps", None) is None:
            raise InputError(
                "The UNet was called outside a run, so there is no telling which phase it is in.",
                advice="Call the pipeline, or pipe.scheduler.set_timesteps() before a loop of your own.",
            )
        count = vars(self._pipe).get("_num_timesteps")
        if count is None or isinstance(count, _EarlierCount):
            count = len(scheduler.timesteps)
        return self._evaluations, count

    @property
    def scheduler(self) -> str:
        """The name of the scheduler's class."""
        return type(self._pipe.scheduler).__name__

    def close(self) -> None:
        """Leaves the pipeline's own record of its last run as a plain number."""
        count = vars(self._pipe).get("_num_timesteps")
        if isinstance(count, _EarlierCount):
            self._pipe._num_timesteps = int(count)

    def _follow_scheduler(self) -> None:
        scheduler = self._pipe.scheduler
        if any(scheduler is known for known in self._schedulers):
            return
        self._schedulers.append(scheduler)
        self._evaluations, self.begun = 0, False
        self._overrides.wrap(scheduler, "set_timesteps", self._begin)
        self._overrides.wrap(scheduler, "step", self._advance)

    def _begin(self, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_current(set_timesteps):
            self._evaluations, self.begun = 0, True
            self.generators = ()
            count = vars(self._pipe).get("_num_timesteps")
            if count is not None:
                self._pipe._num_timesteps = _EarlierCount(count)
        return set_timesteps(*args, **kwargs)

    def _advance(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if self._is_current(step):
            self._evaluations += 1
        return result

    def _is_current(self, method: Any) -> bool:
        return method.__self__ is self._pipe.scheduler

    def _see_generator(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._follow_scheduler()
        given = inspect.signature(method).bind(*args, **kwargs).arguments.get("generator")
        if given is not None:
            self.generators = as_generators(given)
        return method(*args, **kwargs)
