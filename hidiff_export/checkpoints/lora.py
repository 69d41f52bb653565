"""LoRA files fused into a checkpoint's weights: W + scale * (alpha / rank) * up @ down, a tensor at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hidiff_export.checkpoints.checkpoint_file import open_weights
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint
from hidiff_export.checkpoints.lora_file import Factors, LoraFile
from hidiff_export.checkpoints.lora_fit import places_of
from hidiff_export.checkpoints.state_dict import LazyStateDict, map_tensors, shapes_of
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width
from hidiff_runtime.format.manifest import FileDigest
from hidiff_runtime.format.safetensors import SafetensorsFile


class Pair(NamedTuple):
    """The two factors for one weight.

    Args:
        down: ``[rank, inputs]``, of a convolution ``[rank, inputs, height, width]``.
        up: ``[outputs, rank]``, of a convolution ``[outputs, rank, 1, 1]``.
        factor: alpha over rank, which their product is multiplied by.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float


Pairs = Mapping[Component, Mapping[str, Pair]]
"""By network and by the weight's name."""

Settings = Mapping[str, Any]
"""PEFT's settings by component and key: ``unet.lora_alpha``, ``unet.alpha_pattern``, ``unet.use_rslora``."""

_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in a file's header."""

_QUOTED = 300
"""Longest part of another library's message that is quoted."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file that fits a model.

    Args:
        path: of the file.
        scale: what its additions are multiplied by, beside each one's own alpha over rank.
        pairs: the factors of each addition, by network and by the weight's name.
        notices: what a user should know about the file, a line each.
    """

    path: Path
    scale: float
    pairs: Pairs
    notices: tuple[str, ...] = ()


def lora_fingerprint(path: Path) -> str:
    """Returns the SHA-256 of a LoRA file. Raises CheckpointError when it cannot be read."""
    try:
        return FileDigest.of(path).sha256
    except OSError as error:
        raise CheckpointError(
            "A LoRA file cannot be read.", given=f"{path}: {error.strerror}", advice="Check the path."
        ) from error


def settings_fingerprint(path: Path) -> str | None:
    """Returns the SHA-256 of PEFT's settings that `read_lora` reads beside a LoRA, None where it reads none.

    Raises CheckpointError when one of the files cannot be read.
    """
    with open_weights(path) as file:
        beside = LoraFile.of(file).peft_settings
    return lora_fingerprint(beside) if beside is not None and beside.is_file() else None


def read_lora(path: Path, scale: float, family: Family, task: Task, width: Width = Width.FULL) -> Lora:
    """Reads a LoRA and finds a weight for every tensor in it; the tensors are mapped and not copied.

    Args:
        path: of a ``.safetensors`` file of kohya's trainer, LyCORIS, OneTrainer, diffusers or PEFT.
        scale: of its additions.
        family: what it has to be for; ``task`` and ``width`` likewise.

    Raises:
        CheckpointError: the file is missing, damaged, holds something else than LoRA (DoRA, LoHa, …), or any of its
            tensors fits no weight of the family's UNet and text encoders; nothing is left out silently.
    """
    with open_weights(path) as file:
        read = LoraFile.of(file)
        pairs = _pairs(file, read, places_of(read, family, task, width))
    return Lora(path, scale, pairs, _notices(read))


def fuse(component: Component, checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """Returns a checkpoint with the additions of every LoRA in its weights, computed when a tensor is looked up.

    Sums are computed in float32.

    Args:
        component: the network.
        checkpoint: of the network.
        loras: in the order in which they are added.
    """
    added = [(lora.scale, lora.pairs.get(component, {})) for lora in loras]
    changed = {name for _, pairs in added for name in pairs}
    if not changed:
        return checkpoint
    tensors = checkpoint.state_dict

    def make(name: str) -> torch.Tensor:
        if name not in changed:
            return tensors[name]
        fused = tensors[name].to(torch.float32, copy=True)
        for scale, pairs in added:
            if name in pairs:
                fused += _product(pairs[name]).reshape(fused.shape) * (scale * pairs[name].factor)
        return fused

    return checkpoint._replace(state_dict=LazyStateDict(shapes_of(tensors), make))


def _pairs(file: SafetensorsFile, read: LoraFile, places: Mapping[tuple[Component, str], Factors]) -> Pairs:
    tensors = _tensors(file, (name for factors in places.values() for name in factors.names))
    pairs: dict[Component, dict[str, Pair]] = {}
    try:
        settings = _settings(read)
        for (component, weight), factors in places.items():
            down, up = tensors[factors.down], tensors[factors.up]
            alpha = None if factors.alpha is None else float(tensors[factors.alpha])
            rank = max(1, down.shape[0])
            factor = factor_of(alpha, rank, settings, component, weight.removesuffix(".weight"))
            pairs.setdefault(component, {})[weight] = Pair(down, up, factor)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, re.error) as error:
        raise CheckpointError(
            "How strongly the LoRA changes its layers cannot be told.",
            given=f"{read.described}: {' '.join(str(error).split())[:_QUOTED]}",
            advice="Have its trainer save it again: an alpha is one number a layer, and PEFT's settings are the "
            "adapter_config.json that PEFT writes.",
        ) from error
    return pairs


def _settings(read: LoraFile) -> Settings:
    """Returns PEFT's settings that are with a file. Raises ValueError, TypeError or OSError where they are none."""
    beside = read.peft_settings
    if beside is None or not beside.is_file():
        return _object(read.metadata.get(_METADATA, "{}"))
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


def _tensors(file: SafetensorsFile, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Returns tensors of a file; an alpha may be a whole number."""
    every = tuple(names)
    whole = [name for name in every if name.endswith(".alpha") and file.info(name).dtype.startswith(("I", "U"))]
    tensors = map_tensors(file, (name for name in every if name not in whole))
    return tensors | {name: torch.tensor(file.array(name)) for name in whole}


def _notices(read: LoraFile) -> tuple[str, ...]:
    notices = []
    if words := read.inversions:
        notices.append(
            f"{read.path.name}: the textual inversion packed with the LoRA is left out, as bundles take none: "
            f"{', '.join(map(repr, words))} in a prompt is drawn as plain words."
        )
    unsaid = all(layer.alpha is None for layer in read.layers)
    if unsaid and read.peft_settings is not None and not read.peft_settings.is_file():
        notices.append(
            f"{read.path.name}: PEFT's adapter_config.json is not beside it, so alpha / rank is taken as 1: put the "
            "file that PEFT wrote with it into its folder."
        )
    return tuple(notices)


def _product(pair: Pair) -> torch.Tensor:
    up, down = (factor.to(torch.float32).flatten(1) for factor in (pair.up, pair.down))
    return up @ down
