"""Reads the coefficients of a diffusers scheduler off its answers to unit vectors.

Schedulers work on each element by itself, so one tensor asks many questions at once: every element along its last axis
is a column, that is, one choice of sample, model output, noise and kept tensors. Unit columns give the coefficients;
zero columns give the noise's, which the scheduler draws itself; random columns, small and large, must then follow from
the coefficients. A scheduler that clips, thresholds, mixes elements or hides a tensor somewhere fails that check.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hidiff_export.errors import ExportError
from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.sampling.scheduler_state import NOISE, OUTPUT, SAMPLE, STATE

FloatArray = NDArray[np.float64]

SHAPE = (1, 1, 1, 32)
"""Shape of the tensors that are fed: a batch of one, one channel, one row of columns."""

_COLUMNS = SHAPE[-1]
_ZEROS = 4
_UNIT = 1024.0
"""Size of a unit vector: so large beside the noise that rounding of their sum costs a coefficient nothing."""

_MAGNITUDES = np.tile(np.array([1, 1, 1e2, 1e4], dtype=np.float32), _COLUMNS // 4)
"""Sizes of the random columns; a clip that leaves the small ones alone bends the large ones."""

_RTOL = 1e-4
"""Beside the sum of absolute terms and inputs. The inputs count whatever their coefficient: a scheduler may take the
difference of two that cancel and divide it by a small sigma, where float32 rounding comes to 1.5e-5 (Heun)."""


class StepsUnsupported(Exception):  # noqa: N818 - an outcome, not an error: this number of steps is left out
    """The scheduler itself does not run with this number of steps."""


@dataclass(frozen=True)
class Response:
    """How one evaluation's update answers to its inputs.

    Attributes:
        timestep: what the UNet is told.
        input_scale: factor between the sample and the UNet's input.
        draws_noise: whether the scheduler drew noise.
        rows: float64 ``[1 + kept after, 3 + kept before]``, the columns of `hidiff_runtime.sampling.scheduler_state`.
        before: names of the tensors kept before, in the order of the columns.
        after: names of the tensors kept after, in the order of the rows.
    """

    timestep: float
    input_scale: float
    draws_noise: bool
    rows: FloatArray
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class _Kept:
    """A tensor that the scheduler keeps: ``owner[key]``."""

    name: str
    owner: Any
    key: Any


@dataclass(frozen=True)
class _Observation:
    """One evaluation as it was seen; its columns are those of the questions.

    ``fed`` is ``[3 + kept before, columns]`` with the noise left zero, ``scaled`` the sample after scaling, ``noise``
    what the scheduler drew, ``answers`` the next sample and the kept tensors ``[1 + kept after, columns]``.
    """

    timestep: float
    fed: torch.Tensor
    scaled: torch.Tensor
    noise: torch.Tensor | None
    answers: torch.Tensor
    before: tuple[str, ...]
    after: tuple[str, ...]


def respond(scheduler: Any, steps: int, eta: float | None = None) -> list[Response]:
    """Runs ``scheduler`` for ``steps`` steps as diffusers' pipelines do; arguments and errors as for `respond_from`."""
    return respond_from(scheduler, steps, (0,), None, eta)[0]


def respond_from(
    scheduler: Any, steps: int, starts: Sequence[int], most: int | None, eta: float | None = None
) -> list[list[Response]]:
    """Reads the coefficients of runs that begin anywhere in the timesteps, as image-to-image pipelines have them.

    Args:
        scheduler: a fresh one.
        steps: of the whole run.
        starts: the first evaluation of each run.
        most: how many evaluations of each run to read, None for all; fewer where it is over before.
        eta: handed to ``step`` where given.

    Raises:
        StepsUnsupported: the scheduler raises, or gives numbers that are not finite.
        ExportError: its update is no linear combination of sample, outputs, noise and the tensors it keeps.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a scheduler's use of numpy is its authors' business, also under -W error
        attempt(scheduler.set_timesteps, steps)
        dice = _Dice.of(scheduler, steps, eta)
        runs = [_observe(restarted(scheduler), start, most, dice) for start in starts]
    solved = iter(_solve_all([seen for run in runs for seen in run], scheduler))
    return [[next(solved) for _ in run] for run in runs]


def noise_weights(scheduler: Any, steps: int) -> FloatArray:
    """Returns the weights of picture and noise where the scheduler adds noise to one, float64 ``[evaluations, 2]``.

    Args:
        scheduler: a fresh one; it is used up.
        steps: of the run, from each of whose timesteps another could begin.

    Raises:
        StepsUnsupported: the scheduler raises.
        ExportError: what comes out is not the weighted sum of both.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(scheduler.set_timesteps, steps)
        pair = np.random.default_rng(steps).standard_normal((2, _COLUMNS), dtype=np.float32) * _MAGNITUDES
        pair[:, :2] = np.eye(2)
        noised = []
        for index, timestep in enumerate(scheduler.timesteps):
            begin(scheduler, index)
            image, noise = torch.from_numpy(pair.copy()).reshape(-1, *SHAPE)
            noised.append(attempt(scheduler.add_noise, image, noise, timestep.reshape(1)).reshape(-1))
    answers = torch.stack(noised).to(torch.float64).numpy()[:, None]
    weights = answers[..., :2]
    _check_linear(scheduler, answers, weights, pair.astype(np.float64)[None])
    return weights[:, 0]


def restarted(scheduler: Any) -> Any:
    """Returns a copy with lists of its own: schedulers change their lists, but never write into their tensors."""
    fresh = copy.copy(scheduler)
    vars(fresh).update({name: list(value) for name, value in vars(scheduler).items() if isinstance(value, list)})
    return fresh


@dataclass(frozen=True)
class _Dice:
    """What is random: the scheduler's own noise and the random columns; and what ``step`` is given beside inputs."""

    generator: torch.Generator
    questions: np.random.Generator
    options: dict[str, Any]

    @classmethod
    def of(cls, scheduler: Any, seed: int, eta: float | None) -> _Dice:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {} if eta is None else {"eta": eta}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = generator
        return cls(generator, np.random.default_rng(0), options)


def _observe(scheduler: Any, start: int, most: int | None, dice: _Dice) -> list[_Observation]:
    """Returns up to ``most`` evaluations from number ``start`` on, of a scheduler whose timesteps are set."""
    begin(scheduler, start)
    kept = _kept(scheduler)
    observations = []
    for timestep in scheduler.timesteps[start:][:most]:
        before = tuple(place.name for place in kept)
        fed = _questions(len(kept), dice.questions)
        sample, output, _, *state = fed.clone().reshape(-1, *SHAPE)  # a scheduler may change what it is given
        for place, values in zip(kept, state, strict=True):
            place.owner[place.key] = values
        unmoved = dice.generator.get_state()
        scaled = attempt(scheduler.scale_model_input, sample.clone(), timestep).reshape(-1)
        result = attempt(scheduler.step, output, timestep, sample, return_dict=False, **dice.options)[0]
        noise = _drawn(unmoved, dice.generator, scheduler)
        kept = _kept(scheduler)
        after = tuple(place.name for place in kept)
        answers = torch.stack([result, *(place.owner[place.key] for place in kept)]).reshape(-1, _COLUMNS)
        observations.append(_Observation(float(timestep), fed, scaled, noise, answers, before, after))
    return observations


def begin(scheduler: Any, start: int) -> None:
    """Tells which evaluation comes first, as every pipeline that takes a picture does."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)


def _kept(scheduler: Any) -> list[_Kept]:
    """Returns where the scheduler keeps tensors of the sample's shape."""
    attributes = vars(scheduler)
    places: list[_Kept] = []
    for name, value in attributes.items():
        if isinstance(value, list):
            places += [_Kept(f"{name} {index}", value, index) for index, item in enumerate(value) if _is_sample(item)]
        elif _is_sample(value):
            places.append(_Kept(name, attributes, name))
    return places


def _is_sample(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == SHAPE


def _questions(kept: int, questions: np.random.Generator) -> torch.Tensor:
    """Returns inputs ``[3 + kept, columns]``: unit columns, zero columns, random columns; the noise's row is zero.

    The random columns are new each time, so that a tensor kept from an earlier evaluation cannot pass for this one's.
    """
    rows = _given(kept)
    first_random = len(rows) + _ZEROS
    if first_random + 4 > _COLUMNS:
        raise ExportError("The scheduler keeps more tensors from step to step than can be probed.", given=kept)
    fed = np.zeros((STATE + kept, _COLUMNS), dtype=np.float32)
    fed[rows, range(len(rows))] = _UNIT
    size = _MAGNITUDES[: _COLUMNS - first_random]
    fed[rows, first_random:] = questions.standard_normal((len(rows), len(size)), dtype=np.float32) * size
    return torch.from_numpy(fed)


def _given(kept: int) -> list[int]:
    """Returns the inputs that are chosen here, which is all but the noise."""
    return [SAMPLE, OUTPUT, *range(STATE, STATE + kept)]


def _drawn(before: torch.Tensor, generator: torch.Generator, scheduler: Any) -> torch.Tensor | None:
    """Returns the one normal tensor ``[columns]`` that took the generator from ``before`` to where it is, if any."""
    after = generator.get_state()
    if torch.equal(before, after):
        return None
    replay = torch.Generator()
    replay.set_state(before)
    noise = torch.randn(SHAPE, generator=replay)
    if not torch.equal(replay.get_state(), after):
        raise ExportError(
            "The scheduler draws other random numbers than one normal tensor of the latents' shape in a step.",
            given=type(scheduler).__name__,
            advice="Choose another sampler.",
        )
    return noise.reshape(-1)


def _solve_all(observations: Sequence[_Observation], scheduler: Any) -> list[Response]:
    responses: dict[int, Response] = {}
    shapes = [(len(seen.fed), len(seen.answers)) for seen in observations]
    for shape in set(shapes):  # evaluations of equal shape are solved together
        group = [number for number, other in enumerate(shapes) if other == shape]
        responses |= zip(group, _solve([observations[number] for number in group], scheduler), strict=True)
    return [responses[number] for number in range(len(observations))]


def _solve(group: Sequence[_Observation], scheduler: Any) -> list[Response]:
    """Returns ``rows`` in ``answers = rows @ inputs``, from unit and zero columns, checked on the random ones."""
    given = _given(len(group[0].fed) - STATE)
    units, zeros = slice(0, len(given)), slice(len(given), len(given) + _ZEROS)
    answers = torch.stack([seen.answers for seen in group]).to(torch.float64).numpy()
    scaled = torch.stack([seen.scaled for seen in group]).to(torch.float64).numpy()
    if count_nonfinite(answers) or count_nonfinite(scaled):
        raise StepsUnsupported("its results are not finite")
    inputs = torch.stack([seen.fed for seen in group]).to(torch.float64).numpy()
    for target, seen in zip(inputs[:, NOISE], group, strict=True):
        target[:] = 0 if seen.noise is None else seen.noise.numpy()
    noise = inputs[:, None, NOISE]  # [evaluation, 1, column]

    rows = np.zeros((*answers.shape[:2], inputs.shape[1]))
    power = np.square(noise[..., zeros]).sum(axis=-1)
    rows[..., NOISE] = (answers[..., zeros] * noise[..., zeros]).sum(axis=-1) / np.where(power > 0, power, 1)
    without_noise = answers - rows[..., NOISE, None] * noise
    rows[..., given] = without_noise[..., units] / _UNIT
    rounding = 2.0**-20 * np.abs(rows[..., NOISE, None]) / _UNIT  # what float32 leaves where noise was taken away again
    rows[..., given] *= np.abs(rows[..., given]) > rounding
    scale = scaled[:, SAMPLE] / _UNIT

    _check_linear(scheduler, answers, rows, inputs)
    _check_linear(scheduler, scaled[:, None], scale[:, None, None], inputs[:, :OUTPUT])
    return [
        Response(seen.timestep, float(factor), seen.noise is not None, row, seen.before, seen.after)
        for seen, factor, row in zip(group, scale, rows, strict=True)
    ]


def _check_linear(scheduler: Any, answers: FloatArray, rows: FloatArray, inputs: FloatArray) -> None:
    error = np.abs(answers - rows @ inputs)
    bound = _RTOL * ((1 + np.abs(rows)) @ np.abs(inputs))
    if (error > bound).any():
        suspects = [key for key in ("clip_sample", "thresholding") if scheduler.config.get(key)]
        given = f"{type(scheduler).__name__} with {', '.join(suspects)}" if suspects else type(scheduler).__name__
        raise ExportError(
            "This scheduler's step is not a linear combination of sample, model outputs and noise.",
            given=f"{given}: off by up to {error.max():.2g} at random points",
            advice="Set clip_sample and thresholding to false in its configuration, or choose another sampler.",
        )


def attempt(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls the scheduler's own code; whatever it raises, it does not support these steps."""
    try:
        return call(*args, **options)
    except Exception as error:
        raise StepsUnsupported(f"{type(error).__name__}: {error}") from error
