"""The name of the last release for `hidiff_runtime.bulk.ray_pool`; it goes with the next one."""

from __future__ import annotations

import warnings

from hidiff_runtime.bulk.ray_pool import Pool

__all__ = ["Pool"]

warnings.warn(
    "hidiff_runtime.bulk.cluster goes with the next release: import Pool from hidiff_runtime.bulk.ray_pool.",
    DeprecationWarning,
    stacklevel=2,
)
