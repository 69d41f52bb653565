"""Checkpoints and LoRA files distilled for a few steps, recognized by what they are called and say of themselves.

They were trained on few timesteps, the first of which is the last training timestep; with the leading spacing that
most checkpoints come with, a run of 4 steps would begin at timestep 751 instead of 999.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Distillation:
    """A way of distilling, and how its checkpoints are drawn.

    Args:
        name: as its authors call it.
        pattern: by which names and descriptions are recognized.
        spacing: of the timesteps, None where the samplers have their own.
        samplers: that its authors draw with.
    """

    name: str
    pattern: str
    spacing: str | None
    samplers: tuple[str, ...]


DISTILLATIONS = (
    Distillation("SDXL-Lightning", r"lightning", "trailing", ("euler",)),
    Distillation("Hyper-SD", r"hyper[-_ ]?(sd|xl)", "trailing", ("ddim", "tcd", "euler")),
    Distillation("DMD2", r"(?<![a-z])dmd2?(?![a-z])", "trailing", ("lcm", "euler")),
    Distillation("Turbo", r"turbo", "trailing", ("euler_ancestral", "euler")),
    Distillation("LCM", r"(?<![a-z])lcm(?![a-z])", None, ("lcm",)),
    Distillation("TCD", r"(?<![a-z])tcd(?![a-z])", None, ("tcd",)),
)
"""Papers: arXiv 2402.13929, 2404.13686, 2405.14867, 2311.17042, 2310.04378, 2402.19159."""

_STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")


@dataclass(frozen=True)
class FewStep:
    """What a name or a header says of a distilled file.

    Args:
        distillation: by which it was made.
        steps: how many steps it is for; None where it does not say.
        where: it is said.
    """

    distillation: Distillation
    steps: int | None
    where: str


def recognize(name: str, texts: Mapping[str, str]) -> FewStep | None:
    """Recognizes a distilled checkpoint or LoRA; None where nothing speaks of one.

    Args:
        name: of the file, or the hub's id.
        texts: of the header, by key, as `hidiff_export.checkpoints.declarations.Declarations` has them.
    """
    lines = {"its name": name, **{f"{key}: {text[:60]}": text for key, text in texts.items()}}
    for where, text in lines.items():
        lowered = text.lower()
        for distillation in DISTILLATIONS:
            if re.search(distillation.pattern, lowered):
                steps = _STEPS.search(lowered)
                return FewStep(distillation, int(steps[1]) if steps else None, where)
    return None
