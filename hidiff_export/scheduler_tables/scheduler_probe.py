"""Compiles a diffusers scheduler into a `SamplerTable` by probing it, for every number of steps asked for."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch

from hidiff_export.errors import ExportError
from hidiff_export.scheduler_tables.diffusers_schedulers import TCD_ETA, build_scheduler
from hidiff_export.scheduler_tables.linear_probe import FloatArray, Response, StepsUnsupported, noise_weights, respond
from hidiff_export.scheduler_tables.partial_runs import drop_unread, probe_starts
from hidiff_runtime.sampling.scheduler_state import NOISE, STATE
from hidiff_runtime.sampling.scheduler_table import EtaTerms, SamplerTable
from hidiff_runtime.sampling.table_rows import Rows

DEFAULT_STEPS = range(1, 101)

_DEFAULTED = "_use_default_values"
"""Diffusers' list of what a configuration does not say."""

_ETA = 0.5
_ETA_CHECKS = (0.25, 0.75)
_ETA_RTOL = 1e-5
"""Beside the largest coefficient of a row; float32 rounding inside the scheduler is near 1e-7."""


@dataclass(frozen=True)
class _Run:
    """One number of steps, probed; ``eta`` is set where the sampler takes one.

    ``starts`` has the evaluations that differ where a run begins in the middle, by its first evaluation.
    """

    steps: int
    init_noise_sigma: float
    evaluations: tuple[Response, ...]
    noising: FloatArray
    starts: Mapping[int, Sequence[Response]]
    eta: EtaTerms | None


def probe(
    sampler: str,
    config: Mapping[str, Any],
    steps: Iterable[int] = DEFAULT_STEPS,
    *,
    timesteps: Sequence[int] | None = None,
    tcd_eta: float = TCD_ETA,
) -> SamplerTable:
    """Returns the sampler's table. Numbers of steps with which the scheduler itself does not run are left out, with the
    reason under ``left_out`` in the table's origin.

    Args:
        sampler: a name of `hidiff_export.scheduler_tables.names.SAMPLERS`.
        config: the checkpoint's scheduler configuration, of whatever scheduler class.
        steps: numbers of inference steps.
        timesteps: as for `build_scheduler`; ``steps`` is then their number.
        tcd_eta: as for `build_scheduler`.

    Raises:
        InputError: there is no such sampler.
        ExportError: the scheduler is not linear, refuses the configuration, or runs with none of these steps.
    """
    pristine = build_scheduler(sampler, config, timesteps=timesteps, tcd_eta=tcd_eta)
    runs: list[_Run] = []
    left_out: dict[int, str] = {}
    for number in sorted(set(steps)):
        try:
            runs.append(_probe_run(pristine, number))
        except StepsUnsupported as refusal:
            left_out[number] = str(refusal)
    if not runs:
        raise ExportError(
            f"{type(pristine).__name__} runs with none of these numbers of steps.",
            given="; ".join(f"{number} steps: {reason}" for number, reason in list(left_out.items())[:1]) or "none",
            advice="Ask for other numbers of steps, or change the scheduler's configuration.",
        )
    origin = {
        "scheduler": type(pristine).__name__,
        "config": _config_text(pristine),
        "diffusers": diffusers.__version__,
        "left_out": json.dumps(left_out),
    }
    if sampler == "tcd":
        origin["eta"] = str(tcd_eta)
    return _assemble(sampler, pristine.order, runs, origin)


def _config_text(scheduler: Any) -> str:
    """Returns a scheduler's configuration as JSON that is the same in every process.

    Diffusers lists the names of default values in the order of a set. DPM-Solver's defaults have an infinity, which is
    left out, since JSON has none and whoever builds the scheduler again gets it all the same.

    Raises:
        ExportError: another value is no finite number.
    """
    known = inspect.signature(type(scheduler).__init__).parameters
    config = {
        name: value
        for name, value in dict(scheduler.config).items()
        if not (isinstance(value, float) and math.isinf(value) and name in known and known[name].default == value)
    }
    if _DEFAULTED in config:
        config[_DEFAULTED] = sorted(config[_DEFAULTED])
    try:
        return json.dumps(config, sort_keys=True, allow_nan=False)
    except ValueError as error:
        odd = [name for name, value in config.items() if isinstance(value, float) and not math.isfinite(value)]
        raise ExportError(
            f"{type(scheduler).__name__} is configured with a value that is no finite number.",
            given=", ".join(odd) or error,
            advice="Correct the checkpoint's scheduler configuration.",
        ) from error


def _probe_run(pristine: Any, steps: int) -> _Run:
    scheduler = copy.deepcopy(pristine)
    has_eta = "eta" in inspect.signature(pristine.step).parameters
    responses = respond(scheduler, steps, eta=0.0 if has_eta else None)
    eta_terms = _probe_eta(pristine, steps, responses) if has_eta else None
    whole = drop_unread(responses)
    noising = noise_weights(copy.deepcopy(pristine), steps)
    starts = probe_starts(pristine, steps, whole)
    return _Run(steps, float(scheduler.init_noise_sigma), tuple(whole), noising, starts, eta_terms)


def _probe_eta(pristine: Any, steps: int, still: Sequence[Response]) -> EtaTerms:
    """Returns how one run's rows depend on eta: from the rows at one eta beside 0, checked at others.

    The direction's variance at eta 0 is 1 minus the cumulative alpha of the step's result (formula 12 of
    arXiv 2010.02502), looked up where DDIM looks it up.
    """
    scheduler = copy.deepcopy(pristine)
    at_rest, moved = _sample_rows(still), _sample_rows(respond(scheduler, steps, _ETA))
    previous = scheduler.timesteps - scheduler.config.num_train_timesteps // steps
    alphas = torch.where(previous < 0, scheduler.final_alpha_cumprod, scheduler.alphas_cumprod[previous.clamp(min=0)])
    variance = (1 - alphas).to(torch.float64).numpy()

    noise = moved[:, NOISE] / _ETA
    share = np.divide(noise**2, variance, out=np.zeros_like(variance), where=noise > 0)
    shrunk = 1 - np.sqrt(1 - _ETA**2 * share)[:, None]
    change = (at_rest - moved)[:, :NOISE]
    terms = EtaTerms(np.divide(change, shrunk, out=np.zeros_like(change), where=shrunk > 0), share, noise)
    for eta in _ETA_CHECKS:
        expected = _sample_rows(respond(copy.deepcopy(pristine), steps, eta))
        given = terms.apply(at_rest[:, None], slice(None), eta)[:, 0]
        error = float((np.abs(given - expected).max(axis=1) / np.abs(expected).max(axis=1)).max())
        if not error <= _ETA_RTOL:
            raise ExportError(
                "This scheduler depends on eta in another way than DDIM does.",
                given=f"{type(pristine).__name__}: off by {error:.2g} at eta {eta}, {steps} steps",
                advice="Choose another sampler.",
            )
    return terms


def _sample_rows(responses: Sequence[Response]) -> FloatArray:
    return np.stack([response.rows[0] for response in responses])


def _assemble(sampler: str, order: int, runs: Sequence[_Run], origin: Mapping[str, str]) -> SamplerTable:
    evaluations = [evaluation for run in runs for evaluation in run.evaluations]
    begun = [response for run in runs for start in run.starts.values() for response in start]
    slots = max(evaluation.rows.shape[1] for evaluation in (*evaluations, *begun)) - STATE
    first = np.cumsum([0, *(len(run.evaluations) for run in runs)], dtype=np.int64)
    rows = np.stack([_padded(evaluation.rows, slots) for evaluation in evaluations])
    depth = max((len(start) for run in runs for start in run.starts.values()), default=0)
    early = np.repeat(rows[None], depth, axis=0)
    for run, offset in zip(runs, first.tolist(), strict=False):
        for begin, responses in run.starts.items():
            for number, response in enumerate(responses):
                early[number, offset + begin + number] = _padded(response.rows, slots)
    terms = [run.eta for run in runs if run.eta is not None]
    return SamplerTable(
        sampler=sampler,
        order=order,
        steps=np.array([run.steps for run in runs], dtype=np.int64),
        first=first,
        init_noise_sigma=np.array([run.init_noise_sigma for run in runs]),
        timesteps=np.array([evaluation.timestep for evaluation in evaluations], dtype=np.float32),
        input_scale=np.array([evaluation.input_scale for evaluation in evaluations]),
        draws_noise=np.array([evaluation.draws_noise for evaluation in evaluations]),
        noising=np.concatenate([run.noising for run in runs]),
        rows=Rows.of(rows, early),
        eta=_join(terms) if terms else None,
        origin=origin,
    )


def _padded(rows: FloatArray, slots: int) -> FloatArray:
    whole = np.zeros((1 + slots, STATE + slots))
    whole[: rows.shape[0], : rows.shape[1]] = rows
    return whole


def _join(terms: Sequence[EtaTerms]) -> EtaTerms:
    return EtaTerms(
        direction=np.concatenate([part.direction for part in terms]),
        share=np.concatenate([part.share for part in terms]),
        noise=np.concatenate([part.noise for part in terms]),
    )
