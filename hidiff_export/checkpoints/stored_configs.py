"""What a network's folder in a bundle holds, and how the configurations there are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hidiff_export.errors import BundleError
from hidiff_runtime.format.codec import LARGEST_JSON
from hidiff_runtime.format.regular_files import read_regular

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


def read_config(path: Path) -> dict[str, Any]:
    """Reads a network's or the scheduler's configuration as diffusers writes it, infinite numbers included.

    Raises:
        BundleError: it is missing, damaged or no JSON object.
    """
    try:
        config = json.loads(read_regular(path, LARGEST_JSON))
        if not isinstance(config, dict):
            raise TypeError(f"it holds a {type(config).__name__}, expected an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BundleError(
            "A configuration in the bundle cannot be read.", given=f"{path}: {error}", advice="Fetch the bundle again."
        ) from error
    return config
