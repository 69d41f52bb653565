"""The bundle's table of contents: what it computes, which files it is made of, and what each file must hash to.

``manifest.json`` is written last, so a folder without one was never finished. It carries a digest of its own
content, since no other file could vouch for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import FLOAT32_MAX, LARGEST_JSON, Fields, parse_object
from hidiff_runtime.format.paths import path_error
from hidiff_runtime.format.regular_files import read_regular
from hidiff_runtime.format.specs import (
    DTYPES,
    FileDigest,
    GraphRecord,
    PhaseRecord,
    TensorSpec,
    TextEncoderRecord,
    VaeRecord,
    tensors_beside,
)
from hidiff_runtime.format.validation import validate_manifest
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule, StepRange

__all__ = ["DTYPES", "FORMAT", "MANIFEST", "FileDigest", "GraphRecord", "Manifest", "PhaseRecord", "TensorSpec"]

FORMAT = 1
"""The newest bundle format this runtime reads."""

MANIFEST = "manifest.json"
"""The manifest's name in a bundle's folder."""

_ZEROS = "force_zeros_for_empty_prompt"


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle.

    Args:
        tools: versions of what built it, ``hidiff-runtime`` among them.
        recipe: the recipe as it was resolved, for people and for rebuilding.
        family: model family, for example ``sdxl``.
        task: for example ``text-to-image``.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        batch: pictures of one run.
        guidance: whether each evaluation carries the negative prompt too, which doubles the graphs' batch.
        precision: of the weights: ``float32``, ``float16`` or ``bfloat16``.
        rule: which phase runs at which step.
        latent: channels, height and width of the latents that are denoised.
        windowed_blocks: names of the blocks with shifted windows, in execution order; one shift each.
        phases: in running order.
        samplers: sampler name to the path of its table.
        default_sampler: one of ``samplers``.
        steps: the step counts every table holds, rising.
        weights: model name (``unet``, ``controlnet``, ``text_encoder``, …) to the path of its weight store.
        controlnet: takes the inputs of a phase that it shares, ``control_image`` and ``conditioning_scale``, and gives
            the residuals; left out where they come from outside or not at all.
        step: what follows an evaluation, for a device to do: see `hidiff_runtime.format.step_graph`; without it the
            host does.
        text_encoders: in the order in which their embeddings are joined; none where prompts come as embeddings.
        vae: left out where latents come out.
        guidance_rescale: 0 to 1, of runs that do not say; see `hidiff_runtime.denoising.conditioning.guided`.
        force_zeros_for_empty_prompt: whether SDXL's prompts without a negative one have zeros in the place of its
            embeddings, and not the empty prompt's.
        reference: path of the reference samples' index, if they were recorded.
        report: path of the parity report, if there is one.
        fingerprints: content fingerprints of what the bundle was built from.
        files: every file of the bundle but the manifest, by relative path.
        format: of the bundle.
    """

    tools: Mapping[str, str]
    recipe: Mapping[str, Any]
    family: str
    task: str
    width: int
    height: int
    batch: int
    guidance: bool
    precision: str
    rule: PhaseRule
    latent: tuple[int, int, int]
    windowed_blocks: tuple[str, ...]
    phases: tuple[PhaseRecord, ...]
    samplers: Mapping[str, str]
    default_sampler: str
    steps: tuple[int, ...]
    weights: Mapping[str, str]
    files: Mapping[str, FileDigest]
    controlnet: GraphRecord | None = None
    step: GraphRecord | None = None
    text_encoders: tuple[TextEncoderRecord, ...] = ()
    vae: VaeRecord | None = None
    guidance_rescale: float = 0.0
    force_zeros_for_empty_prompt: bool = True
    reference: str | None = None
    report: str | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def phase(self, phase: Phase) -> PhaseRecord:
        """The record of ``phase``.

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

    def others(self) -> Iterable[tuple[str, GraphRecord]]:
        """The graphs beside the phases', by the name of their engine."""
        single = {"controlnet": self.controlnet, "step": self.step}
        yield from ((name, record) for name, record in single.items() if record is not None)
        yield from ((record.name, record) for record in self.text_encoders)
        if self.vae is not None:
            yield from (("vae_decoder", self.vae.decoder), ("vae_encoder", self.vae.encoder))

    def paths(self) -> Iterable[tuple[str, str]]:
        """Every path the manifest refers to, with the field that does."""
        graphs: dict[str, GraphRecord] = {f"phases[{index}]": record for index, record in enumerate(self.phases)}
        graphs |= dict(self.others())
        for key, record in graphs.items():
            yield f"{key}.graph", record.graph
            yield from ((f"{key}.engines.{name}", path) for name, path in record.engines.items())
        yield from ((f"{encoder.name}.tokenizer", encoder.tokenizer) for encoder in self.text_encoders)
        yield from ((f"samplers.{name}", path) for name, path in self.samplers.items())
        yield from ((f"weights.{name}", path) for name, path in self.weights.items())
        if self.reference is not None:
            yield from (("reference", path) for path in (self.reference, tensors_beside(self.reference)))
        if self.report is not None:
            yield "report", self.report

    def to_json(self) -> dict[str, Any]:
        """What ``manifest.json`` holds, the content's digest included. Keys may be written in any order."""
        data = _content(self)
        return {**data, "digest": _digest(data)}

    @property
    def digest(self) -> str:
        """SHA-256 of the content, which names every file's: the bundle's hash."""
        return _digest(_content(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Reads what :meth:`to_json` gave.

        Raises:
            BundleError: not a whole manifest of a format this runtime reads; the field is named.
        """
        _check_format(data)
        fields = Fields(data, MANIFEST)
        digest = fields.text("digest")
        manifest = _manifest(fields)
        fields.done()
        validate_manifest(manifest, fields)
        content = {key: value for key, value in data.items() if key != "digest"}
        if digest != _digest(content):
            raise fields.wrong(
                "digest", "does not match the content: the file was changed after it was written", digest
            )
        return manifest

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads the manifest at ``path``, a ``manifest.json`` or the bundle's folder.

        Raises:
            BundleError: there is none, or it is broken, foreign or of a newer format.
        """
        file = path / MANIFEST if os.path.isdir(path) else path  # noqa: PTH112 - never raises
        try:
            content = read_regular(file, LARGEST_JSON)
        except FileNotFoundError as error:
            raise BundleError(
                "This folder is not a finished bundle: it has no manifest.json.",
                given=path,
                advice="Give the folder that 'hidiff-export build RECIPE -o DIR' made, or run that again to finish it.",
            ) from error
        except OSError as error:
            raise BundleError(
                "manifest.json cannot be read.", given=error.strerror, advice="Check the file."
            ) from error
        return cls.from_json(parse_object(content, MANIFEST))


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_format(data: Mapping[str, Any]) -> None:
    found = data.get("format")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise BundleError(
            "This is not the manifest of a HiDiffusion bundle: it states no format.",
            given=f"format {found!r}, keys {sorted(data)[:8]}",
            advice="Give the folder that 'hidiff-export build' made.",
        )
    if found > FORMAT:
        tools = data.get("tools")
        version = tools.get("hidiff-runtime", "") if isinstance(tools, dict) else ""
        needed = f"hidiff-runtime>={version}" if version else "hidiff-runtime"
        raise BundleError(
            f"This bundle has format {found}; this hidiff-runtime reads formats up to {FORMAT}.",
            given=f"written for {needed}",
            advice=f"pip install --upgrade '{needed}'",
        )


def _content(manifest: Manifest) -> dict[str, Any]:
    # What is as it always was stays unwritten, so that an older bundle keeps its digest.
    later: dict[str, Any] = {}
    if manifest.guidance_rescale:
        later["guidance_rescale"] = float(manifest.guidance_rescale)
    if not manifest.force_zeros_for_empty_prompt:
        later[_ZEROS] = False
    return {
        **later,
        "format": manifest.format,
        "tools": dict(manifest.tools),
        "recipe": dict(manifest.recipe),
        "family": manifest.family,
        "task": manifest.task,
        "width": manifest.width,
        "height": manifest.height,
        "batch": manifest.batch,
        "guidance": manifest.guidance,
        "precision": manifest.precision,
        "rule": _rule_content(manifest.rule),
        "latent": list(manifest.latent),
        "windowed_blocks": list(manifest.windowed_blocks),
        "phases": [_phase_content(record) for record in manifest.phases],
        "controlnet": None if manifest.controlnet is None else _graph_content(manifest.controlnet),
        "step": None if manifest.step is None else _graph_content(manifest.step),
        "text_encoders": [_text_encoder_content(record) for record in manifest.text_encoders],
        "vae": None if manifest.vae is None else _vae_content(manifest.vae),
        "samplers": dict(manifest.samplers),
        "default_sampler": manifest.default_sampler,
        "steps": list(manifest.steps),
        "weights": dict(manifest.weights),
        "reference": manifest.reference,
        "report": manifest.report,
        "fingerprints": dict(manifest.fingerprints),
        "files": {path: {"size": file.size, "sha256": file.sha256} for path, file in sorted(manifest.files.items())},
    }


def _rule_content(rule: PhaseRule) -> dict[str, Any]:
    # Fractions are written as they are read, 0 as 0.0, or the digest would be another once the manifest was read.
    def span(steps: StepRange | None) -> list[float] | None:
        return None if steps is None else [float(steps.start), float(steps.end)]

    control = None if rule.control is None else float(rule.control)
    return {"strided": span(rule.strided), "pooled": span(rule.pooled), "control": control}


def _phase_content(record: PhaseRecord) -> dict[str, Any]:
    return {"kind": record.phase.kind.value, "control": record.phase.control, **_graph_content(record)}


def _graph_content(record: GraphRecord) -> dict[str, Any]:
    def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype} for spec in specs]

    return {
        "graph": record.graph,
        "engines": dict(record.engines),
        "inputs": tensors(record.inputs),
        "outputs": tensors(record.outputs),
    }


def _text_encoder_content(record: TextEncoderRecord) -> dict[str, Any]:
    own = {"name": record.name, "tokenizer": record.tokenizer, "clip_skip": record.clip_skip}
    return {**own, **_graph_content(record)}


def _vae_content(record: VaeRecord) -> dict[str, Any]:
    return {
        "decoder": _graph_content(record.decoder),
        "encoder": _graph_content(record.encoder),
        "scaling_factor": float(record.scaling_factor),
        "overlap": record.overlap,
        "preview": [list(map(float, row)) for row in record.preview],
    }


def _manifest(fields: Fields) -> Manifest:
    latent = fields.wholes("latent", 1)
    if len(latent) != 3:
        raise fields.wrong("latent", "must be channels, height and width", latent)
    return Manifest(
        format=fields.whole("format", 1),
        tools=fields.named("tools", Fields.text),
        recipe=fields.mapping("recipe"),
        family=fields.text("family"),
        task=fields.text("task"),
        width=fields.whole("width", 8),
        height=fields.whole("height", 8),
        batch=fields.whole("batch", 1),
        guidance=fields.flag("guidance"),
        precision=fields.text("precision"),
        rule=fields.nested("rule", _rule),
        latent=(latent[0], latent[1], latent[2]),
        windowed_blocks=fields.texts("windowed_blocks"),
        phases=fields.each("phases", _phase),
        controlnet=fields.optional("controlnet", lambda key: fields.nested(key, _graph)),
        step=fields.optional("step", lambda key: fields.nested(key, _graph)) if "step" in fields else None,
        text_encoders=fields.each("text_encoders", _text_encoder) if "text_encoders" in fields else (),
        vae=fields.optional("vae", lambda key: fields.nested(key, _vae)) if "vae" in fields else None,
        samplers=fields.named("samplers", _path),
        default_sampler=fields.text("default_sampler"),
        steps=fields.wholes("steps", 1),
        weights=fields.named("weights", _path),
        guidance_rescale=fields.number("guidance_rescale") if "guidance_rescale" in fields else 0.0,
        force_zeros_for_empty_prompt=fields.flag(_ZEROS) if _ZEROS in fields else True,
        reference=fields.optional("reference", lambda key: _path(fields, key)),
        report=fields.optional("report", lambda key: _path(fields, key)),
        fingerprints=fields.named("fingerprints", Fields.text),
        files=fields.named("files", _file),
    )


def _rule(fields: Fields) -> PhaseRule:
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

    return PhaseRule(
        strided=fields.optional("strided", span),
        pooled=fields.optional("pooled", span),
        control=fields.optional("control", share),
    )


def _phase(fields: Fields) -> PhaseRecord:
    kind = fields.text("kind")
    if kind not in {known.value for known in PhaseKind}:
        raise fields.wrong("kind", f"must be one of {', '.join(known.value for known in PhaseKind)}", kind)
    graph = _graph(fields)
    phase = Phase(PhaseKind(kind), fields.flag("control"))
    return PhaseRecord(graph.graph, graph.engines, graph.inputs, graph.outputs, phase)


def _text_encoder(fields: Fields) -> TextEncoderRecord:
    graph = _graph(fields)
    return TextEncoderRecord(
        graph.graph,
        graph.engines,
        graph.inputs,
        graph.outputs,
        name=fields.text("name"),
        tokenizer=_path(fields, "tokenizer"),
        clip_skip=fields.whole("clip_skip"),
    )


def _vae(fields: Fields) -> VaeRecord:
    rows = fields.take("preview")
    lists = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 3 for row in rows)
    if not lists or not all(type(value) in (int, float) and abs(value) <= FLOAT32_MAX for row in rows for value in row):
        raise fields.wrong("preview", "must be rows of three numbers that float32 can hold", rows)
    return VaeRecord(
        decoder=fields.nested("decoder", _graph),
        encoder=fields.nested("encoder", _graph),
        scaling_factor=fields.number("scaling_factor"),
        overlap=fields.whole("overlap"),
        preview=tuple((float(red), float(green), float(blue)) for red, green, blue in rows),
    )


def _graph(fields: Fields) -> GraphRecord:
    return GraphRecord(
        graph=_path(fields, "graph"),
        engines=fields.named("engines", _path),
        inputs=fields.each("inputs", _tensor),
        outputs=fields.each("outputs", _tensor),
    )


def _tensor(fields: Fields) -> TensorSpec:
    spec = TensorSpec(fields.text("name"), fields.shape("shape"), fields.text("dtype"))
    if spec.dtype not in DTYPES:
        raise fields.wrong("dtype", f"must be one of {', '.join(DTYPES)}", spec.dtype)
    return spec


def _file(fields: Fields, key: str) -> FileDigest:
    fault = path_error(key)
    if fault:
        raise fields.wrong(repr(key), fault, key)
    record = fields.nested(key, FileDigest.from_fields)
    if len(record.sha256) != 64 or set(record.sha256) - set("0123456789abcdef"):
        raise fields.wrong(f"{key}.sha256", "must be 64 hexadecimal digits", record.sha256)
    return record


def _path(fields: Fields, key: str) -> str:
    path = fields.text(key)
    fault = path_error(path)
    if fault:
        raise fields.wrong(key, fault, path)
    return path
