"""Compares a sampler table with what its diffusers scheduler answered: every run, start and eta, evaluation by
evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.sampling.scheduler_state import NOISE, OUTPUT, SAMPLE
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.verification.comparison import Verdict, compare
from hidiff_runtime.verification.reference_samples import ReferenceSamples
from hidiff_runtime.verification.scheduler_samples import AGREES, COUNT, LENGTH, SKIPPED, SamplerAnswers, SamplerSample

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle

Array = NDArray[Any]

SAMPLER = "sampler table against diffusers"


@dataclass(frozen=True)
class _Compared:
    """Two arrays ``[entries, lanes]`` to compare, each divided by the size of what was added up, and whose they are.

    Args:
        what: the quantity.
        expected: the scheduler's.
        found: the table's.
        places: the run, and the evaluation in it, of each entry: ``[entries, 2]``.
    """

    what: str
    expected: Array
    found: Array
    places: NDArray[np.int64]


def samplers_left_out(bundle: Bundle, samples: ReferenceSamples) -> str:
    """Returns why sampler tables are not compared; empty where they are."""
    if samples.samplers:
        return ""
    names = ", ".join(sorted(bundle.manifest.samplers))
    return (
        f"The sampler tables {names} and the manifest's defaults were not compared, but for what the recorded run "
        "takes of them: this bundle was built before they were recorded. 'hidiff-export verify' compares them with "
        "diffusers, and a bundle that is built again has the record."
    )


def replay_samplers(bundle: Bundle, samples: ReferenceSamples) -> Iterator[Verdict]:
    """Yields a verdict for each table; one without a sample is a fault, unless none has one."""
    recorded = {sample.sampler: sample for sample in samples.samplers}
    for name in bundle.manifest.samplers if recorded else ():
        if name not in recorded:
            yield Verdict(SAMPLER, AGREES, None, name, fault="no reference sample")
            continue
        answers = SamplerAnswers.of(recorded[name], samples.tensors)
        yield replay_sampler(bundle.sampler(name), recorded[name], answers)


def replay_sampler(table: SamplerTable, sample: SamplerSample, answers: SamplerAnswers) -> Verdict:
    """Returns the verdict on a table: on the quantity that is furthest off, with where that is."""
    fault = _other_layout(table, sample, answers)
    if fault:
        return Verdict(SAMPLER, AGREES, None, sample.sampler, fault=fault)
    try:
        verdicts = [_judged(sample, answers, compared) for compared in _compared(table, answers)]
    except InputError as error:  # an eta that this table does not take
        return Verdict(SAMPLER, AGREES, None, sample.sampler, fault=error.summary)
    return max(verdicts, key=lambda verdict: np.inf if verdict.metrics is None else verdict.metrics.excess or 0.0)


def _other_layout(table: SamplerTable, sample: SamplerSample, answers: SamplerAnswers) -> str:
    """Returns how runs are laid out otherwise than the scheduler's; empty where they are not."""
    eta = None if "eta" not in table.origin else float(table.origin["eta"])
    lengths = answers.runs[answers.whole, LENGTH].astype(np.int64)
    facts = (
        ("sampler", table.sampler, sample.sampler),
        ("evaluations a step", table.order, sample.order),
        ("eta of the table", eta, sample.eta),
        ("evaluations that a start shows", table.rows.depth, sample.depth),
        ("numbers of steps", table.steps.tolist(), answers.steps.tolist()),
        ("evaluations", np.diff(table.first).tolist(), lengths.tolist()),
    )
    for what, found, expected in facts:
        if found != expected:
            return f"{what}: expected {_short(expected)}, got {_short(found)}"
    ends = table.first[1:][answers.runs[:, COUNT]]
    if (_first(table, answers.runs) + answers.runs[:, LENGTH] > ends).any():
        raise BundleError("The reference samples of a sampler go beyond its runs.", given=sample.sampler)
    return ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first(table: SamplerTable, runs: NDArray[np.int32]) -> NDArray[np.int64]:
    """Returns the first evaluation of each run among all of the table's."""
    first: NDArray[np.int64] = table.first[runs[:, COUNT]] + runs[:, SKIPPED].astype(np.int64) * table.order
    return first


def _judged(sample: SamplerSample, answers: SamplerAnswers, compared: _Compared) -> Verdict:
    verdict = compare(SAMPLER, compared.expected, compared.found, AGREES, phase=sample.sampler)
    if verdict.ok or not compared.found.size:
        return verdict
    worst = int(np.nanargmax(np.abs(compared.found - compared.expected).max(axis=-1)))
    run, number = compared.places[worst].tolist()
    count, skipped, _ = answers.runs[run].tolist()
    start = f" from step {skipped + 1}" if skipped else ""
    eta = f" at eta {answers.etas[run]:g}" if answers.etas[run] else ""
    where = f"{compared.what} of {answers.steps[count]} steps{start}{eta}, evaluation {number + 1}"
    return replace(verdict, fault=where)


def _compared(table: SamplerTable, answers: SamplerAnswers) -> Iterator[_Compared]:
    """Yields everything that a table says, beside the scheduler's."""
    whole = np.flatnonzero(answers.whole)
    sigma = answers.init_noise_sigma[:, None]
    starts = np.stack([whole, np.zeros_like(whole)], axis=1)
    yield _Compared("size of the first noise", sigma / sigma, table.init_noise_sigma[:, None] / sigma, starts)
    places = _places(answers.runs)
    of_whole = places[: len(answers.timesteps)]
    timesteps = table.timesteps.astype(np.float64)
    yield _Compared("timestep", answers.timesteps[:, None].astype(np.float64), timesteps[:, None], of_whole)
    sample, _, noise = np.moveaxis(answers.asked[of_whole[:, 1]].astype(np.float64), 1, 0)
    yield _beside("scaled sample", answers.scaled, table.input_scale[:, None] * sample, np.abs(sample), of_whole)
    weights = table.noising[:, :, None]
    noised, size = weights[:, 0] * sample + weights[:, 1] * noise, np.abs(sample) + np.abs(weights[:, 1] * noise)
    yield _beside("noised picture", answers.noised, noised, size, of_whole)
    draws, samples, size = _steps(table, answers)
    yield _Compared("noise drawn", answers.draws[:, None] + 1.0, draws[:, None] + 1.0, places)
    yield _beside("sample", answers.samples, samples, size, places)


def _beside(what: str, expected: Array, found: Array, size: Array, places: NDArray[np.int64]) -> _Compared:
    return _Compared(what, expected / size, found / size, places)


def _places(runs: NDArray[np.int32]) -> NDArray[np.int64]:
    """Run and evaluation in it of each entry of `SamplerAnswers.samples`."""
    lengths = runs[:, LENGTH].astype(np.int64)
    run = np.repeat(np.arange(len(runs)), lengths)
    return np.stack([run, np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths)], axis=1)


def _steps(table: SamplerTable, answers: SamplerAnswers) -> tuple[Array, Array, Array]:
    """Returns whether noise is drawn ``[N]``, the next sample and the size of what is added up ``[N, L]``.

    All runs are taken through at once, since they do not depend on each other; what each remembers is its own.
    """
    runs, lanes = answers.runs, answers.asked.shape[-1]
    first, lengths = _first(table, runs), runs[:, LENGTH].astype(np.int64)
    entries = np.cumsum(lengths) - lengths
    draws = np.zeros(len(answers.samples), np.bool_)
    samples, size = np.zeros((len(draws), lanes)), np.zeros((len(draws), lanes))
    state = np.zeros((len(runs), table.rows.states, lanes), np.float32)
    for number in range(int(lengths.max())):
        for eta in np.unique(answers.etas):
            those = np.flatnonzero((lengths > number) & (answers.etas == eta))
            behind = np.where(runs[those, SKIPPED] > 0, number, table.rows.depth)
            rows, drawn = table.rows_at(first[those] + number, behind, float(eta))
            given = np.concatenate([np.broadcast_to(answers.asked[number], (len(those), 3, lanes)), state[those]], 1)
            given = given.astype(np.float64)
            given[:, NOISE] *= drawn[:, None]
            at = entries[those] + number
            stepped = rows @ given
            draws[at], samples[at], state[those] = drawn, stepped[:, 0], stepped[:, 1:]
            size[at] = _size(rows, given)
    return draws, samples, size


def _size(rows: Array, given: Array) -> Array:
    """Returns the sum of the magnitudes of what is added up, of sample and output: what rounding is beside."""
    summed: Array = (np.abs(rows[:, :1]) @ np.abs(given))[:, 0]
    return summed + np.abs(given[:, SAMPLE]) + np.abs(given[:, OUTPUT])
