"""LoRA files fused into a checkpoint's weights: W + scale * (alpha / rank) * up @ down, a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hidiff_export.errors import BundleError, CheckpointError
from hidiff_export.families import Family, Task, Width, text_encoder_configs
from hidiff_export.model.component import Component
from hidiff_export.model.load import Checkpoint
from hidiff_export.model.lora_names import Pair, Pairs, other_methods, pairs_of
from hidiff_export.model.state_dict import LazyStateDict, Shapes, map_tensors, shapes_of
from hidiff_runtime.manifest import FileRecord
from hidiff_runtime.safetensors import SafetensorsFile

_SHOWN = 4


@dataclass(frozen=True)
class Lora:
    """A LoRA file that fits a model.

    Args:
        path: of the file.
        scale: what its additions are multiplied by, beside each one's own alpha over rank.
        pairs: the factors of each addition, by network and by the weight's name.
    """

    path: Path
    scale: float
    pairs: Mapping[Component, Mapping[str, Pair]]


def lora_fingerprint(path: Path) -> str:
    """SHA-256 of a LoRA file. Raises CheckpointError when it cannot be read."""
    try:
        return FileRecord.of(path).sha256
    except OSError as error:
        raise CheckpointError(
            "A LoRA file cannot be read.", given=f"{path}: {error.strerror}", advice="Check the path."
        ) from error


def read_lora(path: Path, scale: float, family: Family, task: Task, width: Width = Width.FULL) -> Lora:
    """Reads a LoRA and finds a weight for every tensor in it; the tensors are mapped and not copied.

    Args:
        path: of a ``.safetensors`` file under kohya's, diffusers' or PEFT's names.
        scale: of its additions.
        family: what it has to be for; ``task`` and ``width`` likewise.

    Raises:
        CheckpointError: the file is missing, damaged, holds something else than LoRA (DoRA, LoHa, …), or any of its
            tensors fits no weight of the family's UNet and text encoders; nothing is left out silently.
    """
    tensors, metadata = _read(path)
    if others := other_methods(tensors):
        methods = sorted(set(others.values()))
        raise _refusal("The file holds more than LoRA, which cannot be fused.", path, methods, list(others))
    try:
        pairs, lone = pairs_of(tensors, metadata)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, re.error) as error:
        reason = f"{path.name}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError("diffusers cannot tell what the LoRA changes.", given=reason, advice=_OTHER) from error
    if lone or not pairs:
        names = [f"{len(lone)} of {len(tensors)} tensors"] if pairs else ["no pair of lora_down and lora_up"]
        raise _refusal("The LoRA holds tensors that change no weight.", path, names, lone)
    fitting, problems = _fit(pairs, _shapes(family, task, width))
    if problems:
        likely = _families_like(pairs, task)
        raise CheckpointError(
            f"The LoRA is not for {family.value} at {width.value} width: "
            f"it {'looks like ' + likely if likely else 'fits no family known here'}.",
            given=f"{path.name}: {len(problems)} of {len(pairs)} layers do not fit: {_some(problems)}",
            advice="Give a LoRA that was trained on the recipe's family.",
        )
    return Lora(path, scale, fitting)


def fuse(component: Component, checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """A checkpoint with the additions of every LoRA in its weights, computed in float32 when a tensor is looked up.

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


_OTHER = "Save it as kohya's trainer or diffusers' save_lora_weights does, or give another file."


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    try:
        file = SafetensorsFile.open(path)
    except BundleError as error:
        raise CheckpointError(error.summary, given=error.given, advice=error.advice) from error
    with file:
        whole = [name for name in file if name.endswith(".alpha") and file.info(name).dtype.startswith(("I", "U"))]
        tensors = map_tensors(file, (name for name in file.names() if name not in whole))
        return tensors | {name: torch.tensor(file.array(name)) for name in whole}, file.metadata


def _product(pair: Pair) -> torch.Tensor:
    up, down = (factor.to(torch.float32).flatten(1) for factor in (pair.up, pair.down))
    return up @ down


@cache
def _shapes(family: Family, task: Task, width: Width) -> dict[Component, Shapes]:
    text = [Component(name) for name in text_encoder_configs(family, width)]
    return {part: part.shapes(part.config(family, task, width)) for part in (Component.UNET, *text)}


def _fit(pairs: Pairs, shapes: Mapping[Component, Shapes]) -> tuple[dict[Component, dict[str, Pair]], list[str]]:
    """The pairs by the name of the weight that each fits, and what keeps the others from fitting any."""
    fitting: dict[Component, dict[str, Pair]] = {}
    problems = []
    for (component, module), pair in pairs.items():
        weight = _weight(module, shapes.get(component, {}))
        if weight is None:
            problems.append(f"{pair.names[0]} (there is no such layer)")
            continue
        wanted = shapes[component][weight]
        if fault := _fault(pair, wanted):
            problems.append(f"{pair.names[0]} ({fault} for {list(wanted)})")
        fitting.setdefault(component, {})[weight] = pair
    return fitting, problems


def _weight(module: str, shapes: Shapes) -> str | None:
    """The weight of a module; transformers has put ``text_model.`` before a text encoder's names, and taken it away."""
    bare = module.removeprefix("text_model.")
    names = (f"{module}.weight", f"{bare}.weight", f"text_model.{bare}.weight")
    return next((name for name in names if name in shapes), None)


def _fault(pair: Pair, wanted: tuple[int, ...]) -> str:
    """What is wrong with the factors' shapes for a weight; a linear layer and a 1x1 convolution are alike."""
    down, up = tuple(pair.down.shape), tuple(pair.up.shape)
    linear = wanted + (1, 1) * (len(wanted) == 2)
    as_given = [shape + (1, 1) * (len(shape) == 2) for shape in (down, up)]
    rank = as_given[0][0] if down else 0
    if len(wanted) not in (2, 4) or as_given != [(rank, *linear[1:]), (linear[0], rank, 1, 1)]:
        return f"down {list(down)}, up {list(up)}"
    return ""


def _families_like(pairs: Pairs, task: Task) -> str:
    matches: dict[Width, list[str]] = {}
    for width in Width:
        for family in Family:
            if not _fit(pairs, _shapes(family, task, width))[1]:
                matches.setdefault(width, []).append(family.value)
    return "; ".join(f"{' or '.join(names)} at {width.value} width" for width, names in matches.items())


def _refusal(what: str, path: Path, found: Iterable[str], names: Sequence[str]) -> CheckpointError:
    return CheckpointError(what, given=f"{path.name}: {', '.join(found)}: {_some(names)}", advice=_OTHER)


def _some(items: Iterable[Any]) -> str:
    shown = list(items)
    rest = len(shown) - _SHOWN
    return ", ".join(map(str, shown[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
