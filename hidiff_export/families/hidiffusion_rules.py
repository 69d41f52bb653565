"""HiDiffusion's rules for each family: where in the UNet it acts, and in which part of a run.

Everything here is data of the published `hidiffusion` package (0.1.10). Block names are those of diffusers'
``UNet2DConditionModel``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hidiff_export.families.family import PIXELS_PER_LATENT, Family, Task
from hidiff_runtime.phases import PhaseRule, StepRange


@dataclass(frozen=True)
class Layout:
    """Where in the UNet HiDiffusion acts, as module names.

    Args:
        downsampler: the downsampler that takes stride 4 instead of 2.
        pooled_attention: its output is average-pooled by 2.
        restored_attention: its output is brought back, bicubic, to the size before the pool.
        windowed_blocks: transformer blocks whose self-attention runs in windows, in execution order; empty when the
            windows are switched off.
    """

    downsampler: str
    pooled_attention: str
    restored_attention: str
    windowed_blocks: tuple[str, ...]

    @classmethod
    def of(cls, family: Family) -> Layout:
        """Returns the published places for ``family``."""
        return _SDXL_LAYOUT if family.is_sdxl else _SD_LAYOUT

    def without_windows(self) -> Layout:
        """Returns the same places with global attention everywhere."""
        return replace(self, windowed_blocks=())


_SD_LAYOUT = Layout(
    downsampler="down_blocks.0.downsamplers.0",
    pooled_attention="down_blocks.1.attentions.0",
    restored_attention="up_blocks.2.attentions.1",
    windowed_blocks=(
        *(f"down_blocks.0.attentions.{attention}.transformer_blocks.0" for attention in range(2)),
        *(f"up_blocks.3.attentions.{attention}.transformer_blocks.0" for attention in range(3)),
    ),
)
_SDXL_LAYOUT = Layout(
    downsampler="down_blocks.1.downsamplers.0",
    pooled_attention="down_blocks.1.attentions.0",
    restored_attention="up_blocks.1.attentions.1",
    windowed_blocks=(
        *(f"down_blocks.1.attentions.{a}.transformer_blocks.{b}" for a in range(2) for b in range(2)),
        *(f"up_blocks.1.attentions.{a}.transformer_blocks.{b}" for a in range(3) for b in range(2)),
    ),
)

# Thresholds of the published package, as fractions of the number of denoising steps.
_T1, _T1_CONTROL, _T1_TURBO = 0.4, 0.5, 0.5
_T1_EXTREME, _T2_EXTREME = 0.7, 0.3
_STRIDED_FIRST = 8 / 50
CONTROL_END = 0.6
_EXTREME_LATENT = {False: 256, True: 512}


def phase_rule(family: Family, task: Task, width: int, height: int) -> PhaseRule:
    """Returns when each change is in force, with the published package's thresholds.

    The package takes a ControlNet for SDXL alone. SD1.5 and SD2.1 keep their own ranges beside one, and its residuals
    come in for the same part of the run as SDXL's.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """
    control = CONTROL_END if task.has_control else None
    extreme = min(width, height) // PIXELS_PER_LATENT >= _EXTREME_LATENT[family.is_sdxl]
    if family is Family.SDXL_TURBO:
        return PhaseRule(pooled=StepRange(0, _T1_TURBO), control=control)
    if not family.is_sdxl:
        if extreme:
            return PhaseRule(StepRange(0, _T1_EXTREME), StepRange(0, _T2_EXTREME), control)
        return PhaseRule(strided=StepRange(0, _T1), control=control)
    if extreme:
        return PhaseRule(StepRange(0, _T2_EXTREME), StepRange(0, _T1_EXTREME), control)
    end = _T1_CONTROL if task is Task.CONTROLNET else _T1
    if task is Task.INPAINTING or family is Family.PLAYGROUND:
        return PhaseRule(pooled=StepRange(0, end), control=control)
    return PhaseRule(StepRange(0, _STRIDED_FIRST), StepRange(_STRIDED_FIRST, end), control)
