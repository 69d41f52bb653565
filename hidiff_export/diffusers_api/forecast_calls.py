"""Calls of a pipeline's UNet that are left out: their output is forecast from those before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from hidiff_export.diffusers_api.run_tracker import RunTracker
from hidiff_export.diffusers_api.unguided_calls import WITHOUT
from hidiff_export.errors import InputError
from hidiff_runtime.format.forecast_record import UNSUITABLE, Forecast
from hidiff_runtime.sampling.forecast import KEPT, weights


class ForecastCalls:
    """What stands around the UNet's ``forward``: computes it, or adds up what it gave before.

    Both halves of guidance are forecast alike, which is a forecast of the guided output, since that is linear in them;
    with ``guidance_rescale`` it is not, and what is rescaled is the forecast.

    Args:
        forecast: which calls are computed.
        tracker: says which evaluation of the run is at hand.

    Attributes:
        batch: of the output of the call at hand, to be told before each: its latents' may be the prompts' half.
    """

    def __init__(self, forecast: Forecast, tracker: RunTracker) -> None:
        self._forecast = forecast
        self._tracker = tracker
        self.batch = 0
        self._known: list[tuple[int, torch.Tensor]] = []

    @property
    def computed(self) -> bool:
        """Whether the evaluation at hand is computed."""
        index, total = self._tracker.evaluation()
        return self._forecast.computed(total)[index]

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluates the UNet, or forecasts what it would give; raises what :meth:`begin` does."""
        self.begin()
        if self.computed:
            output = forward(*args, **kwargs)
            self.keep(output[0])
            return output
        sample = self.sample()
        call = inspect.signature(forward).bind(*args, **kwargs).arguments
        return UNet2DConditionOutput(sample=sample) if call.get("return_dict", True) else (sample,)

    def begin(self) -> None:
        """Begins an evaluation.

        Raises:
            InputError: the sampler's outputs follow no curve, the pipeline evaluates the UNet several times for one
                step of the scheduler, or it has changed its batch in mid-run.
        """
        index, total = self._tracker.evaluation()
        if index == 0:
            self._check_sampler()
            self._known = []
        if self._known and self._known[-1][0] >= index:
            raise InputError(
                "The pipeline calls the UNet more than once for a step, so that its outputs follow no one curve.",
                given=f"evaluation {index} of {total}",
                advice=WITHOUT.format("forecast"),
            )
        before = len(self._known[-1][1]) if self._known else self.batch
        if before != self.batch:
            raise InputError(
                "The batch changes in mid-run, so that outputs before say nothing of those after.",
                given=f"a batch of {self.batch} after one of {before}, evaluation {index} of {total}",
                advice=WITHOUT.format("forecast"),
            )

    def keep(self, sample: torch.Tensor) -> None:
        """Keeps what the evaluation at hand gave, [model batch, channels, height, width]."""
        index, _ = self._tracker.evaluation()
        self._known = [*self._known, (index, sample.detach())][-KEPT:]

    def sample(self) -> torch.Tensor:
        """Returns a forecast of what the evaluation at hand would give, of the shape and type of those kept."""
        counts = weights([known for known, _ in self._known], *self._tracker.evaluation()).tolist()
        terms = (sample.float() * count for (_, sample), count in zip(self._known, counts, strict=True))
        total: torch.Tensor = sum(terms, start=torch.zeros(()))
        return total.to(self._known[-1][1].dtype)

    def _check_sampler(self) -> None:
        name = self._tracker.scheduler.removesuffix("Scheduler").lower()
        if reason := UNSUITABLE.get(name):
            raise InputError(
                f"Steps of the sampler {name} cannot be forecast: {reason}.",
                given=self._tracker.scheduler,
                advice=f"Set another scheduler in the pipeline. {WITHOUT.format('forecast')}",
            )
