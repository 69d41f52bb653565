"""Asks the engines of this machine what PyTorch computed when the bundle was built.

A server runs this before it reports ready; it finds an engine of the wrong phase, changed weights, and a driver or
library that computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from hidiff_runtime.bundle import Bundle
from hidiff_runtime.bundle import open as open_bundle
from hidiff_runtime.denoising.controlnet import fixed_control
from hidiff_runtime.denoising.denoiser import OUTPUT, StepInfo
from hidiff_runtime.errors import BundleError, EngineError, InputError, ParityError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.validation import WINDOW_SHIFTS
from hidiff_runtime.pipeline.request_fields import Size
from hidiff_runtime.reused_features import DEEP_FEATURES
from hidiff_runtime.verification.comparison import Verdict, compare, render
from hidiff_runtime.verification.half_precision_note import half_note
from hidiff_runtime.verification.manifest_facts import replay_facts
from hidiff_runtime.verification.reference_samples import (
    TENSORS,
    CallSample,
    Expected,
    PictureSample,
    ReferenceSamples,
    RunSample,
)
from hidiff_runtime.verification.replay_components import (
    PICTURE,
    replay_networks,
    replay_picture,
    tokens_left_out,
    worst,
)
from hidiff_runtime.verification.replay_schedulers import replay_samplers, samplers_left_out
from hidiff_runtime.verification.sample_validation import check_samples

CALL = "engine against PyTorch"
STEP = "latents after a step against PyTorch"
RUN = "latents of a run against PyTorch"

FEW_EVALUATIONS = 4
"""A build records a run of at most so many evaluations, and a longer one only where that is cheap."""


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Args:
        backend: whose engines were asked.
        origin: what computed the reference.
        verdicts: one for each comparison.
        left_out: what could not be compared on this machine, and why; empty if nothing.
        half_precision: what the figures do not say of the bundle's half-precision arithmetic; empty where the engines
            compute in it, or there is none.
    """

    backend: str
    origin: str
    verdicts: tuple[Verdict, ...]
    left_out: str = ""
    half_precision: str = ""

    @property
    def ok(self) -> bool:
        """Whether every comparison is within its bound; a check without any is not."""
        return bool(self.verdicts) and all(verdict.ok for verdict in self.verdicts)

    @property
    def exit_code(self) -> int:
        """0, or 1 when a comparison failed."""
        return 0 if self.ok else ParityError.exit_code

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {
            "ok": self.ok,
            "backend": self.backend,
            "origin": self.origin,
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "left_out": self.left_out,
            "half_precision": self.half_precision,
        }

    def render(self) -> str:
        """Returns the report as plain text: a table and a last line that says how it went."""
        failed = sum(not verdict.ok for verdict in self.verdicts)
        outcome = f"{failed} of {len(self.verdicts)} FAILED" if failed else f"all {len(self.verdicts)} within bounds"
        lines = [render(self.verdicts), "", *(note for note in (self.left_out, self.half_precision) if note)]
        return "\n".join([*lines, f"{self.backend} against {self.origin}: {outcome}"])


def check(
    bundle: str | Path | Bundle,
    *,
    runs: bool = True,
    sizes: Sequence[Size] = (),
    progress: Callable[[Verdict], None] | None = None,
    **options: Any,
) -> CheckReport:
    """Replays a bundle's reference samples, those of each of its buckets.

    Args:
        bundle: a folder, or a bundle that is open.
        runs: whether to replay the whole runs too; without them a check takes one evaluation a sample.
        sizes: width and height of the buckets that are replayed; all of them without.
        progress: called with each verdict as it is found.
        options: of :func:`hidiff_runtime.open`, for a folder.

    Raises:
        BundleError: the bundle is broken, or has no reference samples.
        EngineError: the backend is missing, or an engine does not load.
        InputError: the bundle has no bucket of one of the sizes.
    """
    if not isinstance(bundle, Bundle):
        with open_bundle(bundle, **options) as opened:
            return check(opened, runs=runs, sizes=sizes, progress=progress)
    sampled = [(bucket, read_samples(bucket)) for bucket in buckets_of(bundle, sizes)]
    verdicts = []
    with bundle.lock:
        for bucket, samples in sampled:
            for verdict in _verdicts(bucket, samples, runs):
                told = replace(verdict, bucket=bucket.manifest.bucket) if len(bundle.buckets) > 1 else verdict
                verdicts.append(told)
                if progress is not None:
                    progress(told)
        note = half_note(bundle)
    left_out = {tokens_left_out(samples): None for _, samples in sampled}
    left_out |= {samplers_left_out(bucket, samples): None for bucket, samples in sampled if _is_first(bucket)}
    origin = sampled[0][1].origin
    return CheckReport(bundle.backend, origin, tuple(verdicts), "\n".join(filter(None, left_out)), note)


def buckets_of(bundle: Bundle, sizes: Sequence[Size] = ()) -> tuple[Bundle, ...]:
    """Returns the buckets of these sizes; all of them without.

    Raises:
        InputError: the bundle has none of one of the sizes.
    """
    for size in sizes:
        bundle.sized(*size)
    every = bundle.buckets
    return tuple(one for one in every if not sizes or (one.manifest.width, one.manifest.height) in sizes)


def _is_first(bundle: Bundle) -> bool:
    """Returns whether it is the bucket that what all share was recorded with."""
    return bundle.manifest == bundle.manifest.whole.manifests[0]


def read_samples(bundle: Bundle) -> ReferenceSamples:
    """Returns the bundle's reference samples.

    Raises:
        BundleError: there are none, they are broken, or they are not of the bundle's graphs.
    """
    if bundle.manifest.reference is None:
        raise BundleError(
            "This bundle has no reference samples.", given=bundle.root, advice="Build it again with this version."
        )
    index = bundle.manifest.reference
    bundle.file((PurePosixPath(index).parent / TENSORS).as_posix())
    samples = ReferenceSamples.read(bundle.file(index))
    check_samples(bundle.manifest, samples)
    return samples


def _verdicts(bundle: Bundle, samples: ReferenceSamples, runs: bool) -> Iterator[Verdict]:
    for record in bundle.manifest.phases:
        calls = [call for call in samples.calls if call.phase == record.phase]
        if not calls:
            yield Verdict(CALL, samples.call_bound, None, record.phase.name, fault="no reference sample")
        for call in calls:
            yield _replay_call(bundle, samples, call)
    yield from replay_networks(bundle, samples)
    yield from replay_samplers(bundle, samples)
    facts = replay_facts(bundle.manifest, samples)
    if facts is not None:
        yield facts
    if runs:
        if not samples.runs and _is_first(bundle) and _is_short(bundle):
            yield Verdict(RUN, samples.run_bound, None, fault="no reference sample")
        for index, run in enumerate(samples.runs):
            yield from _replay_run(bundle, samples, run, [p for p in samples.pictures if p.run == index])


def _is_short(bundle: Bundle) -> bool:
    """Returns whether some run of the default sampler is short enough that a build records one."""
    return bool((np.diff(bundle.sampler().first) <= FEW_EVALUATIONS).any())


def _replay_call(bundle: Bundle, samples: ReferenceSamples, call: CallSample) -> Verdict:
    session = bundle.engine(call.phase)  # whose sizes are then known to be the manifest's, and the samples' with them
    inputs = {name: samples.array(source) for name, source in call.inputs.items()}
    if call.window_shifts:
        shape = next(spec.shape for spec in bundle.manifest.phase(call.phase).inputs if spec.name == WINDOW_SHIFTS)
        inputs[WINDOW_SHIFTS] = np.array(call.window_shifts, dtype=np.int32).reshape(shape)
    where: dict[str, Any] = {"phase": call.phase.name, "step": call.step, "steps": call.steps}
    try:
        outputs = session.run(inputs)
    except EngineError as error:
        return Verdict(CALL, samples.call_bound, None, **where, fault=error.summary)
    judged = []
    for name, expected in ((OUTPUT, call.expected), (DEEP_FEATURES, call.features)):
        if expected is not None:
            output = outputs.get(name)
            found = None if output is None else samples.candidate(expected, output)
            judged.append(compare(CALL, samples.reference(expected), found, samples.call_bound, **where))
    return worst(judged)


def _replay_run(
    bundle: Bundle, samples: ReferenceSamples, run: RunSample, pictures: Sequence[PictureSample]
) -> Iterator[Verdict]:
    """Yields one verdict for each step of the trajectory, one for the result, and one for each picture of it."""
    after: list[StepInfo] = []
    residuals = {name: samples.array(source) for name, source in run.control.items()}
    control = fixed_control(residuals) if residuals else None
    inputs: dict[str, Any] = {name: samples.array(source) for name, source in run.inputs.items()}
    try:
        latents = bundle.denoiser().denoise(
            **inputs,
            steps=run.steps,
            seed=run.seed,
            guidance_scale=run.guidance_scale,
            guidance_rescale=run.guidance_rescale,
            sampler=run.sampler,
            eta=run.eta,
            conditioning_scale=1.0,
            control=control,
            callback=after.append,
        )
    except EngineError as error:
        yield Verdict(RUN, samples.run_bound, None, fault=error.summary)
        return
    except InputError as error:  # what it is given is the bundle's own
        raise BundleError(
            "The bundle's recorded run is not one that the bundle takes.", given=error, advice=REBUILD
        ) from error
    for info, expected in zip(after, run.trajectory, strict=False):
        yield _judge_latents(samples, expected, info.latents, STEP, info)
    yield _judge_latents(samples, run.expected, latents, RUN)
    if bundle.manifest.vae is not None and not pictures:
        yield Verdict(PICTURE, samples.run_bound, None, fault="no reference sample")
    for picture in pictures:
        yield replay_picture(bundle, samples, picture, latents)


def _judge_latents(
    samples: ReferenceSamples, expected: Expected, latents: Any, boundary: str, info: StepInfo | None = None
) -> Verdict:
    where: dict[str, Any] = {}
    if info is not None:
        where = {"phase": info.phase.name, "step": info.step, "steps": info.steps}
    found = samples.candidate(expected, latents)
    return compare(boundary, samples.reference(expected), found, samples.run_bound, **where)
