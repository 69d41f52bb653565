"""Noise schedulers as tables: each step is a fixed linear combination, so running one needs no scheduler code.

The coefficients (:mod:`hidiff_runtime.sampling.scheduler_state` says of what) are taken from the real scheduler when a
bundle is built.

A table holds one sampler for many numbers of steps, their evaluations one run after another. A run that starts in the
middle of the timesteps, from a picture, differs from the stored one only in the few evaluations before its state is
full (often in none). These have rows of their own, found by how many evaluations came before. Each evaluation also has
the two weights by which the scheduler adds noise to a picture there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.format.safetensors import SafetensorsFile, write
from hidiff_runtime.sampling.scheduler_state import NOISE, Evaluation, FloatArray, Schedule
from hidiff_runtime.sampling.table_rows import Integers, Rows, broken

FORMAT = 2
"""Version of the file's layout."""

MOST_BYTES = 1 << 28
"""Of a table's arrays; PNDM's for every number of steps from 1 to 1000 are half of it."""


@dataclass(frozen=True, eq=False)
class EtaTerms:
    """How the rows change with DDIM's eta (formulas 12 and 16 of arXiv 2010.02502), one entry an evaluation.

    The noise's coefficient is ``eta * noise``. The rows hold eta 0; the direction pointing to the sample, which they
    contain, shrinks by ``sqrt(1 - eta**2 * share)``.

    Attributes:
        direction: the part of the next sample's row that shrinks, over sample and output: float64 ``[E, 2]``.
        share: the variance of the noise at eta 1 over that of the direction at eta 0: float64 ``[E]``.
        noise: the noise's standard deviation at eta 1: float64 ``[E]``.
    """

    direction: FloatArray
    share: FloatArray
    noise: FloatArray

    def apply(self, rows: FloatArray, evaluations: slice | Integers, eta: float) -> FloatArray:
        """Returns ``rows`` of ``evaluations`` at ``eta``, as a copy."""
        changed: FloatArray = rows.copy()
        kept = np.sqrt(np.maximum(0, 1 - eta**2 * self.share[evaluations]))
        changed[:, 0, :NOISE] -= (1 - kept)[:, None] * self.direction[evaluations]
        changed[:, 0, NOISE] = eta * self.noise[evaluations]
        return changed


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """One sampler for many numbers of steps. E counts the evaluations of all of them, C the numbers of steps.

    Attributes:
        sampler: its name.
        order: UNet evaluations per logical step, as the scheduler states it.
        steps: the numbers of steps, rising: int64 ``[C]``.
        first: each one's first evaluation, and E last: int64 ``[C + 1]``.
        init_noise_sigma: float64 ``[C]``.
        timesteps: float32 ``[E]``.
        input_scale: float64 ``[E]``.
        draws_noise: bool ``[E]``, at eta 0.
        noising: weights of a picture's latents and of noise, as `Evaluation.noising`: float64 ``[E, 2]``.
        rows: the coefficients of each evaluation.
        eta: set when the sampler takes an eta.
        origin: where the table comes from: scheduler class, its configuration, the library's version, and under
            ``left_out`` which numbers of steps the scheduler refused and why (JSON); under ``eta`` the one that its
            rows are of, where runs cannot choose it.

    Raises:
        BundleError: the arrays do not fit together.
    """

    sampler: str
    order: int
    steps: NDArray[np.int64]
    first: NDArray[np.int64]
    init_noise_sigma: FloatArray
    timesteps: NDArray[np.float32]
    input_scale: FloatArray
    draws_noise: NDArray[np.bool_]
    noising: FloatArray
    rows: Rows
    eta: EtaTerms | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        runs, total = len(self.steps), len(self.timesteps)
        expected = {
            "steps": (np.int64, (runs,)),
            "first": (np.int64, (runs + 1,)),
            "init_noise_sigma": (np.float64, (runs,)),
            "timesteps": (np.float32, (total,)),
            "input_scale": (np.float64, (total,)),
            "draws_noise": (np.bool_, (total,)),
            "noising": (np.float64, (total, 2)),
        }
        if self.eta is not None:
            shapes = {"direction": (total, 2), "share": (total,), "noise": (total,)}
            expected |= {f"eta_{name}": (np.float64, shape) for name, shape in shapes.items()}
        for name, array in self._arrays().items():
            dtype, shape = expected[name]
            if array.dtype != dtype or array.shape != shape:
                raise broken(f"{name} is {array.dtype} {array.shape}")
            if count_nonfinite(array):
                raise broken(f"{name} is not finite")
        if self.rows.places.shape[1] != total:
            raise broken(f"rows of {self.rows.places.shape[1]} evaluations for {total} timesteps")
        if self.rows.takes_noise(~self.draws_noise):
            raise broken("noise has a coefficient where none is drawn")
        if not 1 <= self.order <= total or not runs or not (np.diff(self.steps) > 0).all() or self.steps[0] < 1:
            raise broken(f"order {self.order}, steps {self.steps.tolist()}")
        if self.first[0] != 0 or self.first[-1] != total or not (np.diff(self.first) > 0).all():
            raise broken(f"first {self.first.tolist()} for {total} evaluations")
        if self.steps[-1] > total or ((self.steps - 1) * self.order >= np.diff(self.first)).any():
            raise broken(
                f"steps {self.steps.tolist()} of order {self.order} in {np.diff(self.first).tolist()} evaluations"
            )

    def schedule(self, steps: int, *, strength: float | None = None, eta: float = 0.0) -> Schedule:
        """Returns a run of ``steps`` steps as diffusers' pipelines count them.

        Args:
            strength: how much of the run a picture goes through, above 0 to 1: the last ``int(steps * strength)``
                steps, as ``get_timesteps`` of diffusers' image-to-image and inpainting pipelines has it. Left out, all.
            eta: DDIM's weight of the noise, 0 (none) to 1 (as much as DDPM).

        Raises:
            InputError: a number of steps that is not tabulated, a strength that leaves no step, or an eta the sampler
                does not take.
        """
        run = self._run_of(steps)
        skipped = 0 if strength is None else steps - _steps_at(steps, strength)
        span = slice(int(self.first[run]) + skipped * self.order, int(self.first[run + 1]))
        evaluations_at = np.arange(span.start, span.stop)
        behind = evaluations_at - span.start if skipped else np.full(len(evaluations_at), self.rows.depth)
        rows, draws = self.rows_at(evaluations_at, behind, eta)
        columns = (self.timesteps[span].tolist(), self.input_scale[span].tolist(), draws.tolist(), self.noising[span])
        evaluations = tuple(
            Evaluation(timestep, number // self.order, scale, draws, tuple(noising.tolist()), row)
            for number, (timestep, scale, draws, noising, row) in enumerate(zip(*columns, rows, strict=True))
        )
        logical = -(-len(evaluations) // self.order)
        return Schedule(self.sampler, int(steps), logical, float(self.init_noise_sigma[run]), evaluations)

    def rows_at(
        self, evaluations: Integers, behind: Integers, eta: float = 0.0
    ) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Returns the rows of single evaluations, float64 ``[n, 1 + K, 3 + K]``, and whether each draws noise, ``[n]``.

        Args:
            evaluations: which, as for `Rows.at`, and so is ``behind``.
            eta: DDIM's, as for `schedule`.

        Raises:
            InputError: an eta that the sampler does not take.
        """
        rows = self.rows.at(evaluations, behind)
        if eta != 0 and not self._has_settled(eta):
            return self._eta_terms(eta).apply(rows, evaluations, eta), np.ones(len(evaluations), np.bool_)
        return rows, self.draws_noise[evaluations]

    def write(self, path: str | os.PathLike[str]) -> str:
        """Writes the table as safetensors and returns the file's SHA-256.

        Raises:
            StorageError: the disk refuses.
        """
        metadata = {"format": str(FORMAT), "sampler": self.sampler, "order": str(self.order)}
        arrays = {**self._arrays(), "rows": self.rows.distinct, "places": self.rows.places}
        return write(path, arrays, {**self.origin, **metadata})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SamplerTable:
        """Reads what `write` wrote.

        Raises:
            BundleError: missing, damaged, of a newer format, or no sampler table.
        """
        with SafetensorsFile.open(path) as file:
            metadata = dict(file.metadata)
            size = sum(file.info(name).nbytes for name in file)
            if size > MOST_BYTES:
                raise broken(f"{path}: {size} bytes, expected at most {MOST_BYTES}")
            arrays = {name: np.array(array) for name, array in file.arrays().items()}
        version = metadata.pop("format", "")
        if version != str(FORMAT):
            raise BundleError(
                "This is not a sampler table that this version reads.",
                given=f"{path}: format {version or 'missing'}, expected {FORMAT}",
                advice="Update hidiff-runtime, or build the bundle again.",
            )
        _check_origin(metadata, path)
        eta = {name: arrays.pop(f"eta_{name}") for name in ("direction", "share", "noise") if f"eta_{name}" in arrays}
        try:
            rows = Rows(arrays.pop("rows"), arrays.pop("places"))
            sampler, order = metadata.pop("sampler"), int(metadata.pop("order"))
            return cls(sampler, order, **arrays, rows=rows, eta=EtaTerms(**eta) if eta else None, origin=metadata)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise broken(f"{path}: {error}") from error

    def _arrays(self) -> dict[str, NDArray[Any]]:
        names = ("steps", "first", "init_noise_sigma", "timesteps", "input_scale", "draws_noise", "noising")
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in names}
        if self.eta is not None:
            arrays |= {f"eta_{name}": getattr(self.eta, name) for name in ("direction", "share", "noise")}
        return arrays

    def _run_of(self, steps: int) -> int:
        whole = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)
        found = np.flatnonzero(self.steps == steps)
        if not whole or not len(found):
            refusal = json.loads(self.origin.get("left_out", "{}")).get(str(steps))
            other = "" if refusal else ", or build the bundle with this number"
            raise InputError(
                f"The sampler {self.sampler} has no table for this number of steps.",
                given=f"{steps} ({refusal})" if refusal else steps,
                advice=f"Ask for {_ranges(self.steps.tolist())} steps{other}.",
            )
        return int(found[0])

    def _has_settled(self, eta: float) -> bool:
        """Returns whether the rows are those of this eta already, as of a sampler whose timesteps depend on it (TCD's).

        Raises InputError where they are another eta's.
        """
        settled = self.origin.get("eta")
        if settled is None or eta == float(settled):
            return settled is not None
        raise InputError(
            f"The table of the sampler {self.sampler} was built with another eta.",
            given=f"{eta}, and {settled} in the bundle",
            advice=f"Leave eta out, or build the bundle with --set {self.sampler}_eta={eta}.",
        )

    def _eta_terms(self, eta: float) -> EtaTerms:
        if self.eta is None:
            raise InputError(
                f"The sampler {self.sampler} takes no eta.",
                given=eta,
                advice="Leave eta at 0, or use the sampler ddim.",
            )
        if not 0 <= eta <= 1:
            raise InputError("This eta is out of range.", given=eta, advice="Use 0 (no noise) to 1 (as much as DDPM).")
        return self.eta


def _check_origin(origin: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Raises BundleError unless what a table says of where it comes from is what `SamplerTable.origin` holds."""
    for key in ("config", "left_out"):
        if key in origin and not isinstance(_parsed(origin[key]), dict):
            raise broken(f"{path}: {key} is no JSON object: {origin[key][:80]!r}")
    if "eta" in origin and type(_parsed(origin["eta"])) not in (int, float):
        raise broken(f"{path}: eta is no number: {origin['eta'][:80]!r}")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _steps_at(steps: int, strength: float) -> int:
    """Returns how many of ``steps`` are run at a strength."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float, np.floating)) or not 0 <= strength <= 1:
        raise InputError(
            "strength must be a number above 0, up to 1.", given=repr(strength), advice="Give 0.6, say: 1 keeps least."
        )
    left = min(int(steps * strength), steps)
    if left < 1:
        raise InputError(
            "This strength leaves no step to run.",
            given=f"{strength} of {steps} steps",
            advice=f"Give a strength of {math.ceil(1000 / steps) / 1000} or more, or ask for more steps.",
        )
    return left


def _ranges(numbers: list[int]) -> str:
    """Returns ``1 to 5, 8`` for 1, 2, 3, 4, 5, 8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
