"""What the product of a layer's factors is multiplied by: its alpha over its rank, or what PEFT's settings say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.lora_file import PEFT_PREFIX

_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in a file's header."""

_BESIDE = "adapter_config.json"
"""Where PEFT keeps them."""

Settings = Mapping[str, Any]
"""PEFT's settings by component and key: ``unet.lora_alpha``, ``unet.alpha_pattern``, ``unet.use_rslora``."""


def settings_beside(path: Path, names: Iterable[str]) -> Path | None:
    """Returns the file with the settings of a LoRA that PEFT itself wrote; None without one, and for other writers."""
    beside = path.parent / _BESIDE
    return beside if any(name.startswith(PEFT_PREFIX) for name in names) and beside.is_file() else None


def lacks_settings(path: Path, names: Iterable[str]) -> bool:
    """Returns whether PEFT itself wrote a LoRA and its settings are not beside it."""
    return any(name.startswith(PEFT_PREFIX) for name in names) and not (path.parent / _BESIDE).is_file()


def read_settings(metadata: Mapping[str, str], beside: Path | None) -> Settings:
    """Returns the settings that are with a file.

    Args:
        metadata: of the file's header.
        beside: from `settings_beside`.

    Raises:
        ValueError, TypeError: they are no JSON, or no object.
        OSError: the file cannot be read.
    """
    if beside is None:
        return _object(metadata.get(_METADATA, "{}"))
    own = _object(beside.read_text(encoding="utf-8"))
    return {f"{component.value}.{key}": value for component in Component for key, value in own.items()}


def _object(text: str) -> dict[str, Any]:
    loaded = json.loads(text)
    if not isinstance(loaded, dict):
        raise TypeError(f"expected a JSON object of settings, got {type(loaded).__name__}")
    return loaded


def factor_of(alpha: float | None, rank: int, settings: Settings, component: Component, module: str) -> float:
    """Returns what a layer's product is multiplied by: alpha / rank, 1 without alpha.

    Args:
        alpha: the file's own for the layer, None without.
        rank: of the layer.
        settings: PEFT's; empty where there are none.
        component: the network of the layer.
        module: its name there.

    Raises:
        ValueError: an alpha is no finite number, or the file's and the settings' are not the same.
        TypeError, re.error: the settings are none of PEFT's.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"the alpha of {module} is {alpha}")
    said = _peft_factor(settings, component, module, rank)
    own = said if alpha is None else alpha / rank
    if said is not None and own is not None and not math.isclose(said, own, rel_tol=1e-3):
        raise ValueError(f"{module}: alpha / rank is {own:g} by the tensor .alpha, but {said:g} by PEFT's settings")
    return 1.0 if own is None else own


def _peft_factor(settings: Settings, component: Component, module: str, rank: int) -> float | None:
    own = {key.removeprefix(f"{component.value}."): value for key, value in settings.items()}
    if f"{component.value}.lora_alpha" not in settings:
        return None
    alpha = own["lora_alpha"]
    for pattern, value in (own.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)
