"""A run's steps as fixed linear combinations, and a run in progress.

One evaluation of the UNet takes the vector ``u = (sample, model output, noise, state 0, …, state K-1)`` to
``(next sample, next state 0, …, next state K-1) = rows @ u``. The state is whatever latents-sized tensors the scheduler
keeps from one evaluation to the next (earlier outputs, a corrected sample), zeros when a run starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import InputError

FloatArray = NDArray[np.float64]
Latents = NDArray[np.float32]

SAMPLE, OUTPUT, NOISE, STATE = 0, 1, 2, 3
"""Columns of the rows: the sample, the model's output, the noise; the state begins at `STATE`."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation of the UNet.

    Attributes:
        timestep: what the UNet is told.
        step: the logical denoising step it belongs to, from 0.
        input_scale: what the sample is multiplied with before it enters the UNet.
        draws_noise: whether the update after it takes fresh noise.
        noising: weights of a picture's latents and of noise, whose sum is the picture noised as far as the sample is
            before this evaluation.
        rows: coefficients, float64 ``[1 + K, 3 + K]``.
        computed: whether the UNet is evaluated; if not, its output has no coefficient.
        shallow: whether its outermost layers alone are, on the deep features of an evaluation before.
    """

    timestep: float
    step: int
    input_scale: float
    draws_noise: bool
    noising: tuple[float, float]
    rows: FloatArray
    computed: bool = True
    shallow: bool = False


@dataclass(frozen=True, eq=False)
class Schedule:
    """A whole run; ``len()`` is its number of UNet evaluations.

    Attributes:
        sampler: its name.
        num_inference_steps: what was asked for, as diffusers' pipelines take it.
        steps: logical denoising steps that are run, by which phases are chosen: fewer than asked for where a run starts
            from a picture. Two evaluations of a second-order sampler are one step; PNDM's extra evaluation is a step,
            as diffusers' pipelines count it.
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
        """Returns a run from standard normal noise, float32 of any shape; it is scaled by `init_noise_sigma` here.

        Raises:
            InputError: not float32.
        """
        _check("The initial latents", latents, np.shape(latents))
        return SamplerState(self, _scaled(latents, self.init_noise_sigma))

    def start_from(self, image_latents: Latents, noise: Latents) -> SamplerState:
        """Returns a run from a picture, as diffusers' image-to-image pipelines start; arguments as for `noised`."""
        return SamplerState(self, self.noised(image_latents, noise))

    def noised(self, image_latents: Latents, noise: Latents, index: int = 0) -> Latents:
        """Returns a picture as noisy as the sample is before evaluation ``index``: the scheduler's ``add_noise``.

        Args:
            image_latents: float32 of any shape.
            noise: standard normal, float32 of the same shape.
            index: from 0.

        Raises:
            InputError: not float32, or of different shapes.
        """
        _check("image_latents", image_latents, np.shape(image_latents))
        _check("The noise", noise, image_latents.shape)
        return _combine(np.array(self.evaluations[index].noising), (image_latents, noise))


class SamplerState:
    """A run in progress. It never writes to an array it was given, nor to one it gave out.

    Attributes:
        latents: the current sample, float32; the result once `done`. It may be replaced between evaluations.
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
    def evaluation(self) -> Evaluation:
        """The evaluation to come.

        Raises:
            InputError: the run is over.
        """
        if self.done:
            raise InputError("The run is over.", given=f"{self._index} evaluations", advice="Start another run.")
        return self._evaluations[self._index]

    @property
    def timestep(self) -> float:
        """What the UNet is told at the evaluation to come."""
        return self.evaluation.timestep

    @property
    def step(self) -> int:
        """The logical denoising step of the evaluation to come."""
        return self.evaluation.step

    @property
    def draws_noise(self) -> bool:
        """Whether `advance` needs noise at the evaluation to come."""
        return self.evaluation.draws_noise

    @property
    def computed(self) -> bool:
        """Whether `advance` needs the UNet's output at the evaluation to come."""
        return self.evaluation.computed

    def model_input(self) -> Latents:
        """Returns the sample as the UNet takes it."""
        return _scaled(self.latents, self.evaluation.input_scale)

    def advance(self, model_output: Latents | None, noise: Latents | None = None) -> None:
        """Takes the UNet's output (after guidance) and moves to the next evaluation.

        Args:
            model_output: float32 of the latents' shape, exactly when `computed`.
            noise: standard normal, float32 of the latents' shape, exactly when `draws_noise`.

        Raises:
            InputError: a wrong shape or dtype, noise or output missing or unasked for, or nothing left to do.
        """
        evaluation = self.evaluation
        if evaluation.computed != (model_output is not None):
            raise InputError(
                "This evaluation needs the UNet's output." if evaluation.computed else "This evaluation is forecast.",
                given=f"evaluation {self._index} {'without' if model_output is None else 'with'} an output",
                advice="Evaluate the UNet exactly where computed is true.",
            )
        if model_output is not None:
            _check("The model's output", model_output, self.latents.shape)
        if noise is not None:
            _check("The noise", noise, self.latents.shape)
        if evaluation.draws_noise != (noise is not None):
            raise InputError(
                "This evaluation needs noise." if evaluation.draws_noise else "This evaluation takes no noise.",
                given=f"evaluation {self._index} {'without' if noise is None else 'with'} noise",
                advice="Draw noise exactly where draws_noise is true, so that the random stream stays in step.",
            )
        given = (self._zeros if array is None else array for array in (model_output, noise))
        inputs = (self.latents, *given, *self._state)
        self.latents, *self._state = (_combine(row, inputs) for row in evaluation.rows)
        self._index += 1


def _combine(row: FloatArray, inputs: Sequence[Latents]) -> Latents:
    """Returns the weighted sum of float32 arrays, added up in float64."""
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
