"""Deep features of a pipeline's run: which of its evaluations take them, and for how long they are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hidiff_export.diffusers_api.run_tracker import RunTracker
from hidiff_export.diffusers_api.unguided_calls import WITHOUT
from hidiff_export.errors import InputError
from hidiff_runtime.format.forecast_record import Forecast, computed_of
from hidiff_runtime.phases import Phase
from hidiff_runtime.reused_features import Reuse


class KeptFeatures:
    """The deep features of the last full evaluation, as long as a later one takes them.

    Args:
        reuse: how long features serve, and how deep they are.
        tracker: says which evaluation of the run is at hand.
        phases: of each evaluation of the run at hand, for latents of a height and width.
        forecast: which evaluations are computed; None for all.

    Attributes:
        features: [model batch, channels, height, width]; None where no evaluation takes any.
    """

    def __init__(
        self,
        reuse: Reuse,
        tracker: RunTracker,
        phases: Callable[[int, int], Sequence[Phase]],
        forecast: Forecast | None,
    ) -> None:
        self.features: torch.Tensor | None = None
        self._reuse = reuse
        self._tracker = tracker
        self._phases = phases
        self._forecast = forecast
        self._latents_shape: torch.Size | None = None
        self._last = -1

    def taken_for(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Returns the features that the evaluation at hand takes; None where it computes all layers.

        A pipeline may change its batch in mid-run, which the rule does not know: then all layers are computed.

        Args:
            latents: [model batch, channels, height, width], which the UNet evaluates.
        """
        index, _ = self._tracker.evaluation()
        takes = latents.shape == self._latents_shape and self._planned(latents)[index]
        return self.features if takes else None

    def begin(self) -> None:
        """Begins an evaluation.

        Raises:
            InputError: the pipeline evaluates the UNet several times for one step of the scheduler.
        """
        index, total = self._tracker.evaluation()
        if 0 < index == self._last:
            raise InputError(
                "The pipeline calls the UNet more than once for a step, each time with other features.",
                given=f"evaluation {index} of {total}",
                advice=WITHOUT.format("reuse"),
            )
        self._last = index

    def forget(self) -> None:
        """Lets go of the features, before others are computed."""
        self.features = None

    def finish(self, latents: torch.Tensor, features: torch.Tensor | None) -> None:
        """Ends an evaluation: keeps its features where a later one takes them, and else none.

        Args:
            latents: that it was for.
            features: that it computed or took.
        """
        self.features = features if self.wanted_after(latents) else None
        self._latents_shape = latents.shape

    def wanted_after(self, latents: torch.Tensor) -> bool:
        """Returns whether an evaluation after the one at hand takes features."""
        index, _ = self._tracker.evaluation()
        return any(self._planned(latents)[index + 1 :])

    def _planned(self, latents: torch.Tensor) -> tuple[bool, ...]:
        _, total = self._tracker.evaluation()
        return self._reuse.shallow(self._phases(*latents.shape[-2:]), computed_of(self._forecast, total))
