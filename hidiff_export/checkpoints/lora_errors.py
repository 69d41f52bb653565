"""Why a file cannot be fused as a LoRA, in words that say what it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hidiff_export.checkpoints.lora_fit import families_like, families_with_layers
from hidiff_export.checkpoints.lora_keys import Contents
from hidiff_export.checkpoints.lora_methods import (
    kind_of_file,
    layer_of_method,
    other_architecture,
    other_methods,
    stated_base,
    trainer_of,
)
from hidiff_export.checkpoints.state_dict import Shapes
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width

_SHOWN = 4
"""How many names of tensors a message has; of layers that do not fit half of that, as each comes with its reason."""


class LoraFile(NamedTuple):
    """What is known of a file before its tensors are read.

    Args:
        path: of the file.
        shapes: of its tensors.
        metadata: of its header.
        contents: its tensors, sorted.
    """

    path: Path
    shapes: Shapes
    metadata: Mapping[str, str]
    contents: Contents

    @property
    def described(self) -> str:
        """Its name, who wrote it, and what its header says it is for."""
        base = stated_base(self.metadata)
        said = f", for {base!r} by its header" if base else ""
        return f"{self.path.name}, {trainer_of(self.shapes, self.metadata)}{said}"


def require_low_rank(file: LoraFile, task: Task) -> None:
    """Raises CheckpointError unless a file is a LoRA, and every tensor belongs to a layer of it.

    Args:
        file: given as a LoRA.
        task: of the UNet that it is for.
    """
    methods = other_methods(file.shapes)
    if methods:
        raise _of_another_method(file, task, methods)
    kind = None if file.contents.layers else kind_of_file(file.shapes)
    if kind is not None:
        raise CheckpointError(
            f"The file is {kind.title}, not a LoRA.",
            given=f"{file.path.name}: {_count(file.shapes)}",
            advice=kind.advice,
        )
    if file.contents.layers and not file.contents.rest:
        return
    rest = _count(file.contents.rest, len(file.shapes))
    if not file.contents.layers:
        raise CheckpointError(
            "The file holds no LoRA that is known here.",
            given=f"{file.path.name}: {rest}",
            advice="Give a .safetensors file as kohya's trainer, OneTrainer or diffusers' save_lora_weights writes it.",
        )
    raise CheckpointError(
        "The LoRA holds tensors that change no weight.",
        given=f"{file.described}: {rest}",
        advice="Get the file again, or have its trainer save it again: it may be cut short or merged from several.",
    )


def wrong_family(file: LoraFile, family: Family, task: Task, width: Width, problems: Sequence[str]) -> CheckpointError:
    """Returns the refusal of a LoRA with layers that fit no weight.

    Args:
        file: of the LoRA.
        family: wanted; ``task`` and ``width`` likewise.
        problems: of its layers, from `fit_of`.
    """
    layers = file.contents.layers
    wanted = f"{family.value} at {width.value} width"
    owner = other_architecture(layer.stem for layer in layers)
    likely, fits = (owner, True) if owner else families_like(file.contents, file.shapes, task)
    advice = (
        f"Give a LoRA that was trained on {family.value}: bundles are made of Stable Diffusion's UNets alone."
        if owner
        else "Give a LoRA that was trained on the recipe's family, or set the recipe's family to the LoRA's."
    )
    if 2 * len(problems) < len(layers) and not fits:
        summary = f"Most layers of the LoRA fit {wanted}, but not all."
        advice = "Give a LoRA for this very UNet; one for inpainting, say, may have another conv_in."
    elif likely:
        summary = f"The LoRA is not for {wanted}: it looks like {likely}{'' if fits else ' for the most part'}."
    else:
        summary = f"The LoRA is not for {wanted}: it fits no family known here."
    return CheckpointError(
        summary,
        given=f"{file.described}: {len(problems)} of {len(layers)} layers do not fit: {_some(problems, _SHOWN // 2)}",
        advice=advice,
    )


def changed_twice(file: LoraFile, twice: Sequence[str]) -> CheckpointError:
    """Returns the refusal of a LoRA that holds the same layers twice.

    Args:
        file: of the LoRA.
        twice: from `fit_of`.
    """
    return CheckpointError(
        "The LoRA changes weights twice, under two names.",
        given=f"{file.described}: {len(twice)} of {len(file.contents.layers)} layers: {_some(twice, _SHOWN // 2)}",
        advice="It seems to be two files in one: give each by itself, with a --lora of its own.",
    )


def _of_another_method(file: LoraFile, task: Task, methods: Mapping[str, str]) -> CheckpointError:
    found = " and ".join(sorted(set(methods.values())))
    stems = tuple({layer_of_method(name) for name in methods})
    likely = other_architecture(stems) or families_with_layers(stems, task)
    return CheckpointError(
        f"The file holds {found}, which cannot be fused: only plain LoRA and LoCon can.",
        given=f"{file.described}{f', looks like {likely}' if likely else ''}: {_count(methods, len(file.shapes))}",
        advice="Train or export it as plain LoRA, or merge it into the checkpoint with its trainer's tools and give "
        "the result as --source.",
    )


def _count(names: Iterable[str], of: int | None = None) -> str:
    every = list(names)
    total = len(every) if of is None else of
    return f"{len(every)}{'' if of is None else f' of {of}'} tensor{'s' * (total != 1)}: {_some(every)}"


def _some(items: Sequence[str], limit: int = _SHOWN) -> str:
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
