"""A small network that names the subject of a picture; its features tell how far pictures are apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

SIDE = 64
"""Side in pixels that pictures of every size are brought to: large enough to tell 200 subjects."""

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_WIDTHS = (32, 48, 64, 96)
_GROUPS = 8


class Classifier(nn.Module):
    """Convolutions to a hundred features, and a score for each label.

    Args:
        labels: what there is to tell apart.
    """

    def __init__(self, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.labels = labels
        blocks: list[nn.Module] = []
        inner = 3
        for width in _WIDTHS:
            blocks += [_Block(inner, width)]
            inner = width
        self.blocks = nn.Sequential(*blocks)
        self.scores = nn.Linear(inner, len(labels))

    def features(self, pictures: Tensor) -> Tensor:
        """Returns float32 ``[batch, features]`` of pictures ``[batch, 3, height, width]`` from 0 to 1 of any size."""
        small = functional.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        computed: Tensor = self.blocks(small * 2 - 1)
        return computed.amax((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns a score for each label, float32 ``[batch, labels]``."""
        scores: Tensor = self.scores(self.features(pictures))
        return scores

    def save(self, folder: Path) -> None:
        """Writes weights in float16 and the labels."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps({"labels": self.labels}, indent=1, ensure_ascii=False) + "\n", "utf-8")
        save_file({name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}, folder / _WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Reads what `save` wrote, ready to compute in float32."""
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text("utf-8"))
        network = cls(tuple(config["labels"]))
        network.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / _WEIGHTS).items()})
        return network.eval()


class _Block(nn.Module):
    """Halves height and width."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inner, width, 3, stride=2, padding=1)
        self.first = nn.GroupNorm(_GROUPS, width)
        self.same = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.GroupNorm(_GROUPS, width)

    def forward(self, values: Tensor) -> Tensor:
        values = functional.silu(self.first(self.down(values)))
        return values + functional.silu(self.second(self.same(values)))


def is_classifier(folder: Path) -> bool:
    """Returns whether `Classifier.save` wrote this folder, or something that names labels likewise."""
    try:
        return "labels" in json.loads((folder / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False
