"""What a verification found: a table for people, JSON and JUnit XML for machines, and the report in the bundle."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidiff_export.errors import StorageError
from hidiff_export.files import storage_errors, write_json
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.magnitudes import FLOAT16_MAX, RANGE, Magnitudes, figure
from hidiff_export.reference.tolerances import Boundary
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest
from hidiff_runtime.verification.comparison import Bound, Verdict, image_summary
from hidiff_runtime.verification.half_precision_note import GRAPHS

if TYPE_CHECKING:
    from rich.table import Table

    from hidiff_export.verification.side_by_side import SideBySide

REPORT = "parity/report.json"
MARKDOWN = "parity/report.md"
PICTURE = "parity/picture.png"


@dataclass(frozen=True)
class Check:
    """One verdict and how long it took to reach, in seconds, reference and candidate together."""

    verdict: Verdict
    seconds: float


@dataclass(frozen=True)
class GraphResults:
    """What the portable graphs were judged by, and what the engines' figures leave open.

    Args:
        arithmetic: ``float32``, ``float16`` or ``bfloat16``: what the graphs were computed in.
        engines_widen: whether the engines ran on a CPU that keeps float32 between half-precision operations; None where
            none ran.
    """

    arithmetic: Precision
    engines_widen: bool | None

    def notes(self) -> tuple[str, ...]:
        """Returns what people should know of it."""
        half = self.arithmetic.value
        full = self.arithmetic is Precision.FLOAT32
        rounded = "" if full else f", and every result rounded to {half} but those inside {_INSIDE}"
        notes = [f"Graphs: computed in float32, normalization and attention as engines do them{rounded}."]
        if self.engines_widen is None:
            notes.append("Engines: none ran, and no run was made with the bundle.")
        elif self.engines_widen and not full:
            notes.append(
                f"Engines: on the CPU, which keeps float32 between {half} operations; for a GPU's {half} arithmetic "
                "the graphs' figures speak, not the engines'."
            )
        return tuple(notes)


_INSIDE = "attention, normalization and the time projection"
_JUDGED = frozenset(boundary.value for boundary in Boundary if boundary.is_graph)


@dataclass(frozen=True)
class Report:
    """Everything one verification measured.

    Args:
        bundle: name of the bundle's folder.
        against: where the reference's weights came from: the bundle's own store, or a checkpoint source.
        reference: what computed the reference, for example ``PyTorch 2.13.0, float32``.
        candidate: what was judged, for example ``onnxruntime``.
        checks: in the order they were made.
        graphs: what the portable graphs were judged by.
        panels: the picture of the run, as the reference and as the candidate made it.
        magnitudes: the largest that the reference computed where the candidate computes in float16.
    """

    bundle: str
    against: str
    reference: str
    candidate: str
    checks: tuple[Check, ...]
    graphs: GraphResults
    panels: SideBySide | None = None
    magnitudes: Magnitudes = field(default_factory=Magnitudes)

    @property
    def ok(self) -> bool:
        """Whether there is at least one verdict, all hold, and float16 holds what has to be computed in it."""
        return bool(self.checks) and not self.failures and not self.magnitudes.beyond

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts alone."""
        return tuple(check.verdict for check in self.checks)

    @property
    def failures(self) -> tuple[Verdict, ...]:
        """The verdicts that do not hold."""
        return tuple(verdict for verdict in self.verdicts if not verdict.ok)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {
            "ok": self.ok,
            "bundle": self.bundle,
            "against": self.against,
            "reference": self.reference,
            "candidate": self.candidate,
            GRAPHS: {
                "arithmetic": self.graphs.arithmetic.value,
                "ok": all(verdict.ok for verdict in self.verdicts if verdict.boundary in _JUDGED),
                "notes": list(self.graphs.notes()),
            },
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "seconds": [round(check.seconds, 3) for check in self.checks],
            "magnitudes": self.magnitudes.to_dict() if self.magnitudes.largest else None,
            "notices": list(self.magnitudes.notices),
            "picture": None if self.panels is None else {"path": PICTURE, "amplified": self.panels.factor},
        }

    def to_junit(self) -> str:
        """Returns the report as JUnit XML: a test case for each verdict, a failure for each that does not hold."""
        suite = ET.Element(
            "testsuite",
            name=f"parity of {self.bundle}",
            tests=str(len(self.checks) + len(self.magnitudes.largest)),
            failures=str(len(self.failures) + sum(one.headroom < 1 for one in self.magnitudes.largest)),
            errors="0",
            time=f"{sum(check.seconds for check in self.checks):.3f}",
        )
        for check in self.checks:
            verdict = check.verdict
            named = {"classname": verdict.boundary, "name": _place(verdict)}
            case = ET.SubElement(suite, "testcase", named, time=f"{check.seconds:.3f}")
            if found := image_summary(verdict):
                ET.SubElement(case, "system-out").text = found
            if not verdict.ok:
                failure = ET.SubElement(case, "failure", message=_finding(verdict))
                failure.text = f"{_finding(verdict)}\nWhy this bound: {verdict.bound.reason}"
        for one in self.magnitudes.largest:
            case = ET.SubElement(suite, "testcase", classname=RANGE, name=one.graph, time="0.000")
            ET.SubElement(case, "system-out").text = str(one)
            if one.headroom < 1:
                ET.SubElement(case, "failure", message=f"{one}, beyond {figure(FLOAT16_MAX)}")
        ET.indent(suite)
        return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

    def to_markdown(self) -> str:
        """Returns the report as a Markdown page, with the reason of every bound below the table."""
        lines = [
            f"# Parity of {self.bundle}: {'holds' if self.ok else 'FAILED'}",
            "",
            f"Reference: {self.reference}; weights of {self.against}. Candidate: {self.candidate}.",
            "",
            "| boundary | phase | step | SNR dB | bound | max abs | cosine | result |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        lines += ["| " + " | ".join(_cells(verdict)) + " |" for verdict in self.verdicts]
        told = (*self.graphs.notes(), *self._likenesses, *self.magnitudes.lines, *self.magnitudes.notices)
        lines += ["", *(f"- {line}" for line in (*told, *reasons(self.verdicts)))]
        if self.panels is not None:
            lines += ["", f"![{self.panels.caption}]({Path(PICTURE).name})", "", f"{self.panels.caption}."]
        return "\n".join(lines) + "\n"

    @property
    def _likenesses(self) -> list[str]:
        """PSNR, SSIM and the largest pixel difference of each picture."""
        return [f"{verdict.boundary}: {text}" for verdict in self.verdicts if (text := image_summary(verdict))]

    def table(self) -> Table:
        """Returns the report as a table for the terminal."""
        from rich.table import Table

        caption = "\n".join((*self.graphs.notes(), *self._likenesses))
        table = Table(box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left")
        for name in ("boundary", "phase"):
            table.add_column(name)
        for name in ("step", "SNR dB", "bound", "max abs", "cosine"):
            table.add_column(name, justify="right")
        table.add_column("result")
        for verdict in self.verdicts:
            table.add_row(*_cells(verdict), style=None if verdict.ok else "bold red")
        return table


def reasons(verdicts: Iterable[Verdict]) -> tuple[str, ...]:
    """Returns each bound of the verdicts with its reason, once."""
    named: dict[Bound, list[str]] = {}
    for verdict in verdicts:
        names = named.setdefault(verdict.bound, [])
        if verdict.boundary not in names:
            names.append(verdict.boundary)
    return tuple(f"At least {bound} ({'; '.join(names)}): {bound.reason}" for bound, names in named.items())


def store(report: Report, folder: Path, *, verified: str | None = None) -> None:
    """Writes the report into the bundle at ``folder`` and into its manifest.

    The manifest first lets go of the report that was there and lists the new one last, so whenever this is cut short
    the bundle is whole, at worst without a report.

    Args:
        report: to write.
        folder: of the bundle.
        verified: digest of the bundle that the report is about; None does not look whether it is still there.

    Raises:
        StorageError: the folder cannot be written to, its files are symbolic links, which are not written through, or
            another bundle has come in its place.
    """
    _refuse_links(folder)
    manifest = Manifest.read(folder)
    if verified is not None and manifest.digest != verified:
        raise StorageError(
            "Another bundle came in the place of the one that was verified:",
            given=f"{manifest.digest[:12]} for {verified[:12]}",
            advice="Verify it again.",
        )
    kept = {path: record for path, record in manifest.files.items() if path not in (REPORT, MARKDOWN, PICTURE)}
    bare = manifest.whole.sharing(report=None, files=kept)
    with storage_errors(folder):
        write_json(folder / MANIFEST, bare.to_json())
        (folder / REPORT).parent.mkdir(exist_ok=True)
        write_json(folder / REPORT, report.to_dict())
        (folder / MARKDOWN).write_text(report.to_markdown(), encoding="utf-8")
        (folder / PICTURE).unlink(missing_ok=True)
        if report.panels is not None:
            report.panels.save(folder / PICTURE)
        paths = (REPORT, MARKDOWN, *(() if report.panels is None else (PICTURE,)))
        written = {path: FileDigest.of(folder / path) for path in paths}
        write_json(folder / MANIFEST, bare.sharing(report=REPORT, files={**kept, **written}).to_json())


def _refuse_links(folder: Path) -> None:
    """Raises StorageError where writing would reach through a link, into a cache or over anybody's file."""
    written = (MANIFEST, Path(REPORT).parent.as_posix(), REPORT, MARKDOWN, PICTURE)
    for path in (*written, f"{MANIFEST}.tmp", f"{REPORT}.tmp"):
        if (folder / path).is_symlink():
            raise StorageError(
                "What would be written over is a symbolic link, and what it leads to stays as it is:",
                given=folder / path,
                advice="To keep a report, copy the bundle whole (cp -rL) and verify the copy.",
            )


def _place(verdict: Verdict) -> str:
    parts = [verdict.phase or "all phases"]
    if verdict.step is not None:
        parts.append(f"step {verdict.step + 1} of {verdict.steps}")
    elif verdict.steps is not None:
        parts.append(f"{verdict.steps} steps")
    return ", ".join(parts)


def _finding(verdict: Verdict) -> str:
    if verdict.fault or verdict.metrics is None:
        return verdict.fault or "nothing was measured"
    found = image_summary(verdict)
    expected = f"expected at least {verdict.bound.snr_db:g} dB, got {verdict.metrics.snr_db:.1f} dB"
    return expected + (found and f"; {found}")


def _cells(verdict: Verdict) -> tuple[str, ...]:
    metrics = verdict.metrics
    step = "" if verdict.steps is None else f"{'all' if verdict.step is None else verdict.step + 1}/{verdict.steps}"
    snr_db, *distances = ("", "", "")
    if metrics is not None:
        snr_db, *distances = f"{metrics.snr_db:.1f}", f"{metrics.max_abs:.1e}", f"{metrics.cosine:.9f}"
    result = "ok" if verdict.ok else f"FAILED {verdict.fault}".rstrip()
    return (verdict.boundary, verdict.phase or "", step, snr_db, f"≥ {verdict.bound.snr_db:g}", *distances, result)
