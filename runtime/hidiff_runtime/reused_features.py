"""Which evaluations compute a UNet's outermost layers alone, and take the deep features of an earlier one.

Deep features change little from step to step (DeepCache, https://arxiv.org/abs/2312.00858).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

DEEP_FEATURES = "deep_features"
"""What full graphs of a bundle with reuse give beside the noise, and shallow ones take: float32 [model batch, channels,
height, width]."""


@dataclass(frozen=True)
class Reuse:
    """How long deep features serve, and how deep they are.

    Args:
        every: an evaluation computes them anew where those there are come from so many evaluations before, at least 2.
        depth: layers on the way up that are computed each time, counted from the output, at least 1; on the way down
            one less, which feed them.
    """

    every: int
    depth: int = 1

    def __str__(self) -> str:
        """Returns the settings in words."""
        return f"all of the UNet every {self.every} evaluations, its last {self.depth} layers between"

    def shallow(self, phases: Sequence[Hashable], computed: Sequence[bool]) -> tuple[bool, ...]:
        """Returns which of a run's evaluations take the features of an earlier one, never of another phase's.

        Args:
            phases: of each evaluation.
            computed: whether each is computed at all, and not forecast.
        """
        found: list[bool] = []
        full = None
        for index, (phase, due) in enumerate(zip(phases, computed, strict=True)):
            takes = due and full is not None and phases[full] == phase and index - full < self.every
            if due and not takes:
                full = index
            found.append(takes)
        return tuple(found)
