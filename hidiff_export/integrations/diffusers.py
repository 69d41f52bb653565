"""The name of the last release for `hidiff_export.BundleUNet`; it goes with the next one."""

from __future__ import annotations

import warnings

from hidiff_export.diffusers_api.bundle_unet import BundleUNet

__all__ = ["BundleUNet"]

warnings.warn(
    "hidiff_export.integrations.diffusers goes with the next release: import BundleUNet from hidiff_export.",
    DeprecationWarning,
    stacklevel=2,
)
