"""Plays back a HiDiffusion bundle: picks each step's phase, draws the window shifts, applies the sampler.

Needs numpy alone; an engine's own library is imported when an engine of that backend is opened. The names below, but
for the errors, are imported when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hidiff_runtime.errors import (
    BundleError,
    Cancelled,
    EngineError,
    Expired,
    HidiffError,
    InputError,
    ParityError,
    StorageError,
)
from hidiff_runtime.version import __version__

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle, open
    from hidiff_runtime.denoising.denoiser import ControlRequest, Denoiser, StepInfo
    from hidiff_runtime.format.manifest import Manifest
    from hidiff_runtime.phases import Phase, PhaseKind, PhasePlan
    from hidiff_runtime.pipeline.image_metadata import save_png
    from hidiff_runtime.pipeline.image_parameters import PictureParameters, read_parameters
    from hidiff_runtime.pipeline.image_settings import Likeness, settings_like
    from hidiff_runtime.pipeline.pipeline import PictureStep, Pipeline, Result
    from hidiff_runtime.pipeline.request import Request
    from hidiff_runtime.pipeline.request_fields import Settings
    from hidiff_runtime.sampling.scheduler_table import SamplerTable
    from hidiff_runtime.sampling.torch_rng import TorchGenerator
    from hidiff_runtime.verification.comparison import Bound, Verdict
    from hidiff_runtime.verification.replay import CheckReport, check

__all__ = [
    "Bound",
    "Bundle",
    "BundleError",
    "Cancelled",
    "CheckReport",
    "ControlRequest",
    "Denoiser",
    "EngineError",
    "Expired",
    "HidiffError",
    "InputError",
    "Likeness",
    "Manifest",
    "ParityError",
    "Phase",
    "PhaseKind",
    "PhasePlan",
    "PictureParameters",
    "PictureStep",
    "Pipeline",
    "Request",
    "Result",
    "SamplerTable",
    "Settings",
    "StepInfo",
    "StorageError",
    "TorchGenerator",
    "Verdict",
    "__version__",
    "check",
    "open",
    "read_parameters",
    "save_png",
    "settings_like",
]

_HOMES = {
    "bundle": ("Bundle", "open"),
    "denoising.denoiser": ("ControlRequest", "Denoiser", "StepInfo"),
    "pipeline.image_settings": ("Likeness", "settings_like"),
    "format.manifest": ("Manifest",),
    "phases": ("Phase", "PhaseKind", "PhasePlan"),
    "pipeline.pipeline": ("PictureStep", "Pipeline", "Result"),
    "pipeline.image_metadata": ("save_png",),
    "pipeline.image_parameters": ("PictureParameters", "read_parameters"),
    "verification.replay": ("CheckReport", "check"),
    "pipeline.request": ("Request",),
    "pipeline.request_fields": ("Settings",),
    "sampling.torch_rng": ("TorchGenerator",),
    "sampling.scheduler_table": ("SamplerTable",),
    "verification.comparison": ("Bound", "Verdict"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
