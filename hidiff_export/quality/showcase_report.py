"""What HiDiffusion does for a checkpoint: pictures at the size that it was trained at, and larger without and with it.

Pictures of different sizes have no pixels in common, so the larger sets are measured by what a network sees: how far
from the set at the training size, and how often what was asked for. The bundle is measured against PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hidiff_export.families.family import PIXELS_PER_LATENT
from hidiff_export.files import storage_errors, write_json
from hidiff_export.quality.contenders import BundleContender, Contender, DiffusersContender, Shot
from hidiff_export.quality.distances import Interval, psnr, set_distance
from hidiff_export.quality.features import FeatureModel
from hidiff_export.quality.scoring import PICTURES, Progress, draw_all, features_of, subject_of
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.atomic_write import atomic_write
from hidiff_runtime.format.bundle_folder import LinksOption
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.contact_sheet import Cell, contact_sheet, spread

Array = NDArray[Any]

TRAINED, STOCK, PYTORCH, BUNDLE = "training size", "stock", "hidiffusion", "bundle"
"""The contenders' names, in the order of a sheet's columns; a fifth shows how far the last two are apart."""

AMPLIFIED = 16
"""How many times a difference is enlarged on the sheet, for eyes to see it."""

REPORT, SHEET = "showcase.json", "showcase.png"
FILES = (REPORT, SHEET, PICTURES)
"""What a showcase's folder holds."""

FEWEST_APART = 24
"""Pictures that a set of other sizes needs for a distance: below, its interval says nothing."""

_ROWS = 6
_SIDE = 256
"""Of a picture on the sheet, in pixels: whole times the sides that checkpoints are trained at and drawn at."""


@dataclass(frozen=True)
class ShowcaseRow:
    """What was measured of one contender's pictures.

    Args:
        name: one of `TRAINED`, `STOCK`, `PYTORCH` and `BUNDLE`.
        origin: where they come from, for people.
        size: their width and height in pixels.
        named: what the feature model takes each for; empty texts where it names nothing.
        retrieval: the share, 0 to 1, that shows what was asked for; None where nothing tells.
        distance: of the set to that at the training size, in thousandths; None without a feature model, or for fewer
            pictures than `FEWEST_APART`.
        psnr: of each picture to PyTorch's, in dB; empty for all but the bundle.
    """

    name: str
    origin: str
    size: tuple[int, int]
    named: tuple[str, ...]
    retrieval: float | None
    distance: Interval | None
    psnr: tuple[float, ...] = ()


@dataclass(frozen=True)
class Showcase:
    """All pictures of a showcase, in a folder, and what was measured of them."""

    folder: Path
    shots: tuple[Shot, ...]
    settings: dict[str, Any]
    rows: tuple[ShowcaseRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns everything measured."""
        prompts = [{"prompt": shot.prompt, "seed": shot.seed} for shot in self.shots]
        return {"settings": self.settings, "prompts": prompts, "contenders": [asdict(row) for row in self.rows]}

    def save(self) -> None:
        """Writes JSON and the sheet into the folder that the pictures are in already.

        Raises:
            StorageError: one of them cannot be written.
        """
        with storage_errors(self.folder):
            write_json(self.folder / REPORT, self.to_json())
            with atomic_write(self.folder / SHEET) as file:
                self.sheet().save(file, format="PNG", optimize=True)

    def picture(self, name: str, index: int) -> Array:
        """Returns a contender's picture of a shot, uint8 ``[height, width, 3]``."""
        with Image.open(self.folder / PICTURES / name / f"{index:03}.png") as image:
            return np.asarray(image.convert("RGB"))

    def sheet(self) -> Image.Image:
        """Returns up to six prompts, a row each: the contenders side by side, and how far bundle and PyTorch are apart.

        Pixels that are enlarged whole times stay squares, lest the training size look softer than it is.
        """
        cells: list[Cell | None] = []
        for index in spread(len(self.shots), _ROWS):
            for row in self.rows:
                shown = Image.fromarray(self.picture(row.name, index))
                cells.append(Cell(_sharp(shown), self._caption(row, index)))
            apart = np.abs(self.picture(BUNDLE, index).astype(int) - self.picture(PYTORCH, index))
            image = Image.fromarray((AMPLIFIED * apart).clip(0, 255).astype(np.uint8))
            cells.append(Cell(image, f"difference x {AMPLIFIED}: at most {apart.max()} of 255"))
        return contact_sheet(cells, columns=len(self.rows) + 1, side=_SIDE)

    def _caption(self, row: ShowcaseRow, index: int) -> str:
        seen = f" ({row.named[index]})" if row.named[index] else ""
        width, height = row.size
        if row.name == TRAINED:
            return f"{self.shots[index].prompt}, seed {self.shots[index].seed}: {width}x{height}{seen}"
        if row.name == BUNDLE:
            return f"bundle: {row.psnr[index]:.1f} dB to PyTorch{seen}"
        return f"{width}x{height} {'without' if row.name == STOCK else 'with'} HiDiffusion, PyTorch{seen}"


def training_size(recipe: Recipe) -> tuple[int, int]:
    """Returns the width and height in pixels that checkpoints of a recipe's family and width were trained at."""
    side = int(recipe.unet_config()["sample_size"]) * PIXELS_PER_LATENT
    return side, side


def contenders_of(
    bundle: Path, manifest: Manifest, source: str, trained: tuple[int, int], allow_links: LinksOption = ()
) -> tuple[Contender, ...]:
    """Returns who draws, in the order of a sheet's columns.

    Args:
        bundle: to draw with; its size is the larger one.
        manifest: of it.
        source: the checkpoint that it was built of, for diffusers.
        trained: the training size, width and height in pixels.
        allow_links: as for opening a bundle.
    """
    large = (manifest.width, manifest.height)
    return (
        DiffusersContender(TRAINED, source, bundle, False, allow_links, trained),
        DiffusersContender(STOCK, source, bundle, False, allow_links, large),
        DiffusersContender(PYTORCH, source, bundle, True, allow_links, large),
        BundleContender(BUNDLE, bundle, allow_links),
    )


def draw_showcase(
    contenders: Sequence[Contender],
    shots: Sequence[Shot],
    steps: Sequence[int],
    model: FeatureModel | None,
    folder: Path,
    progress: Progress,
) -> tuple[ShowcaseRow, ...]:
    """Draws every shot with every contender, keeps the pictures below ``folder`` and measures them.

    Args:
        contenders: as `contenders_of` gives them.
        shots: what to draw.
        steps: of each shot, for progress.
        model: that features come from, if there is one.
        folder: that pictures are kept in.
        progress: told how many steps of all are done.

    Raises what the contenders' `draw` raises, and StorageError when a picture cannot be written.
    """
    rows: list[ShowcaseRow] = []
    trained: Tensor | None = None
    reference: list[Array] = []
    for contender, pictures in draw_all(contenders, shots, steps, folder, progress):
        features = None if model is None else features_of(pictures, model)
        trained = features if contender.name == TRAINED else trained
        reference = pictures if contender.name == PYTORCH else reference
        apart = [psnr(*pair) for pair in zip(pictures, reference, strict=True)] if contender.name == BUNDLE else []
        named, retrieval = _seen(model, features, shots)
        rows.append(
            ShowcaseRow(
                contender.name,
                contender.origin,
                (pictures[0].shape[1], pictures[0].shape[0]),
                named,
                retrieval,
                set_distance(features, trained)
                if features is not None and trained is not None and len(shots) >= FEWEST_APART
                else None,
                tuple(apart),
            )
        )
    return tuple(rows)


def _seen(
    model: FeatureModel | None, features: Tensor | None, shots: Sequence[Shot]
) -> tuple[tuple[str, ...], float | None]:
    """Returns what the model takes the pictures for, and the share of those that show what was asked for."""
    if model is None or features is None:
        return ("",) * len(shots), None
    named = tuple(model.named(features))
    asked = [subject_of(shot.prompt, model.labels) for shot in shots]
    right = [name == wanted for name, wanted in zip(named, asked, strict=True) if wanted is not None]
    return named, fmean(right) if right else None


def _sharp(image: Image.Image) -> Image.Image:
    """Returns a picture enlarged whole times, as far as a sheet's cell has room."""
    factor = max(1, _SIDE // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def table_rows(showcase: Showcase) -> Iterator[tuple[str, ...]]:
    """Yields the cells of a table for people: pictures, size, right subject, distance, PSNR."""
    for row in showcase.rows:
        distance = row.distance
        yield (
            row.name,
            f"{row.size[0]}x{row.size[1]}",
            "" if row.retrieval is None else f"{row.retrieval:.0%}",
            "" if distance is None else f"{distance.value:.2f} ({distance.low:.2f} to {distance.high:.2f})",
            f"{fmean(row.psnr):.1f}" if row.psnr else "",
        )
