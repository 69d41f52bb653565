"""Compiles HiDiffusion-patched Stable Diffusion UNets into phase-specific graphs and engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hidiff_runtime.version import __version__

if TYPE_CHECKING:
    from hidiff_export.diffusers_api.apply_hidiffusion import apply_hidiffusion
    from hidiff_export.diffusers_api.bundle_unet import BundleUNet
    from hidiff_runtime.format.forecast_record import Forecast
    from hidiff_runtime.reused_features import Reuse

__all__ = ["BundleUNet", "Forecast", "Reuse", "__version__", "apply_hidiffusion"]


def __getattr__(name: str) -> Any:
    """Imports what needs PyTorch, and what few need, only when it is asked for."""
    if name == "apply_hidiffusion":
        from hidiff_export.diffusers_api.apply_hidiffusion import apply_hidiffusion

        return apply_hidiffusion
    if name == "BundleUNet":
        from hidiff_export.diffusers_api.bundle_unet import BundleUNet

        return BundleUNet
    if name == "Forecast":
        from hidiff_runtime.format.forecast_record import Forecast

        return Forecast
    if name == "Reuse":
        from hidiff_runtime.reused_features import Reuse

        return Reuse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
