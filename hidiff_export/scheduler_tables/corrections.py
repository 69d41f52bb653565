"""What diffusers' pipelines correct in the noise schedule that a checkpoint comes with.

Early checkpoints left settings out whose defaults are wrong for them. The pipelines of Stable Diffusion 1.5 and 2 put
them right whenever they are made, those of SDXL and those with a ControlNet do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hidiff_export.families.family import Family, Task


def corrected(config: Mapping[str, Any], family: Family, task: Task) -> dict[str, Any]:
    """Returns a scheduler's configuration as the pipeline of this family and task runs it."""
    if family.is_sdxl or task.has_control:
        return dict(config)
    if task is Task.INPAINTING:
        return {**config, "steps_offset": 1, "skip_prk_steps": True}
    return {**config, "steps_offset": 1, "clip_sample": False}
