"""How a LoRA file's tensors belong together: the two factors of each layer, its alpha, and what belongs to none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_FACTOR = re.compile(
    r"(.+?)(?:\.lora_(?:(down|A)|(?:up|B))(?:\.\w+)?|[._]lora(?:_linear_layer)?\.(?:(down)|up))\.weight"
)
"""A factor: ``.lora_down.weight`` of kohya, LyCORIS and OneTrainer, ``.lora_A.weight`` of diffusers and PEFT, which may
name the adapter, and ``_lora.down.weight``, ``.lora.down.weight``, ``.lora_linear_layer.down.weight`` of diffusers
before PEFT."""

_ALPHA = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
_EMBEDDING = re.compile(r"bundle_emb\.(.+?)(?:\.string_to_param)?\.[^.]+")


class Factors(NamedTuple):
    """The tensors that a file has for one layer, by their names.

    Args:
        stem: the layer's name in the file.
        down: the factor that the inputs go through.
        up: the factor after it.
        alpha: of the layer, None where the file has none.
    """

    stem: str
    down: str
    up: str
    alpha: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its tensors."""
        return tuple(name for name in (self.down, self.up, self.alpha) if name is not None)


class Contents(NamedTuple):
    """What a LoRA file holds.

    Args:
        layers: the factors of each layer.
        embeddings: the names of tensors of textual inversions that are packed with the LoRA.
        rest: the names of all other tensors: half a layer, an alpha without a layer, another method's, unknown ones.
    """

    layers: tuple[Factors, ...]
    embeddings: tuple[str, ...]
    rest: tuple[str, ...]


def contents_of(names: Iterable[str]) -> Contents:
    """Sorts a file's tensors by their names."""
    every = tuple(names)
    embeddings = tuple(name for name in every if _EMBEDDING.fullmatch(name))
    halves: dict[str, dict[bool, str]] = {}
    alphas: dict[str, str] = {}
    for name in every:
        if match := _FACTOR.fullmatch(name):
            # Where a layer is there twice, in two forms, the earlier one is among the rest.
            halves.setdefault(match[1], {})[bool(match[2] or match[3])] = name
        elif match := _ALPHA.fullmatch(name):
            alphas[match[1]] = name
    layers = tuple(
        Factors(stem, pair[True], pair[False], alphas.get(stem)) for stem, pair in halves.items() if len(pair) == 2
    )
    used = {name for layer in layers for name in layer.names}.union(embeddings)
    return Contents(layers, embeddings, tuple(name for name in every if name not in used))


def embedded_inversions(contents: Contents) -> tuple[str, ...]:
    """Returns the words that the packed textual inversions stand for."""
    matches = (_EMBEDDING.fullmatch(name) for name in contents.embeddings)
    return tuple(dict.fromkeys(match[1] for match in matches if match))
