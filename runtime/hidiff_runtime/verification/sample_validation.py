"""Whether reference samples are of the bundle that they lie in: asked before an array is made or an engine opened."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hidiff_runtime.denoising.conditioning import EMBEDDINGS, INPAINTING, takes_channels
from hidiff_runtime.format.codec import Fields
from hidiff_runtime.format.validation import WINDOW_SHIFTS
from hidiff_runtime.reused_features import DEEP_FEATURES
from hidiff_runtime.verification.reference_samples import (
    INDEX,
    CallSample,
    Drawn,
    Expected,
    NetworkSample,
    PictureSample,
    ReferenceSamples,
    RunSample,
    Source,
)

if TYPE_CHECKING:
    from hidiff_runtime.errors import BundleError
    from hidiff_runtime.format.manifest import Manifest
    from hidiff_runtime.format.specs import TensorSpec

_Shape = tuple[int, ...]
_Tensor = tuple[_Shape, str]
"""Shape and type."""

_CONTROL_IMAGE = "control_image"


def check_samples(manifest: Manifest, samples: ReferenceSamples) -> None:
    """Refuses samples whose names, shapes or types are not those of the bundle's graphs and runs.

    Raises:
        BundleError: the sample at fault is named.
    """
    check = _Check(samples, manifest)
    for index, call in enumerate(samples.calls):
        check.call(call, f"calls[{index}]")
    for index, run in enumerate(samples.runs):
        check.run(run, f"runs[{index}]")
    for index, network in enumerate(samples.networks):
        check.network(network, f"networks[{index}]")
    for index, picture in enumerate(samples.pictures):
        check.picture(picture, f"pictures[{index}]")


class _Check:
    """The samples, and what they have to fit."""

    def __init__(self, samples: ReferenceSamples, manifest: Manifest) -> None:
        self._samples = samples
        self._manifest = manifest
        self._phases = {record.phase: record for record in manifest.phases}
        self._networks = dict(manifest.others())

    def call(self, call: CallSample, where: str) -> None:
        """Checks one evaluation of one of the phases."""
        record = self._phases.get(call.phase)
        if record is None:
            raise _wrong(f"{where}.kind", "must be a phase of the bundle", call.phase.name)
        due = _tensors(record.inputs)
        shifts = due.pop(WINDOW_SHIFTS, ((0,), ""))[0]
        if len(call.window_shifts) != math.prod(shifts):
            raise _wrong(f"{where}.{WINDOW_SHIFTS}", f"must be {math.prod(shifts)} shifts", call.window_shifts)
        self._check_sources(call.inputs, due, f"{where}.inputs")
        self._check_expected(call.expected, record.outputs[0].shape, f"{where}.expected")
        if call.features is not None:
            given = record.output(DEEP_FEATURES)
            if given is None:
                raise _wrong(f"{where}.features", "must be of a phase that gives them", call.phase.name)
            self._check_expected(call.features, given.shape, f"{where}.features")

    def run(self, run: RunSample, where: str) -> None:
        """Checks a whole run: what a caller of the denoiser could have asked for."""
        manifest = self._manifest
        if run.sampler not in manifest.samplers:
            raise _wrong(f"{where}.sampler", f"must be one of {', '.join(manifest.samplers)}", run.sampler)
        if run.steps not in manifest.steps:
            raise _wrong(f"{where}.steps", "must be a tabulated number of steps", run.steps)
        for key, value in (("eta", run.eta), ("guidance_rescale", run.guidance_rescale)):
            if not 0 <= value <= 1:
                raise _wrong(f"{where}.{key}", "must be from 0 to 1", value)
        if (run.guidance_scale is not None) != manifest.guidance or run.guidance_rescale > manifest.guidance:
            rule = "and guidance_rescale must be given exactly where the bundle has guidance"
            raise _wrong(f"{where}.guidance_scale", rule, [run.guidance_scale, run.guidance_rescale])
        needed, others = dict(self._needed(run)), dict(self._optional())
        due = needed | {name: shape for name, shape in others.items() if name in run.inputs}
        self._check_sources(run.inputs, {name: (shape, "float32") for name, shape in due.items()}, f"{where}.inputs")
        takes = run.control or manifest.controlnet is None
        residuals = next((record.residuals for record in manifest.phases if record.phase.control), ())
        self._check_sources(run.control, _tensors(residuals) if takes else {}, f"{where}.control")
        batch = (manifest.batch, *manifest.latent)
        self._check_expected(run.expected, batch, f"{where}.expected")
        for index, expected in enumerate(run.trajectory):
            self._check_expected(expected, batch, f"{where}.trajectory[{index}]")

    def network(self, sample: NetworkSample, where: str) -> None:
        """Checks one evaluation of a text encoder, or of half of the VAE."""
        record = self._networks.get(sample.network)
        if record is None or not sample.network.startswith(("text_encoder", "vae_")):
            raise _wrong(f"{where}.network", "must be a text encoder of the bundle, or half of its VAE", sample.network)
        self._check_sources(sample.inputs, _tensors(record.inputs), f"{where}.inputs")
        due = _tensors(record.outputs)
        if sample.expected.keys() != due.keys():
            raise _wrong(f"{where}.expected", f"must hold {', '.join(due)}", sorted(sample.expected))
        for name, expected in sample.expected.items():
            self._check_expected(expected, due[name][0], f"{where}.expected.{name}")
        if sample.prompt is not None and not sample.network.startswith("text_encoder"):
            raise _wrong(f"{where}.prompt", "must be null where no text goes in", sample.prompt)

    def picture(self, sample: PictureSample, where: str) -> None:
        """Checks part of a run's first tile."""
        manifest = self._manifest
        if manifest.vae is None or sample.run >= len(self._samples.runs):
            raise _wrong(f"{where}.run", "must be the number of a run, of a bundle with a VAE", sample.run)
        tile = manifest.vae.decoder.outputs[0].shape[2:]
        shape, dtype = self._stored(sample.tensor)
        known = len(shape) == 4 and shape[:2] == (manifest.batch, 3) and 0 not in shape and dtype == "float32"
        ends = [first + size for first, size in zip(sample.corner, shape[2:], strict=False)]
        if not known or any(end > side for end, side in zip(ends, tile, strict=True)):
            raise _wrong(where, f"must be a part of a tile of {list(tile)} pixels", [sample.corner, list(shape)])

    def _needed(self, run: RunSample) -> Iterator[tuple[str, _Shape]]:
        """Yields what a run has to be given by name, and its shape."""
        manifest = self._manifest
        batch, (channels, *size) = manifest.batch, manifest.latent
        for name, shape in self._embeddings():
            if "time_ids" not in name:
                yield name, shape
        if takes_channels(manifest):
            yield from ((name, (batch, depth, *size)) for name, depth in zip(INPAINTING, (1, channels), strict=True))
        if manifest.controlnet is not None and not run.control:
            yield _CONTROL_IMAGE, (batch, 3, manifest.height, manifest.width)

    def _optional(self) -> Iterator[tuple[str, _Shape]]:
        """Yields what a run may be given besides."""
        batch, (channels, *size) = self._manifest.batch, self._manifest.latent
        yield from ((name, shape) for name, shape in self._embeddings() if "time_ids" in name)
        yield "latents", (batch, channels, *size)

    def _embeddings(self) -> Iterator[tuple[str, _Shape]]:
        for name in EMBEDDINGS:
            spec = self._manifest.phases[0].input(name)
            if spec is not None:
                for prefix in ("", "negative_")[: 1 + self._manifest.guidance]:
                    yield f"{prefix}{name}", (self._manifest.batch, *spec.shape[1:])

    def _check_sources(self, sources: Mapping[str, Source], due: Mapping[str, _Tensor], where: str) -> None:
        if sources.keys() != due.keys():
            raise _wrong(where, f"must hold {', '.join(sorted(due)) or 'nothing'}", sorted(sources))
        for name, source in sources.items():
            found = self._given(source)
            if found != due[name]:
                raise _wrong(f"{where}.{name}", f"must be {due[name][1]}{list(due[name][0])}", found)

    def _given(self, source: Source) -> _Tensor:
        """Returns what the array is that a source stands for."""
        if isinstance(source, Drawn):
            return source.shape, "float32"
        shape, dtype = self._stored(source.tensor)
        repeated = (shape[0] * source.repeat, *shape[1:]) if shape else ()
        return repeated, "float32" if dtype == "float16" else dtype

    def _check_expected(self, expected: Expected, shape: _Shape, where: str) -> None:
        """Refuses what is not all of an output, nor as many of its values as there are positions."""
        stored, dtype = self._stored(expected.tensor)
        due = shape
        if expected.positions is not None:
            positions = self._samples.tensors[expected.positions]
            known = positions.dtype.kind == "i" and positions.ndim == 1 and positions.size > 0
            if not known or positions.min() < 0 or positions.max() >= math.prod(shape):
                raise _wrong(f"{where}.positions", f"must be places in {list(shape)}", expected.positions)
            due = positions.shape
        if expected.shape != shape or stored != due or dtype != "float32":
            given = f"{list(expected.shape)}, stored as {dtype}{list(stored)}"
            raise _wrong(where, f"must be of an output {list(shape)}, stored as float32{list(due)}", given)

    def _stored(self, name: str) -> _Tensor:
        tensor = self._samples.tensors[name]
        return tensor.shape, str(tensor.dtype)


def _tensors(specs: tuple[TensorSpec, ...]) -> dict[str, _Tensor]:
    return {spec.name: (spec.shape, spec.dtype) for spec in specs}


def _wrong(where: str, rule: str, given: Any) -> BundleError:
    return Fields({}, INDEX).wrong(where, rule, given)
