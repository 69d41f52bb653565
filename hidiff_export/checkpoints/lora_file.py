"""What a LoRA file holds by its tensors' names and its header: each layer's two factors, the rest, and who wrote it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from hidiff_export.checkpoints.state_dict import Shapes
from hidiff_runtime.format.safetensors import SafetensorsFile

PEFT_PREFIX = "base_model.model."
"""What PEFT's own files put before the names of whatever model was wrapped."""

_FACTOR = re.compile(
    r"(.+?)(?:\.lora_(?:(down|A)|(?:up|B))(?:\.\w+)?|[._]lora(?:_linear_layer)?\.(?:(down)|up))\.weight"
)
"""A factor: ``.lora_down.weight`` of kohya, LyCORIS and OneTrainer, ``.lora_A.weight`` of diffusers and PEFT, which may
name the adapter, and ``_lora.down.weight``, ``.lora.down.weight``, ``.lora_linear_layer.down.weight`` of diffusers
before PEFT."""

_ALPHA = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
_EMBEDDING = re.compile(r"bundle_emb\.(.+?)(?:\.string_to_param)?\.[^.]+")
_BASE_MODEL = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
_QUOTED = 80
"""Longest text that is quoted from a header."""


_NAMINGS = {
    re.escape(PEFT_PREFIX): "under PEFT's names",
    r"lycoris_": "under LyCORIS's names",
    r"lora_(unet|te\d?|transformer|prior)_": "under kohya's names",
    r".*\.lora_[AB]\.": "under diffusers' names",
    r".*[._]lora(_linear_layer)?\.(down|up)\.": "under diffusers' names from before PEFT",
}
"""Whose names those of tensors are that begin like this."""


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


class LoraFile(NamedTuple):
    """What is known of a file before its tensors are read.

    Args:
        path: of the file.
        shapes: of its tensors.
        metadata: of its header.
        layers: the factors of each layer.
        embeddings: the names of tensors of textual inversions that are packed with the LoRA.
        rest: the names of all other tensors: half a layer, an alpha without a layer, another method's, unknown ones.
    """

    path: Path
    shapes: Shapes
    metadata: Mapping[str, str]
    layers: tuple[Factors, ...]
    embeddings: tuple[str, ...]
    rest: tuple[str, ...]

    @classmethod
    def of(cls, file: SafetensorsFile) -> LoraFile:
        """Sorts a file's tensors by their names."""
        shapes = {name: file.info(name).shape for name in file.names()}
        embeddings = tuple(name for name in shapes if _EMBEDDING.fullmatch(name))
        halves: dict[str, dict[bool, str]] = {}
        alphas: dict[str, str] = {}
        for name in shapes:
            if match := _FACTOR.fullmatch(name):
                # Where a layer is there twice, in two forms, the earlier one is among the rest.
                halves.setdefault(match[1], {})[bool(match[2] or match[3])] = name
            elif match := _ALPHA.fullmatch(name):
                alphas[match[1]] = name
        layers = tuple(
            Factors(stem, pair[True], pair[False], alphas.get(stem)) for stem, pair in halves.items() if len(pair) == 2
        )
        used = {name for layer in layers for name in layer.names}.union(embeddings)
        rest = tuple(name for name in shapes if name not in used)
        return cls(file.path, shapes, file.metadata, layers, embeddings, rest)

    @property
    def described(self) -> str:
        """Its name, who wrote it, and what its header says it is for."""
        stated = next((self.metadata[key] for key in _BASE_MODEL if self.metadata.get(key)), "")
        base = " ".join(stated.split())[:_QUOTED]
        said = f", for {base!r} by its header" if base else ""
        return f"{self.path.name}, {trainer_of(self.shapes, self.metadata)}{said}"

    @property
    def peft_settings(self) -> Path | None:
        """Where PEFT keeps the settings of a LoRA that it wrote itself; None for other writers."""
        by_peft = any(name.startswith(PEFT_PREFIX) for name in self.shapes)
        return self.path.parent / "adapter_config.json" if by_peft else None

    @property
    def inversions(self) -> tuple[str, ...]:
        """The words that the packed textual inversions stand for."""
        matches = (_EMBEDDING.fullmatch(name) for name in self.embeddings)
        return tuple(dict.fromkeys(match[1] for match in matches if match))


def trainer_of(names: Collection[str], metadata: Mapping[str, str]) -> str:
    """Returns who wrote a file, from its header, else how its tensors are named.

    Args:
        names: of its tensors.
        metadata: of its header.
    """
    module = metadata.get("ss_network_module", "")
    if any(key.startswith("ot_") for key in metadata):
        return "written by OneTrainer"
    if module.startswith("lycoris"):
        return "written by LyCORIS in kohya's trainer"
    if module:
        return "written by kohya's trainer"
    named = (how for pattern, how in _NAMINGS.items() if any(re.match(pattern, name) for name in names))
    return next(named, "under dotted names of its own")
