"""The fields of a bundle's manifest: what it computes, for which pictures, and which files it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import Fields
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.format.record_codec import LATER, OMITTED, BundlePath, Float, Form, Positive, whole, wholes
from hidiff_runtime.format.specs import (
    CONTROLNET,
    STEP,
    UNGUIDED_CONTROLNET,
    UNGUIDED_STEP,
    GraphRecord,
    ListedFile,
    PhaseRecord,
    TextEncoderRecord,
    VaeRecord,
    tensors_beside,
)
from hidiff_runtime.phases import Phase, PhaseRule, StepRange
from hidiff_runtime.reused_features import Reuse

FORMAT = 2
"""The newest bundle format this runtime reads, and the one that is written."""


Latent = Annotated[tuple[int, int, int], wholes(3, "must be channels, height and width", least=1)]


def _rule(fields: Fields, name: str) -> PhaseRule:
    return fields.nested(name, _rule_fields)


def _rule_fields(fields: Fields) -> PhaseRule:
    def span(key: str) -> StepRange:
        value = fields.take(key)
        numbers = isinstance(value, list) and all(type(end) in (int, float) for end in value)
        if not numbers or len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
            raise fields.wrong(key, "must be null or two rising fractions from 0 to 1", value)
        return StepRange(float(value[0]), float(value[1]))

    def share(key: str) -> float:
        value = fields.number(key)
        if not 0 <= value <= 1:
            raise fields.wrong(key, "must be null or a fraction from 0 to 1", value)
        return value

    def reuse(key: str) -> Reuse:
        return fields.nested(key, lambda inner: Reuse(inner.whole("every", 2), inner.whole("depth", 1)))

    return PhaseRule(
        strided=fields.optional("strided", span),
        pooled=fields.optional("pooled", span),
        control=fields.optional("control", share),
        guidance=span("guidance") if "guidance" in fields else None,
        reuse=reuse("reuse") if "reuse" in fields else None,
    )


def _rule_content(rule: PhaseRule) -> dict[str, Any]:
    # Fractions are written as they are read, 0 as 0.0, or the digest would be another once the manifest was read.
    def span(steps: StepRange | None) -> list[float] | None:
        return None if steps is None else [float(steps.start), float(steps.end)]

    control = None if rule.control is None else float(rule.control)
    less = {
        **({} if rule.guidance is None else {"guidance": span(rule.guidance)}),
        **({} if rule.reuse is None else {"reuse": vars(rule.reuse)}),
    }
    return {"strided": span(rule.strided), "pooled": span(rule.pooled), "control": control, **less}


@dataclass(frozen=True, kw_only=True)
class BucketRecord:
    """What a bundle holds for pictures of one size, so many of them a run.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        batch: pictures of one run.
        rule: which phase runs at which step.
        latent: channels, height and width of the latents that are denoised.
        windowed_blocks: names of the blocks with shifted windows, in execution order; one shift each.
        phases: in running order.
        controlnet: takes the inputs of a phase that it shares, ``control_image`` and ``conditioning_scale``, and gives
            the residuals; left out where they come from outside or not at all.
        step: what follows an evaluation, for a device to do: see `hidiff_runtime.format.step_graph`; without it the
            host does.
        unguided_controlnet: the ControlNet for phases without guidance, where any of them has control.
        unguided_step: the step graph after phases without guidance, where there are any.
        vae: left out where latents come out.
        reference: path of the reference samples' index, if they were recorded.
    """

    width: Annotated[int, whole(8)]
    height: Annotated[int, whole(8)]
    batch: Positive
    rule: Annotated[PhaseRule, Form(_rule, _rule_content)]
    latent: Latent
    windowed_blocks: tuple[str, ...]
    phases: tuple[PhaseRecord, ...]
    controlnet: GraphRecord | None = None
    step: GraphRecord | None = field(default=None, metadata=LATER)
    vae: VaeRecord | None = field(default=None, metadata=LATER)
    unguided_controlnet: GraphRecord | None = field(default=None, metadata=OMITTED)
    unguided_step: GraphRecord | None = field(default=None, metadata=OMITTED)
    reference: BundlePath | None = None


@dataclass(frozen=True, kw_only=True)
class SharedRecord:
    """What a bundle holds once, whatever the size of its pictures.

    Args:
        tools: versions of what built it, ``hidiff-runtime`` among them.
        recipe: the recipe as it was resolved, for people and for rebuilding.
        family: model family, for example ``sdxl``.
        task: for example ``text-to-image``.
        guidance: whether each evaluation carries the negative prompt too, which doubles the graphs' batch.
        precision: of the weights: ``float32``, ``float16`` or ``bfloat16``.
        samplers: sampler name to the path of its table.
        default_sampler: one of ``samplers``.
        steps: the step counts every table holds, rising.
        weights: model name (``unet``, ``controlnet``, ``text_encoder``, …) to the path of its weight store.
        text_encoders: in the order in which their embeddings are joined; none where prompts come as embeddings.
        guidance_rescale: 0 to 1, of runs that do not say; see `hidiff_runtime.denoising.conditioning.guided`.
        force_zeros_for_empty_prompt: whether SDXL's prompts without a negative one have zeros in the place of its
            embeddings, and not the empty prompt's.
        forecast: which evaluations of a run are not computed but forecast; None where all are computed.
        timing: what a phase of the first bucket begins with, by which backends are timed where a bundle has several.
        report: path of the parity report, if there is one.
        fingerprints: content fingerprints of what the bundle was built from.
        files: every file of the bundle but the manifest, by relative path.
    """

    tools: Mapping[str, str]
    recipe: Mapping[str, Any]
    family: str
    task: str
    guidance: bool
    precision: str
    samplers: Mapping[str, BundlePath]
    default_sampler: str
    steps: tuple[Positive, ...]
    weights: Mapping[str, BundlePath]
    files: Mapping[str, ListedFile]
    text_encoders: tuple[TextEncoderRecord, ...] = field(default=(), metadata=LATER)
    guidance_rescale: Float = field(default=0.0, metadata=OMITTED)
    force_zeros_for_empty_prompt: bool = field(default=True, metadata=OMITTED)
    forecast: Forecast | None = field(default=None, metadata=OMITTED)
    timing: GraphRecord | None = field(default=None, metadata=OMITTED)
    report: BundlePath | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ManifestRecord(SharedRecord, BucketRecord):
    """What a bundle holds for one bucket: its own and what all share; the whole manifest in format 1."""

    @property
    def bucket(self) -> str:
        """What the bucket is called: its size, and its batch where that is not one picture."""
        return f"{self.width}x{self.height}" + (f", batch {self.batch}" if self.batch > 1 else "")

    @property
    def graph_batch(self) -> int:
        """Batch of the guided phases' graphs: each picture's latents, with guidance twice."""
        return self.batch * (1 + self.guidance)

    def batch_of(self, phase: Phase) -> int:
        """Returns the batch of a phase's graph: without the negative prompts where the phase is not guided."""
        return self.batch if phase.unguided else self.graph_batch

    def phase(self, phase: Phase) -> PhaseRecord:
        """Returns the record of ``phase``.

        Raises:
            BundleError: the bundle has no such phase.
        """
        for record in self.phases:
            if record.phase == phase:
                return record
        raise BundleError(
            f"The bundle has no graph for the phase {phase.name}.",
            given=", ".join(record.phase.name for record in self.phases),
            advice="Build it again with this step count among the recipe's steps.",
        )

    def step_of(self, phase: Phase) -> GraphRecord | None:
        """Returns the step graph that follows a phase; None where the host takes steps."""
        return self.unguided_step if phase.unguided else self.step

    def controlnet_of(self, phase: Phase) -> GraphRecord | None:
        """Returns the ControlNet's graph that runs beside a phase; None where none does."""
        if not phase.control:
            return None
        return self.unguided_controlnet if phase.unguided else self.controlnet

    def others(self) -> Iterable[tuple[str, GraphRecord]]:
        """Returns the graphs beside the phases', by the name of their engine."""
        single = {
            CONTROLNET: self.controlnet,
            UNGUIDED_CONTROLNET: self.unguided_controlnet,
            STEP: self.step,
            UNGUIDED_STEP: self.unguided_step,
        }
        yield from ((name, record) for name, record in single.items() if record is not None)
        yield from ((record.name, record) for record in self.text_encoders)
        if self.vae is not None:
            yield from (("vae_decoder", self.vae.decoder), ("vae_encoder", self.vae.encoder))

    def paths(self) -> Iterable[tuple[str, str]]:
        """Returns every path that the manifest refers to for this bucket, with the field that does."""
        yield from (*self.own_paths(), *self.shared_paths())

    def own_paths(self) -> Iterable[tuple[str, str]]:
        """Returns the paths of what is the bucket's own."""
        encoders = {record.name for record in self.text_encoders}
        graphs: dict[str, GraphRecord] = {f"phases[{index}]": record for index, record in enumerate(self.phases)}
        graphs |= {key: record for key, record in self.others() if key not in encoders}
        yield from _graph_paths(graphs)
        if self.reference is not None:
            yield from (("reference", path) for path in (self.reference, tensors_beside(self.reference)))

    def shared_paths(self) -> Iterable[tuple[str, str]]:
        """Returns the paths of what there is once."""
        yield from _graph_paths({record.name: record for record in self.text_encoders})
        if self.timing is not None:
            yield from _graph_paths({"timing": self.timing})
        yield from ((f"{encoder.name}.tokenizer", encoder.tokenizer) for encoder in self.text_encoders)
        yield from ((f"samplers.{name}", path) for name, path in self.samplers.items())
        yield from ((f"weights.{name}", path) for name, path in self.weights.items())
        if self.report is not None:
            yield "report", self.report


def _graph_paths(graphs: Mapping[str, GraphRecord]) -> Iterable[tuple[str, str]]:
    for key, record in graphs.items():
        yield f"{key}.graph", record.graph
        yield from ((f"{key}.engines.{name}", path) for name, path in record.engines.items())
