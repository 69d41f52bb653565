"""What a comparison of pictures found: a table for people, Markdown, JSON, and a sheet to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidiff_export.files import storage_errors, write_json
from hidiff_export.quality.distances import Interval
from hidiff_export.quality.scoring import PICTURES, ContenderScores
from hidiff_runtime.format.atomic_write import atomic_write
from hidiff_runtime.pipeline.contact_sheet import Cell, contact_sheet, spread

if TYPE_CHECKING:
    from rich.table import Table

REPORT, MARKDOWN, SHEET = "quality.json", "quality.md", "quality.png"
FILES = (REPORT, MARKDOWN, SHEET, PICTURES)
"""What a report's folder holds."""

_ROWS = 8
"""Prompts on a sheet."""
_SIDE = 224
_HEADINGS = ("pictures of", "PSNR dB", "SSIM", "feature distance", "set distance x 1000", "right subject")


@dataclass(frozen=True)
class QualityReport:
    """All contenders, the reference first.

    Args:
        features: the model that features come from.
        settings: what every picture was drawn with: size, steps, sampler, guidance.
        contenders: what was measured of each.
    """

    features: str
    settings: dict[str, Any]
    contenders: tuple[ContenderScores, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns everything measured, with the means that people are shown."""
        contenders = []
        for scores in self.contenders:
            means = {metric: scores.mean(metric) for metric in ("psnr", "ssim", "feature_distance")}
            contenders.append({**asdict(scores), "mean": means, "retrieval": scores.retrieval})
        return {"reference": self.contenders[0].name, **asdict(self), "contenders": contenders}

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table's cells under `_HEADINGS`, as text."""
        return [_row(scores, first=index == 0) for index, scores in enumerate(self.contenders)]

    def table(self) -> Table:
        """Returns the table that people are shown."""
        from rich.table import Table

        table = Table(*_HEADINGS)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows():
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Returns the table and how it was made as Markdown."""
        count = len(self.contenders[0].pictures)
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [
            f"# {count} pictures beside those of {self.contenders[0].name}",
            "",
            f"{told}. Features: {self.features}.",
            "",
            f"| {' | '.join(_HEADINGS)} |",
            f"|{' --- |' * len(_HEADINGS)}",
            *(f"| {' | '.join(row)} |" for row in self.rows()),
            "",
            *(f"- {scores.name}: {scores.origin}" for scores in self.contenders),
        ]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Writes JSON, Markdown and the sheet into the folder that the pictures are in already.

        Raises:
            StorageError: one of them cannot be written.
        """
        with storage_errors(folder):
            write_json(folder / REPORT, self.to_json())
            with atomic_write(folder / MARKDOWN) as file:
                file.write(self.markdown().encode())
            with atomic_write(folder / SHEET) as file:
                _sheet(self.contenders, folder).save(file, format="PNG")


def _row(scores: ContenderScores, *, first: bool) -> tuple[str, ...]:
    retrieval = "" if scores.retrieval is None else f"{scores.retrieval:.0%}"
    if first:
        return (scores.name, "reference", "", "", "", retrieval)
    return (
        scores.name,
        f"{scores.mean('psnr'):.1f}",
        f"{scores.mean('ssim'):.3f}",
        f"{scores.mean('feature_distance'):.4f}",
        _interval(scores.set_distance),
        retrieval,
    )


def _interval(value: Interval | None) -> str:
    return "" if value is None else f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _sheet(contenders: Sequence[ContenderScores], folder: Path) -> Any:
    from PIL import Image

    cells: list[Cell | None] = []
    for index in spread(len(contenders[0].pictures), _ROWS):
        for place, scores in enumerate(contenders):
            picture = scores.pictures[index]
            figures = f"{picture.psnr:.1f} dB" if place else f"{picture.prompt}, seed {picture.seed}"
            seen = f" ({picture.named})" if picture.named else ""
            with Image.open(folder / PICTURES / scores.name / f"{index:03}.png") as image:
                cells.append(Cell(image.copy(), f"{scores.name}: {figures}{seen}"))
    return contact_sheet(cells, columns=len(contenders), side=_SIDE)
