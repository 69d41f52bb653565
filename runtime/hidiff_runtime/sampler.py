"""Noise schedulers as tables: each step is a fixed linear combination, so running one needs no scheduler code.

One evaluation of the UNet takes the vector ``u = (sample, model output, noise, state 0, …, state K-1)`` to
``(next sample, next state 0, …, next state K-1) = rows @ u``. The state is whatever latents-sized tensors the scheduler
keeps from one evaluation to the next (earlier outputs, a corrected sample), zeros when a run starts. The rows are taken
from the real scheduler when a bundle is built.

A file holds one sampler for many numbers of steps, their evaluations one run after another. A run that starts in the
middle of the timesteps differs from the stored one only in the few evaluations before its state is full, so such starts
are rows of their own beside these, found by how many evaluations came before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.safetensors import SafetensorsFile, write

FORMAT = 1
"""Version of the file's layout."""

FloatArray = NDArray[np.float64]
Latents = NDArray[np.float32]

SAMPLE, OUTPUT, NOISE, STATE = 0, 1, 2, 3
"""Columns of the rows: the sample, the model's output, the noise; the state begins at `STATE`."""


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

    def apply(self, rows: FloatArray, span: slice, eta: float) -> FloatArray:
        """The rows of these evaluations at ``eta``, as a copy."""
        changed: FloatArray = rows[span].copy()
        kept = np.sqrt(np.maximum(0, 1 - eta**2 * self.share[span]))
        changed[:, 0, :NOISE] -= (1 - kept)[:, None] * self.direction[span]
        changed[:, 0, NOISE] = eta * self.noise[span]
        return changed


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation of the UNet.

    Attributes:
        timestep: what the UNet is told.
        step: the logical denoising step it belongs to, from 0.
        input_scale: what the sample is multiplied with before it enters the UNet.
        draws_noise: whether the update after it takes fresh noise.
        rows: coefficients, float64 ``[1 + K, 3 + K]``.
    """

    timestep: float
    step: int
    input_scale: float
    draws_noise: bool
    rows: FloatArray


@dataclass(frozen=True, eq=False)
class Schedule:
    """A whole run; ``len()`` is its number of UNet evaluations.

    Attributes:
        sampler: its name.
        num_inference_steps: what was asked for, as diffusers' pipelines take it.
        steps: logical denoising steps, by which phases are chosen. Two evaluations of a second-order sampler are one
            step; PNDM's extra evaluation is a step, as diffusers' pipelines count it.
        init_noise_sigma: standard deviation of the noise that a run starts from.
        evaluations: in running order.
    """

    sampler: str
    num_inference_steps: int
    steps: int
    init_noise_sigma: float
    evaluations: tuple[Evaluation, ...]

    def __len__(self) -> int:
        return len(self.evaluations)

    def start(self, latents: Latents) -> SamplerState:
        """A run from standard normal noise, float32 of any shape; it is scaled by `init_noise_sigma` here.

        Raises:
            InputError: not float32.
        """
        _check("The initial latents", latents, np.shape(latents))
        return SamplerState(self, _scaled(latents, self.init_noise_sigma))


class SamplerState:
    """A run in progress. It never writes to an array it was given, nor to one it gave out.

    Attributes:
        latents: the current sample, float32; the result once `done`.
    """

    def __init__(self, schedule: Schedule, latents: Latents) -> None:
        self.latents = latents
        self._evaluations = schedule.evaluations
        self._index = 0
        self._zeros = np.zeros_like(latents)
        self._state = [self._zeros] * (schedule.evaluations[0].rows.shape[0] - 1)

    @property
    def done(self) -> bool:
        """Whether every evaluation has been used up."""
        return self._index == len(self._evaluations)

    @property
    def index(self) -> int:
        """How many evaluations are behind."""
        return self._index

    @property
    def timestep(self) -> float:
        """What the UNet is told at the evaluation to come."""
        return self._next.timestep

    @property
    def step(self) -> int:
        """The logical denoising step of the evaluation to come."""
        return self._next.step

    @property
    def draws_noise(self) -> bool:
        """Whether `advance` needs noise at the evaluation to come."""
        return self._next.draws_noise

    def model_input(self) -> Latents:
        """The sample as the UNet takes it."""
        return _scaled(self.latents, self._next.input_scale)

    def advance(self, model_output: Latents, noise: Latents | None = None) -> None:
        """Takes the UNet's output (after guidance) and moves to the next evaluation.

        Args:
            model_output: float32 of the latents' shape.
            noise: standard normal, float32 of the latents' shape, exactly when `draws_noise`.

        Raises:
            InputError: a wrong shape or dtype, noise missing or unasked for, or nothing left to do.
        """
        evaluation = self._next
        _check("The model's output", model_output, self.latents.shape)
        if noise is not None:
            _check("The noise", noise, self.latents.shape)
        if evaluation.draws_noise != (noise is not None):
            raise InputError(
                "This evaluation needs noise." if evaluation.draws_noise else "This evaluation takes no noise.",
                given=f"evaluation {self._index} {'without' if noise is None else 'with'} noise",
                advice="Draw noise exactly where draws_noise is true, so that the random stream stays in step.",
            )
        inputs = (self.latents, model_output, self._zeros if noise is None else noise, *self._state)
        self.latents, *self._state = (_combine(row, inputs) for row in evaluation.rows)
        self._index += 1

    @property
    def _next(self) -> Evaluation:
        if self.done:
            raise InputError("The run is over.", given=f"{self._index} evaluations", advice="Start another run.")
        return self._evaluations[self._index]


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
        rows: float64 ``[E, 1 + K, 3 + K]``.
        eta: set when the sampler takes an eta.
        origin: where the table comes from: scheduler class, its configuration, the library's version, and under
            ``left_out`` which numbers of steps the scheduler refused and why (JSON).

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
    rows: FloatArray
    eta: EtaTerms | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        runs, total, slots = len(self.steps), len(self.timesteps), self.rows.shape[-1] - STATE
        expected = {
            "steps": (np.int64, (runs,)),
            "first": (np.int64, (runs + 1,)),
            "init_noise_sigma": (np.float64, (runs,)),
            "timesteps": (np.float32, (total,)),
            "input_scale": (np.float64, (total,)),
            "draws_noise": (np.bool_, (total,)),
            "rows": (np.float64, (total, 1 + slots, STATE + slots)),
        }
        if self.eta is not None:
            shapes = {"direction": (total, 2), "share": (total,), "noise": (total,)}
            expected |= {f"eta_{name}": (np.float64, shape) for name, shape in shapes.items()}
        for name, array in self._arrays().items():
            dtype, shape = expected[name]
            if array.dtype != dtype or array.shape != shape:
                raise _broken(f"{name} is {array.dtype} {array.shape}")
            if not np.isfinite(array).all():
                raise _broken(f"{name} is not finite")
        if self.rows[~self.draws_noise, :, NOISE].any():
            raise _broken("noise has a coefficient where none is drawn")
        if self.order < 1 or not runs or not (np.diff(self.steps) > 0).all() or self.steps[0] < 1:
            raise _broken(f"order {self.order}, steps {self.steps.tolist()}")
        if self.first[0] != 0 or self.first[-1] != total or not (np.diff(self.first) > 0).all():
            raise _broken(f"first {self.first.tolist()} for {total} evaluations")

    def schedule(self, steps: int, *, eta: float = 0.0) -> Schedule:
        """A run of ``steps`` steps as diffusers' pipelines count them.

        Args:
            eta: DDIM's weight of the noise, 0 (none) to 1 (as much as DDPM).

        Raises:
            InputError: a number of steps that is not tabulated, or an eta the sampler does not take.
        """
        run = self._run_of(steps)
        span = slice(int(self.first[run]), int(self.first[run + 1]))
        rows, draws_noise = self.rows[span], self.draws_noise[span].tolist()
        if eta != 0:
            terms = self._eta_terms(eta)
            rows, draws_noise = terms.apply(self.rows, span, eta), [True] * len(draws_noise)
        columns = zip(self.timesteps[span].tolist(), self.input_scale[span].tolist(), draws_noise, rows, strict=True)
        evaluations = tuple(
            Evaluation(timestep, number // self.order, scale, draws, row)
            for number, (timestep, scale, draws, row) in enumerate(columns)
        )
        logical = -(-len(evaluations) // self.order)
        return Schedule(self.sampler, int(steps), logical, float(self.init_noise_sigma[run]), evaluations)

    def write(self, path: str | os.PathLike[str]) -> str:
        """Writes the table as safetensors and returns the file's SHA-256.

        Raises:
            StorageError: the disk refuses.
        """
        metadata = {"format": str(FORMAT), "sampler": self.sampler, "order": str(self.order)}
        return write(path, self._arrays(), {**self.origin, **metadata})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SamplerTable:
        """Reads what `write` wrote.

        Raises:
            BundleError: missing, damaged, of a newer format, or no sampler table.
        """
        with SafetensorsFile.open(path) as file:
            metadata = dict(file.metadata)
            arrays = {name: np.array(array) for name, array in file.arrays().items()}
        version = metadata.pop("format", "")
        if version != str(FORMAT):
            raise BundleError(
                "This is not a sampler table that this version reads.",
                given=f"{path}: format {version or 'missing'}, expected {FORMAT}",
                advice="Update hidiff-runtime, or build the bundle again.",
            )
        eta = {name: arrays.pop(f"eta_{name}") for name in ("direction", "share", "noise") if f"eta_{name}" in arrays}
        try:
            sampler, order = metadata.pop("sampler"), int(metadata.pop("order"))
            return cls(sampler, order, **arrays, eta=EtaTerms(**eta) if eta else None, origin=metadata)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _broken(f"{path}: {error}") from error

    def _arrays(self) -> dict[str, NDArray[Any]]:
        names = ("steps", "first", "init_noise_sigma", "timesteps", "input_scale", "draws_noise", "rows")
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in names}
        if self.eta is not None:
            arrays |= {f"eta_{name}": getattr(self.eta, name) for name in ("direction", "share", "noise")}
        return arrays

    def _run_of(self, steps: int) -> int:
        found = np.flatnonzero(self.steps == steps)
        if isinstance(steps, bool) or not len(found):
            refusal = json.loads(self.origin.get("left_out", "{}")).get(str(steps))
            other = "" if refusal else ", or build the bundle with this number"
            raise InputError(
                f"The sampler {self.sampler} has no table for this number of steps.",
                given=f"{steps} ({refusal})" if refusal else steps,
                advice=f"Ask for {_ranges(self.steps.tolist())} steps{other}.",
            )
        return int(found[0])

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


def _combine(row: FloatArray, inputs: Sequence[Latents]) -> Latents:
    """The weighted sum of float32 arrays, added up in float64."""
    total = np.zeros(inputs[0].shape)
    for weight, value in zip(row.tolist(), inputs, strict=True):
        if weight != 0:
            total += np.multiply(value, weight, dtype=np.float64)
    return total.astype(np.float32)


def _scaled(latents: Latents, scale: float) -> Latents:
    return np.multiply(latents, scale, dtype=np.float64).astype(np.float32)


def _check(what: str, array: Latents, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
        given = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{what} must be a float32 array of shape {shape}.", given=given)


def _ranges(numbers: list[int]) -> str:
    """``1 to 5, 8`` for 1, 2, 3, 4, 5, 8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def _broken(problem: str) -> BundleError:
    return BundleError("A sampler table is broken.", given=problem, advice="Build the bundle again.")
