"""Judges a bundle's engines and denoiser by a reference that was computed before; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from numpy.typing import NDArray

from hidiff_export.errors import EngineError
from hidiff_export.recipe import Recipe
from hidiff_export.reference.flops_progress import FlopsProgress
from hidiff_export.reference.random_inputs import arrays
from hidiff_export.reference.tolerances import Boundary, bound_for
from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.denoising.controlnet import fixed_control
from hidiff_runtime.denoising.denoiser import OUTPUT, StepInfo
from hidiff_runtime.pipeline.prompt_encoding import encode_prompts
from hidiff_runtime.pipeline.vae import decode
from hidiff_runtime.reused_features import DEEP_FEATURES
from hidiff_runtime.verification.comparison import Verdict, compare, compare_image
from hidiff_runtime.verification.image_metrics import unit
from hidiff_runtime.verification.manifest_facts import FACTS
from hidiff_runtime.verification.replay import CALL, RUN, STEP, check
from hidiff_runtime.verification.replay_components import PICTURE, TEXT, TOKENS, VAE, worst
from hidiff_runtime.verification.replay_schedulers import SAMPLER

if TYPE_CHECKING:
    from hidiff_export.reference.reference import ReferenceCall, ReferenceRun
    from hidiff_export.reference.text_vae_reference import NetworkCall
    from hidiff_runtime.format.specs import Network

Array = NDArray[Any]

_RECORDED = {
    CALL: Boundary.RECORDED_CALL,
    STEP: Boundary.RECORDED_STEP,
    RUN: Boundary.RECORDED_RUN,
    TOKENS: Boundary.RECORDED_TOKENS,
    TEXT: Boundary.RECORDED_TEXT,
    VAE: Boundary.RECORDED_VAE,
    PICTURE: Boundary.RECORDED_PICTURE,
    SAMPLER: Boundary.RECORDED_SAMPLER,
    FACTS: Boundary.RECORDED_MANIFEST,
}
_NETWORKS = {
    "controlnet": Boundary.CONTROLNET,
    "vae_decoder": Boundary.VAE_DECODER,
    "vae_encoder": Boundary.VAE_ENCODER,
}


def compare_call(
    boundary: Boundary, call: ReferenceCall, session: Session, recipe: Recipe, meter: FlopsProgress
) -> Verdict:
    """Evaluates a phase as PyTorch did, and compares."""
    bound, point = bound_for(boundary, recipe), call.point
    where: dict[str, Any] = {"phase": point.phase.name, "step": point.step, "steps": point.steps}
    inputs = arrays(call.inputs) | ({"window_shifts": call.window_shifts} if call.window_shifts.size else {})
    meter.start(point.phase, f"{boundary.value.partition(',')[0]}: {point}")
    try:
        outputs = session.run(inputs)
    except EngineError as error:
        return Verdict(boundary.value, bound, None, **where, fault=error.summary)
    due = {OUTPUT: call.noise_pred, DEEP_FEATURES: call.deep_features}
    return worst(
        [
            compare(boundary.value, values, outputs.get(name), bound, **where)
            for name, values in due.items()
            if values is not None
        ]
    )


def compare_network(
    boundary: Boundary,
    call: NetworkCall,
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    recipe: Recipe,
) -> Verdict:
    """Evaluates a network as PyTorch did, and compares: the verdict on the output that is furthest off.

    It is under the network's name, but under the residual's for a ControlNet.
    """
    bound = bound_for(boundary, recipe)
    network = None if call.network == "controlnet" else call.network
    try:
        found = run(arrays(call.inputs))
    except EngineError as error:
        return Verdict(boundary.value, bound, None, network, fault=error.summary)
    return worst(
        [
            compare(boundary.value, values, found.get(name), bound, phase=network or name)
            for name, values in call.outputs.items()
        ]
    )


class EngineComparer:
    """Compares one bundle with a reference; each method yields verdicts as they are reached.

    Args:
        bundle: open.
        recipe: whose bounds hold.
        meter: told before each evaluation.

    Attributes:
        pictures: the run's as PyTorch and as the bundle made it, once they were judged; ``[batch, 3, height, width]``
            from 0 to 1.
    """

    def __init__(self, bundle: Bundle, recipe: Recipe, meter: FlopsProgress) -> None:
        self._bundle = bundle
        self._recipe = recipe
        self._meter = meter
        self.pictures: tuple[Array, Array] | None = None

    def engines(self, calls: Sequence[tuple[Boundary, ReferenceCall]]) -> Iterator[Verdict]:
        """Yields each phase's engine on the calls of that phase; phase by phase, so that no engine is opened twice."""
        for record in self._bundle.manifest.phases:
            for boundary, call in calls:
                if call.point.phase == record.phase:
                    session = self._bundle.engine(record.phase)
                    yield compare_call(boundary, call, session, self._recipe, self._meter)

    def networks(self, calls: Sequence[NetworkCall]) -> Iterator[Verdict]:
        """Yields the engines of the ControlNet, text encoders and the VAE's halves, each on its calls."""
        for call in calls:
            boundary = _NETWORKS.get(call.network, Boundary.TEXT)
            self._meter.note(f"{self._bundle.backend}: {call.network}")
            yield compare_network(boundary, call, partial(self._run, call.network), self._recipe)

    def _run(self, network: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if network == "controlnet":
            return self._bundle.controlnet_engine().run(inputs)
        with self._bundle.network(cast("Network", network)) as session:
            return session.run(inputs)

    def run(self, run: ReferenceRun, picture: Array | None) -> Iterator[Verdict]:
        """Yields the denoiser's latents beside those of the same run in diffusers; then the picture beside ``picture``.

        Where the run has a prompt, it is the bundle's own text encoders that encode it.
        """
        course, given = run.course, run.given
        residuals = arrays(given.control)
        conditions: dict[str, Any] = dict(arrays(given.arrays))

        def next_step(info: StepInfo) -> None:
            for point in course.points:
                if point.step == info.step + 1:
                    self._meter.start(point.phase, f"denoiser: {point}")

        self._meter.start(course.points[0].phase, f"denoiser: {course.points[0]}")
        bound = bound_for(Boundary.RUN, self._recipe)
        try:
            if given.prompt is not None:
                embeds, _ = encode_prompts(self._bundle, given.prompt.prompts, given.prompt.negative)
                conditions |= embeds
            latents = self._bundle.denoiser().denoise(
                **conditions,
                steps=course.steps,
                seed=given.seed,
                guidance_scale=given.guidance_scale,
                sampler=run.sampler,
                control=fixed_control(residuals) if residuals else None,
                callback=next_step,
            )
        except EngineError as error:
            yield Verdict(Boundary.RUN.value, bound, None, steps=course.logical_steps, fault=error.summary)
            if picture is not None:
                bound = bound_for(Boundary.PICTURE, self._recipe)
                yield Verdict(Boundary.PICTURE.value, bound, None, steps=course.logical_steps, fault=error.summary)
            return
        yield compare(Boundary.RUN.value, run.latents[-1], latents, bound, steps=course.logical_steps)
        if picture is not None:
            yield self._picture(latents, picture, course.logical_steps)

    def _picture(self, latents: Array, picture: Array, steps: int) -> Verdict:
        boundary = Boundary.PICTURE
        bound = bound_for(boundary, self._recipe)
        self._meter.note(f"{self._bundle.backend}: picture")
        try:
            found = unit(decode(self._bundle, latents))
        except EngineError as error:
            return Verdict(boundary.value, bound, None, steps=steps, fault=error.summary)
        self.pictures = picture, found
        return compare_image(boundary.value, picture, found, bound, steps=steps)

    def recorded(self) -> Iterator[Verdict]:
        """Yields the bundle's own reference samples, replayed."""
        phases = {record.phase.name: record.phase for record in self._bundle.manifest.phases}

        def note(verdict: Verdict) -> None:
            if verdict.phase in phases:
                self._meter.start(phases[verdict.phase], f"recorded samples: {verdict.phase}")

        for verdict in check(self._bundle, progress=note).verdicts:
            yield replace(verdict, boundary=_RECORDED[verdict.boundary].value)
