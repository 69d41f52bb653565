"""How far a candidate is from its reference at one boundary, and whether that is near enough.

Every figure is computed in float64. A NaN, a missing output or a wrong shape is never averaged away: it fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.format.codec import Fields
from hidiff_runtime.format.record_codec import LATER, OMITTED, AnyText, FloatOrInf, decode, encode
from hidiff_runtime.verification.image_metrics import psnr, ssim

Array = NDArray[Any]


@dataclass(frozen=True)
class Bound:
    """What a measured error must keep to, and why that and no other figure.

    Args:
        snr_db: least signal-to-noise ratio, in decibels.
        reason: why this much.
        rtol: with ``atol``, every element must keep ``|candidate - reference| <= atol + rtol * |reference|``.
        atol: see ``rtol``.
        psnr_db: of a picture, the least peak signal-to-noise ratio, in decibels.
        ssim: of a picture, the least structural similarity.
    """

    snr_db: float
    rtol: float | None = field(default=None, kw_only=True)
    atol: float | None = field(default=None, kw_only=True)
    psnr_db: float | None = field(default=None, kw_only=True, metadata=LATER)
    ssim: float | None = field(default=None, kw_only=True, metadata=LATER)
    reason: str

    @property
    def elementwise(self) -> bool:
        """Whether each element is bounded too."""
        return self.rtol is not None or self.atol is not None

    def excess(self, reference: Array, candidate: Array) -> float | None:
        """Returns the largest share used of the elementwise allowance, at most 1 if within; ``None`` without one."""
        if not self.elementwise:
            return None
        error = np.abs(candidate - reference)
        allowed = (self.atol or 0.0) + (self.rtol or 0.0) * np.abs(reference)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(error == 0, 0.0, error / allowed)
        return float(share.max(initial=0.0))

    def __str__(self) -> str:
        demands = [f"{self.snr_db:g} dB"]
        demands += [] if self.psnr_db is None else [f"PSNR {self.psnr_db:g} dB"]
        demands += [] if self.ssim is None else [f"SSIM {self.ssim:g}"]
        return ", ".join(demands)


@dataclass(frozen=True)
class Metrics:
    """Distance between two arrays.

    Args:
        snr_db: ``10 log10(sum(reference^2) / sum((candidate - reference)^2))``; infinite when they are equal.
        max_abs: largest absolute difference.
        cosine: of the angle between them as vectors; 1 when they are equal.
        excess: share used of the bound's elementwise allowance, if it has one.
        psnr_db: of a picture, see :mod:`hidiff_runtime.verification.image_metrics`.
        ssim: likewise.
    """

    snr_db: FloatOrInf
    max_abs: float
    cosine: float
    excess: FloatOrInf | None = None
    psnr_db: FloatOrInf | None = field(default=None, metadata=LATER)
    ssim: float | None = field(default=None, metadata=LATER)

    @classmethod
    def of(cls, reference: Array, candidate: Array, bound: Bound | None = None) -> Metrics:
        """Measures two finite arrays of one shape."""
        expected = np.asarray(reference, dtype=np.float64).ravel()
        found = np.asarray(candidate, dtype=np.float64).ravel()
        difference = found - expected
        signal, noise, power = (float(np.dot(x, x)) for x in (expected, difference, found))
        if noise == 0:
            snr_db, cosine = math.inf, 1.0
        else:
            snr_db = 10 * math.log10(signal / noise) if signal else -math.inf
            norms = math.sqrt(signal) * math.sqrt(power)
            cosine = float(np.dot(expected, found)) / norms if norms else 0.0
        excess = None if bound is None else bound.excess(expected, found)
        return cls(snr_db, float(np.abs(difference).max(initial=0.0)), cosine, excess)


@dataclass(frozen=True)
class Verdict:
    """One comparison: what was measured, beside its bound.

    Args:
        boundary: what was compared with what, for example ``engine against reference``.
        bound: what it must keep to.
        metrics: what was measured; ``None`` if there was nothing to measure.
        phase: name of the phase, if it was one call.
        step: logical step, if it was one.
        steps: of the run the step belongs to.
        fault: why there is nothing to measure: a NaN, a missing output, a wrong shape, an engine that failed.
        bucket: size and batch that it is of, where a bundle has several.
    """

    boundary: str
    bound: Bound
    metrics: Metrics | None
    phase: str | None = None
    step: int | None = None
    steps: int | None = None
    fault: AnyText = ""
    bucket: str = field(default="", metadata=OMITTED)

    @property
    def ok(self) -> bool:
        """Whether the candidate is near enough."""
        metrics, bound = self.metrics, self.bound
        if self.fault or metrics is None or not metrics.snr_db >= bound.snr_db:
            return False
        for found, least in ((metrics.psnr_db, bound.psnr_db), (metrics.ssim, bound.ssim)):
            if least is not None and (found is None or not found >= least):
                return False
        return not bound.elementwise or (metrics.excess is not None and metrics.excess <= 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the verdict as JSON values; an infinite ratio is the text ``inf`` or ``-inf``."""
        return {"ok": self.ok, **encode(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "verdict") -> Verdict:
        """Reads what :meth:`to_dict` wrote; ``ok`` is judged anew.

        Raises:
            BundleError: a field is missing, unknown or of a wrong type.
        """
        fields = Fields(data, source)
        fields.flag("ok")
        return decode(cls, fields)


def compare(
    boundary: str,
    reference: Array,
    candidate: Array | None,
    bound: Bound,
    *,
    phase: str | None = None,
    step: int | None = None,
    steps: int | None = None,
) -> Verdict:
    """Compares ``candidate`` with ``reference`` (any shape, any real type); ``None`` is a missing output."""
    fault = _fault(np.asarray(reference), candidate)
    metrics = None if fault or candidate is None else Metrics.of(reference, candidate, bound)
    return Verdict(boundary, bound, metrics, phase, step, steps, fault)


def compare_image(
    boundary: str, reference: Array, candidate: Array | None, bound: Bound, *, steps: int | None = None
) -> Verdict:
    """Compares pictures ``[batch, 3, height, width]`` from 0 to 1: their PSNR and SSIM are measured too."""
    verdict = compare(boundary, reference, candidate, bound, steps=steps)
    if verdict.metrics is None or candidate is None:
        return verdict
    alike = {"psnr_db": psnr(reference, candidate), "ssim": ssim(reference, candidate)}
    return replace(verdict, metrics=replace(verdict.metrics, **alike))


def _fault(reference: Array, candidate: Array | None) -> str:
    if candidate is None:
        return "missing output"
    if candidate.shape != reference.shape:
        return f"expected shape {list(reference.shape)}, got {list(candidate.shape)}"
    if not reference.size:
        return "nothing to compare"
    for name, values in (("reference", reference), ("candidate", candidate)):
        if bad := count_nonfinite(values):
            return f"the {name} has {bad} of {values.size} values that are NaN or infinite"
    return ""


def render(verdicts: Iterable[Verdict]) -> str:
    """Returns the verdicts as a plain-text table, one line each under a heading; with buckets where there are any."""
    judged = tuple(verdicts)
    rows: list[Sequence[str]] = [("boundary", "phase", "step", "SNR dB", "bound", "max abs", "cosine", "result")]
    rows += [_row(verdict) for verdict in judged]
    right = [False, False, True, True, True, True, True, False]
    if any(verdict.bucket for verdict in judged):
        buckets = ("bucket", *(verdict.bucket for verdict in judged))
        rows = [(bucket, *row) for bucket, row in zip(buckets, rows, strict=True)]
        right = [False, *right]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(
        [*lines, *(f"{verdict.boundary}: {text}" for verdict in judged if (text := image_summary(verdict)))]
    )


def image_summary(verdict: Verdict) -> str:
    """Returns a picture's PSNR, SSIM and largest pixel difference, and what they must be; empty for anything else."""
    metrics, bound = verdict.metrics, verdict.bound
    if metrics is None or metrics.psnr_db is None or metrics.ssim is None:
        return ""
    least = [f" (at least {value:g})" if value is not None else "" for value in (bound.psnr_db, bound.ssim)]
    return (
        f"PSNR {metrics.psnr_db:.1f} dB{least[0]}, SSIM {metrics.ssim:.6f}{least[1]}, "
        f"largest pixel difference {metrics.max_abs:.1e} of 1"
    )


def _row(verdict: Verdict) -> Sequence[str]:
    metrics = verdict.metrics
    step = "" if verdict.step is None else f"{verdict.step + 1}/{verdict.steps}"
    figures = ("", "", "")
    if metrics is not None:
        figures = (f"{metrics.snr_db:.1f}", f"{metrics.max_abs:.2e}", f"{metrics.cosine:.9f}")
    result = "ok" if verdict.ok else f"FAILED {verdict.fault}".rstrip()
    bound = f">= {verdict.bound.snr_db:.0f}"
    return (verdict.boundary, verdict.phase or "", step, figures[0], bound, figures[1], figures[2], result)
