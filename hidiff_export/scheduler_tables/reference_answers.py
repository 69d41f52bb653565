"""Asks a diffusers scheduler a few numbers in every run there is, for the runtime to compare a table with.

This is apart from `hidiff_export.scheduler_tables.scheduler_probe`, which makes the tables: the scheduler runs as
pipelines run it, keeps to itself what it remembers, and what it answers is kept as it is.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hidiff_export.scheduler_tables.linear_probe import StepsUnsupported, attempt, begin, restarted
from hidiff_runtime.sampling.table_rows import Rows
from hidiff_runtime.verification.scheduler_samples import SamplerAnswers

LANES = 2
"""Elements that are asked about: one would show a wrong coefficient, two show it where one hides it."""

ETAS = (0.4, 0.8)
"""DDIM's that are asked for, beside 0. At 1 diffusers takes the root of what rounding leaves of 0, or of less."""

_SHAPE = (1, 1, 1, LANES)
_EXTRA = 16
"""Evaluations that a run may have beyond its logical steps: PNDM's with Runge-Kutta steps has 9."""


@dataclass
class _Answers:
    """What was answered so far, an entry an evaluation."""

    samples: list[torch.Tensor] = field(default_factory=list)
    draws: list[bool] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    scaled: list[torch.Tensor] = field(default_factory=list)
    noised: list[torch.Tensor] = field(default_factory=list)


def _questions(count: int) -> torch.Tensor:
    """Returns sample, model output and noise of each evaluation, float32 ``[count, 3, LANES]``.

    Uniform numbers but for the noise, which is what a scheduler draws from a generator seeded with the evaluation.
    """
    numbers = torch.rand(count, 3, LANES, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for number in range(count):
        numbers[number, 2] = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(number)).reshape(LANES)
    return numbers


def shown(rows: Rows) -> int:
    """Counts the evaluations in which a start in the middle can show: what was kept last is still handed on."""
    return rows.depth + rows.states if rows.depth else 0


def ask(pristine: Any, steps: Iterable[int], after_start: int) -> SamplerAnswers:
    """Returns a scheduler's answers in every run with these numbers of steps, but those that it does not run with.

    Args:
        pristine: the scheduler; it is copied.
        steps: numbers of steps.
        after_start: how many evaluations to follow each start in the middle; see `shown`.
    """
    counts = sorted(set(steps))
    questions = _questions(max(counts) * pristine.order + _EXTRA)
    has_eta = "eta" in inspect.signature(pristine.step).parameters
    whole, later = _Answers(), _Answers()
    laid_out: list[tuple[int, int, float]] = []
    runs: list[tuple[tuple[int, int, int], float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a scheduler's use of numpy is its authors' business, also under -W error
        for number in counts:
            laid = copy.deepcopy(pristine)
            try:
                attempt(laid.set_timesteps, number)
                begun, parts = _ask_steps(laid, number, after_start, questions, has_eta=has_eta)
            except StepsUnsupported:
                continue
            for key, values in vars(begun).items():
                getattr(whole, key).extend(values)
            for (skipped, eta), part in parts:
                runs.append(((len(laid_out), skipped, len(part.samples)), eta))
                later.samples += part.samples
                later.draws += part.draws
            laid_out.append((number, len(begun.samples), float(laid.init_noise_sigma)))
    first = [((index, 0, length), 0.0) for index, (_, length, _) in enumerate(laid_out)]
    return SamplerAnswers(
        steps=np.array([number for number, _, _ in laid_out], np.int64),
        init_noise_sigma=np.array([sigma for _, _, sigma in laid_out]),
        runs=np.array([place for place, _ in (*first, *runs)], np.int32).reshape(-1, 3),
        etas=np.array([eta for _, eta in (*first, *runs)]),
        asked=questions.numpy(),
        samples=_stacked([*whole.samples, *later.samples]),
        draws=np.array([*whole.draws, *later.draws], np.bool_),
        timesteps=np.array(whole.timesteps, np.float32),
        scaled=_stacked(whole.scaled),
        noised=_stacked(whole.noised),
    )


def _ask_steps(
    laid: Any, steps: int, after_start: int, questions: torch.Tensor, *, has_eta: bool
) -> tuple[_Answers, list[tuple[tuple[int, float], _Answers]]]:
    """Returns the whole run with this number of steps, and the others by how many steps they skip and their eta."""
    whole = _ask_run(laid, questions, 0, eta=0.0 if has_eta else None, whole=True)
    others = [((0, eta), _ask_run(laid, questions, 0, eta=eta)) for eta in ETAS[: len(ETAS) * has_eta]]
    middle = steps // 2
    for skipped in range(1, steps):
        most = None if skipped == middle else after_start
        if most != 0:
            eta = 0.0 if has_eta else None
            others.append(((skipped, 0.0), _ask_run(laid, questions, skipped * laid.order, eta=eta, most=most)))
    return whole, others


def _ask_run(
    laid: Any, questions: torch.Tensor, start: int, *, eta: float | None, most: int | None = None, whole: bool = False
) -> _Answers:
    """Returns the answers of up to ``most`` evaluations from number ``start`` on; if ``whole``, noised ones too.

    Raises StepsUnsupported when the scheduler raises, or gives numbers that are not finite.
    """
    scheduler, answers = restarted(laid), _Answers()
    generator = torch.Generator()
    options: dict[str, Any] = {} if eta is None else {"eta": eta}
    if "generator" in inspect.signature(laid.step).parameters:
        options["generator"] = generator
    if start:  # pipelines tell where a run begins only where it begins with a picture
        begin(scheduler, start)
    end = None if most is None else start + most
    for number, timestep in enumerate(laid.timesteps[start:end]):
        sample, output, noise = questions[number].clone().reshape(3, *_SHAPE)  # a scheduler may change what it is given
        scaled = attempt(scheduler.scale_model_input, sample.clone(), timestep)
        if whole:
            answers.timesteps.append(float(timestep))
            answers.scaled.append(scaled)
            answers.noised.append(_noised(laid, number, sample, noise, timestep))
        generator.manual_seed(number)
        unmoved = generator.get_state()
        answers.samples.append(attempt(scheduler.step, output, timestep, sample, return_dict=False, **options)[0])
        answers.draws.append(not torch.equal(unmoved, generator.get_state()))
    if not all(bool(values.isfinite().all()) for values in (*answers.samples, *answers.scaled, *answers.noised)):
        raise StepsUnsupported("its results are not finite")
    return answers


def _noised(laid: Any, number: int, image: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Returns a picture with the noise that the scheduler adds where a run begins with it at evaluation ``number``."""
    scheduler = restarted(laid)
    begin(scheduler, number)
    noised: torch.Tensor = attempt(scheduler.add_noise, image.clone(), noise, timestep.reshape(1))
    return noised


def _stacked(values: list[torch.Tensor]) -> NDArray[np.float32]:
    stacked: Iterator[Any] = (value.reshape(LANES).to(torch.float32).numpy() for value in values)
    return np.array([*stacked], np.float32).reshape(-1, LANES)
