"""Which weight each layer of a LoRA file changes, and what is said of a file that cannot be fused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.contents import listed
from hidiff_export.checkpoints.lora_file import Factors, LoraFile
from hidiff_export.checkpoints.lora_layers import Layers, layers_of
from hidiff_export.checkpoints.lora_methods import kind_of_file, layer_of_method, other_architecture, other_methods
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width, widths_of

_REASONS = 2
"""How many layers that do not fit a message names, each with its reason."""


class _Fit(NamedTuple):
    """How a file fits a family: layers by what they change, why others fit nothing, and which change a weight again."""

    places: dict[tuple[Component, str], Factors]
    problems: list[str]
    twice: list[str]


def places_of(file: LoraFile, family: Family, task: Task, width: Width) -> Mapping[tuple[Component, str], Factors]:
    """Returns the layers of a LoRA by the network and the weight that each changes.

    Args:
        file: given as a LoRA.
        family: what it has to be for; ``task`` and ``width`` likewise.

    Raises:
        CheckpointError: the file is no LoRA, or a tensor of it changes no weight of this family, or one twice.
    """
    _require_low_rank(file, task)
    places, problems, twice = _fit_of(file, layers_of(family, task, width))
    if problems:
        raise _wrong_family(file, family, task, width, problems)
    if twice:
        raise CheckpointError(
            "The LoRA changes weights twice, under two names.",
            given=f"{file.described}: {len(twice)} of {len(file.layers)} layers: {listed(twice, _REASONS)}",
            advice="It seems to be two files in one: give each by itself, with a --lora of its own.",
        )
    return places


def _fit_of(file: LoraFile, layers: Layers) -> _Fit:
    fit = _Fit({}, [], [])
    for factors in file.layers:
        place = layers.find(factors.stem)
        if place is None:
            unclear = layers.is_ambiguous(factors.stem)
            fit.problems.append(f"{factors.down} ({'of which text encoder?' if unclear else 'there is no such layer'})")
            continue
        mismatch = _mismatch(file.shapes[factors.down], file.shapes[factors.up], layers.shapes[place[0]][place[1]])
        if mismatch:
            fit.problems.append(f"{factors.down} ({mismatch})")
        elif place in fit.places:
            fit.twice.append(f"{factors.down} (as {fit.places[place].down})")
        else:
            fit.places[place] = factors
    return fit


def _require_low_rank(file: LoraFile, task: Task) -> None:
    """Raises CheckpointError unless a file is a LoRA, and every tensor belongs to a layer of it."""
    methods = other_methods(file.shapes)
    if methods:
        raise _of_another_method(file, task, methods)
    kind = None if file.layers else kind_of_file(file.shapes)
    if kind is not None:
        raise CheckpointError(
            f"The file is {kind.what}, not a LoRA.",
            given=f"{file.path.name}: {_count(file.shapes)}",
            advice=kind.advice,
        )
    if file.layers and not file.rest:
        return
    rest = _count(file.rest, len(file.shapes))
    if not file.layers:
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


def _wrong_family(file: LoraFile, family: Family, task: Task, width: Width, problems: Sequence[str]) -> CheckpointError:
    layers = file.layers
    wanted = f"{family.value} at {width.value} width"
    owner = other_architecture(layer.stem for layer in layers)
    likely, fits = (owner, True) if owner else _families_like(file, task)
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
        given=f"{file.described}: {len(problems)} of {len(layers)} layers do not fit: {listed(problems, _REASONS)}",
        advice=advice,
    )


def _of_another_method(file: LoraFile, task: Task, methods: Mapping[str, str]) -> CheckpointError:
    found = " and ".join(sorted(set(methods.values())))
    stems = tuple({layer_of_method(name) for name in methods})
    likely = other_architecture(stems) or _families_with_layers(stems, task)
    return CheckpointError(
        f"The file holds {found}, which cannot be fused: only plain LoRA and LoCon can.",
        given=f"{file.described}{f', looks like {likely}' if likely else ''}: {_count(methods, len(file.shapes))}",
        advice="Train or export it as plain LoRA, or merge it into the checkpoint with its trainer's tools and give "
        "the result as --source.",
    )


def _count(names: Iterable[str], of: int | None = None) -> str:
    every = list(names)
    total = len(every) if of is None else of
    return f"{len(every)}{'' if of is None else f' of {of}'} tensor{'s' * (total != 1)}: {listed(every)}"


def _families_like(file: LoraFile, task: Task) -> tuple[str, bool]:
    """Returns the families that fit most of a file's layers, no less than half of them, and whether they fit all."""
    wrong = {kind: len(_fit_of(file, layers).problems) for kind, layers in _every_family(task)}
    least = min(wrong.values())
    if 2 * least >= len(file.layers):
        return "", False
    return _listed(kind for kind, count in wrong.items() if count == least), not least


def _families_with_layers(stems: tuple[str, ...], task: Task) -> str:
    """Returns the families that have all of these layers by name, whatever their shapes; empty when there are none."""
    found = (kind for kind, layers in _every_family(task) if all(layers.find(stem) for stem in stems))
    return _any_of(list(dict.fromkeys(family.value for family, _ in found)))


def _every_family(task: Task) -> Iterator[tuple[tuple[Family, Width], Layers]]:
    for family in Family:
        for width in widths_of(family):
            yield (family, width), layers_of(family, task, width)


def _listed(kinds: Iterator[tuple[Family, Width]]) -> str:
    by_width: dict[Width, list[str]] = {}
    for family, width in kinds:
        by_width.setdefault(width, []).append(family.value)
    return "; ".join(f"{_any_of(names)} at {width.value} width" for width, names in by_width.items())


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _mismatch(down: tuple[int, ...], up: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Returns what is wrong with the factors' shapes for a weight; a linear layer and a 1x1 convolution are alike."""
    linear = wanted + (1, 1) * (len(wanted) == 2)
    as_given = [shape + (1, 1) * (len(shape) == 2) for shape in (down, up)]
    rank = as_given[0][0] if down else 0
    if len(wanted) not in (2, 4) or as_given != [(rank, *linear[1:]), (linear[0], rank, 1, 1)]:
        return f"down {list(down)}, up {list(up)} for {list(wanted)}"
    return ""
