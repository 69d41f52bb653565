"""Which weight each layer of a LoRA file changes, and which families a file fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.lora_keys import Contents, Factors
from hidiff_export.checkpoints.lora_layers import Layers, layers_of
from hidiff_export.checkpoints.state_dict import Shapes
from hidiff_export.families.family import Family, Task, Width


class Fit(NamedTuple):
    """How a file fits a family.

    Args:
        places: the layers that fit, by network and by the weight's name.
        problems: what keeps each of the others from fitting.
        twice: layers that fit, but change a weight that one of `places` changes.
    """

    places: Mapping[tuple[Component, str], Factors]
    problems: tuple[str, ...]
    twice: tuple[str, ...]


def fit_of(contents: Contents, shapes: Shapes, layers: Layers) -> Fit:
    """Finds the weight of every layer.

    Args:
        contents: of the file.
        shapes: of its tensors.
        layers: of the family.
    """
    places: dict[tuple[Component, str], Factors] = {}
    problems, twice = [], []
    for factors in contents.layers:
        place = layers.find(factors.stem)
        if place is None:
            unclear = layers.is_ambiguous(factors.stem)
            problems.append(f"{factors.down} ({'of which text encoder?' if unclear else 'there is no such layer'})")
        elif fault := _fault(shapes[factors.down], shapes[factors.up], layers.shapes[place[0]][place[1]]):
            problems.append(f"{factors.down} ({fault})")
        elif place in places:
            twice.append(f"{factors.down} (as {places[place].down})")
        else:
            places[place] = factors
    return Fit(places, tuple(problems), tuple(twice))


def families_like(contents: Contents, shapes: Shapes, task: Task) -> tuple[str, bool]:
    """Returns the families that fit more of a file's layers than others and no less than half, and whether they fit
    all.
    """
    wrong = {kind: len(fit_of(contents, shapes, layers).problems) for kind, layers in _every_family(task)}
    least = min(wrong.values())
    if 2 * least >= len(contents.layers):
        return "", False
    return _listed(kind for kind, count in wrong.items() if count == least), not least


def families_with_layers(stems: tuple[str, ...], task: Task) -> str:
    """Returns the families that have all of these layers by name, whatever their shapes; empty when there are none."""
    found = (kind for kind, layers in _every_family(task) if all(layers.find(stem) for stem in stems))
    return _any_of(list(dict.fromkeys(family.value for family, _ in found)))


def _every_family(task: Task) -> Iterator[tuple[tuple[Family, Width], Layers]]:
    for width in Width:
        for family in Family:
            yield (family, width), layers_of(family, task, width)


def _listed(kinds: Iterator[tuple[Family, Width]]) -> str:
    by_width: dict[Width, list[str]] = {}
    for family, width in kinds:
        by_width.setdefault(width, []).append(family.value)
    return "; ".join(f"{_any_of(names)} at {width.value} width" for width, names in by_width.items())


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _fault(down: tuple[int, ...], up: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Returns what is wrong with the factors' shapes for a weight; a linear layer and a 1x1 convolution are alike."""
    linear = wanted + (1, 1) * (len(wanted) == 2)
    as_given = [shape + (1, 1) * (len(shape) == 2) for shape in (down, up)]
    rank = as_given[0][0] if down else 0
    if len(wanted) not in (2, 4) or as_given != [(rank, *linear[1:]), (linear[0], rank, 1, 1)]:
        return f"down {list(down)}, up {list(up)} for {list(wanted)}"
    return ""
