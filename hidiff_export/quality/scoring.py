"""Every contender's pictures beside the first one's, for the same prompts and seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hidiff_export.errors import InputError
from hidiff_export.files import storage_errors
from hidiff_export.quality.contenders import Contender, Shot
from hidiff_export.quality.distances import FEWEST, Interval, feature_distances, psnr, set_distance, ssim
from hidiff_export.quality.features import FeatureModel
from hidiff_runtime.pipeline.image_processing import pillow

Array = NDArray[Any]
Progress = Callable[[float, float, str], None]

_AT_ONCE = 8
"""Pictures that features are computed of together, so that large ones take little memory."""

PICTURES = "pictures"
"""The folder of the single pictures, below the report's."""


@dataclass(frozen=True)
class PictureScores:
    """One picture beside the reference's of the same shot.

    Args:
        prompt: of both.
        seed: of both.
        psnr: in dB, 100 where they are equal.
        ssim: 1 where they are equal.
        feature_distance: 0 where the feature model sees the same.
        named: what the feature model takes the picture for; empty where it names nothing.
        right: whether that is what the prompt asked for; None where it asks for nothing that the model knows.
    """

    prompt: str
    seed: int
    psnr: float
    ssim: float
    feature_distance: float
    named: str
    right: bool | None


@dataclass(frozen=True)
class ContenderScores:
    """Everything measured of one contender; the reference's own has no distances but 0.

    Args:
        name: of the contender.
        origin: where its pictures come from.
        pictures: in the shots' order.
        set_distance: of all its pictures to the reference's, in thousandths; None for fewer than `FEWEST`.
    """

    name: str
    origin: str
    pictures: tuple[PictureScores, ...]
    set_distance: Interval | None

    def mean(self, metric: str) -> float:
        """Returns the mean of one of the metrics over the pictures."""
        return fmean(getattr(picture, metric) for picture in self.pictures)

    @property
    def retrieval(self) -> float | None:
        """The share of pictures, 0 to 1, that show what was asked for; None where nothing tells."""
        told = [picture.right for picture in self.pictures if picture.right is not None]
        return fmean(told) if told else None


def compare(
    contenders: Sequence[Contender],
    shots: Sequence[Shot],
    steps: Sequence[int],
    model: FeatureModel,
    folder: Path,
    progress: Progress,
) -> tuple[ContenderScores, ...]:
    """Draws every shot with every contender, one after another, and measures them against the first.

    Args:
        contenders: the reference first.
        shots: what to draw.
        steps: of each shot, for progress.
        model: that features come from.
        folder: that pictures are kept in, below `PICTURES`.
        progress: told how many steps of all are done.

    Raises:
        InputError: pictures differ in size, as where a checkpoint draws another.
        StorageError: a picture cannot be written.
    """
    scores: list[ContenderScores] = []
    reference: tuple[list[Array], Tensor] | None = None
    for contender, pictures in draw_all(contenders, shots, steps, folder, progress):
        features = features_of(pictures, model)
        if reference is None:
            reference = (pictures, features)
        scores.append(_scores(contender, shots, (pictures, features), reference, model))
    return tuple(scores)


def draw_all(
    contenders: Sequence[Contender], shots: Sequence[Shot], steps: Sequence[int], folder: Path, progress: Progress
) -> Iterator[tuple[Contender, list[Array]]]:
    """Yields each contender with its pictures of the shots, once they lie below ``folder``; arguments as for `compare`.

    Raises what the contenders' `draw` raises, and StorageError when a picture cannot be written.
    """
    done, total = 0, len(contenders) * sum(steps)
    for contender in contenders:

        def stepped(name: str = contender.name) -> None:
            nonlocal done
            done += 1
            progress(min(done, total), total, name)

        yield contender, list(_kept(contender.draw(shots, stepped), folder / PICTURES / contender.name))


def features_of(pictures: Sequence[Array], model: FeatureModel) -> Tensor:
    """Returns what a model sees in pictures of one size, float32 ``[pictures, features]``."""
    parts = range(0, len(pictures), _AT_ONCE)
    return torch.cat([model.features(pictures[first : first + _AT_ONCE]) for first in parts])


def _kept(pictures: Iterable[Array], folder: Path) -> Iterable[Array]:
    for index, picture in enumerate(pictures):
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            pillow().fromarray(picture).save(folder / f"{index:03}.png")
        yield picture


def _scores(
    contender: Contender,
    shots: Sequence[Shot],
    drawn: tuple[list[Array], Tensor],
    reference: tuple[list[Array], Tensor],
    model: FeatureModel,
) -> ContenderScores:
    pictures, features = drawn
    for one, other in zip(pictures, reference[0], strict=True):
        if one.shape != other.shape:
            sizes = ", ".join(f"{shape[1]}x{shape[0]}" for shape in (other.shape, one.shape))
            raise InputError(
                "Pictures of other sizes cannot be compared.", given=sizes, advice="Give bundles of one size."
            )
    distances = feature_distances(features, reference[1])
    rows = []
    for index, (shot, named) in enumerate(zip(shots, model.named(features), strict=True)):
        asked = subject_of(shot.prompt, model.labels)
        rows.append(
            PictureScores(
                shot.prompt,
                shot.seed,
                psnr(pictures[index], reference[0][index]),
                ssim(pictures[index], reference[0][index]),
                distances[index],
                named,
                None if asked is None else named == asked,
            )
        )
    apart = set_distance(features, reference[1]) if len(shots) >= FEWEST else None
    return ContenderScores(contender.name, contender.origin, tuple(rows), apart)


def subject_of(prompt: str, labels: Sequence[str]) -> str | None:
    """Returns the label that a prompt asks for: the longest that it begins with, but for articles and sizes."""
    words = re.sub(r"^(an?|the|small|large)\s+", "", re.sub(r"^(an?|the)\s+", "", prompt.lower().strip()))
    found = [label for label in labels if re.match(rf"{re.escape(label)}\b", words)]
    return max(found, key=len, default=None)
