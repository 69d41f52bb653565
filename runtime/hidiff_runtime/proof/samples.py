"""Reference samples: what PyTorch computed when the bundle was built, to be asked of engines anywhere else.

``samples.json`` lists them, ``samples.safetensors`` beside it holds their tensors, each once however often it is used.
Three things keep them to a few megabytes whatever the picture's size: a tensor whose halves are equal (latents doubled
for guidance) is stored as one half and a ``repeat``; inputs that may be noise are stored as a seed; and a large output
is kept at a fixed random choice of its elements, which estimates the same ratio of signal to noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError
from hidiff_runtime.fields import REBUILD, Fields, read_object
from hidiff_runtime.phases import Phase, PhaseKind
from hidiff_runtime.proof.verdict import Bound
from hidiff_runtime.records import SAMPLE_TENSORS
from hidiff_runtime.rng import SEED_MAX, SEED_MIN, TorchGenerator
from hidiff_runtime.safetensors import SafetensorsFile

Array = NDArray[Any]

INDEX = "samples.json"
TENSORS = SAMPLE_TENSORS

LONGEST_PROMPT = 10_000
"""Characters of a sample's prompt."""


@dataclass(frozen=True)
class Stored:
    """An input kept in the file under ``tensor``, ``repeat`` times along its first axis.

    A float16 tensor stands for its exact float32 values: the reference was computed from those.
    """

    tensor: str
    repeat: int = 1


@dataclass(frozen=True)
class Drawn:
    """An input of noise: ``scale`` times ``torch.randn(shape)`` of a CPU generator seeded with ``seed``.

    With ``uniform`` it is ``torch.rand(shape)``, from 0 to 1, as a picture's values are.
    """

    seed: int
    shape: tuple[int, ...]
    scale: float = 1.0
    uniform: bool = False

    def array(self) -> NDArray[np.float32]:
        """The noise, float32."""
        generator = TorchGenerator(self.seed)
        draw = generator.rand if self.uniform else generator.randn
        noise: NDArray[np.float32] = draw(self.shape) * np.float32(self.scale)
        return noise


Source = Stored | Drawn


@dataclass(frozen=True)
class Expected:
    """An output kept under ``tensor``: whole, or at the flat indices that the tensor ``positions`` lists."""

    tensor: str
    shape: tuple[int, ...]
    positions: str | None = None


@dataclass(frozen=True)
class CallSample:
    """One evaluation of one phase.

    Args:
        phase: which graph.
        step: logical step it stands for, from 0.
        steps: of the run that step belongs to.
        window_shifts: 0 to 3 for each windowed block, in execution order.
        inputs: every other graph input by name.
        expected: ``noise_pred`` of the reference.
    """

    phase: Phase
    step: int
    steps: int
    window_shifts: tuple[int, ...]
    inputs: Mapping[str, Source]
    expected: Expected


@dataclass(frozen=True)
class RunSample:
    """A whole run.

    Args:
        steps: asked of the sampler.
        sampler: its name in the bundle.
        seed: of the run's random stream.
        guidance_scale: as given to the denoiser; ``None`` for a bundle without guidance.
        eta: as given to the denoiser.
        guidance_rescale: as given to the denoiser; 0 in samples of older bundles, which do not say.
        inputs: arrays given to the denoiser by keyword: ``prompt_embeds``, ``latents``, …
        control: ControlNet residuals by input name, the same at each step that takes them.
        expected: the final latents.
        trajectory: the latents after each logical step, or empty.
    """

    steps: int
    sampler: str
    seed: int
    guidance_scale: float | None
    eta: float
    inputs: Mapping[str, Source]
    control: Mapping[str, Source]
    expected: Expected
    trajectory: tuple[Expected, ...] = ()
    guidance_rescale: float = 0.0


@dataclass(frozen=True)
class NetworkSample:
    """One evaluation of a text encoder, or of half of the VAE.

    Args:
        network: its engine's name: ``text_encoder``, ``vae_decoder``, ...
        bound: what it must keep to.
        inputs: every graph input by name.
        expected: every output by name.
        prompt: what the tokens in ``input_ids`` were made from; only a text encoder has one.
    """

    network: str
    bound: Bound
    inputs: Mapping[str, Source]
    expected: Mapping[str, Expected]
    prompt: str | None = None


@dataclass(frozen=True)
class PictureSample:
    """Part of the picture that a run's latents become: the middle of their first tile, decoded by itself.

    Args:
        run: number of the run.
        bound: what it must keep to.
        corner: row and column of the part's first pixel.
        tensor: the part, float32 ``[batch, 3, height, width]``, from 0 to 1.
    """

    run: int
    bound: Bound
    corner: tuple[int, int]
    tensor: str


@dataclass(frozen=True)
class ReferenceSamples:
    """The samples of a bundle and the tensors they refer to.

    Args:
        origin: what computed them, for people: ``PyTorch 2.13.0, float32``.
        call_bound: what an engine's single evaluation must keep to.
        run_bound: what a whole run must keep to.
        calls: in the order of their phases.
        runs: whole runs, usually one.
        tensors: everything referred to.
        networks: of the text encoders and the VAE, where the bundle has them.
        pictures: of the runs, where it has a VAE.
    """

    origin: str
    call_bound: Bound
    run_bound: Bound
    calls: tuple[CallSample, ...]
    runs: tuple[RunSample, ...]
    tensors: Mapping[str, Array] = field(repr=False)
    networks: tuple[NetworkSample, ...] = ()
    pictures: tuple[PictureSample, ...] = ()

    def array(self, source: Source) -> Array:
        """The input that ``source`` stands for; float16 is widened to float32."""
        if isinstance(source, Drawn):
            return source.array()
        stored = self.tensors[source.tensor]
        values = stored.astype(np.float32) if stored.dtype == np.float16 else stored
        return np.concatenate([values] * source.repeat) if source.repeat > 1 else values

    def reference(self, expected: Expected) -> Array:
        """The stored part of an output: its own shape when whole, else one axis."""
        return self.tensors[expected.tensor]

    def candidate(self, expected: Expected, output: Array) -> Array:
        """The part of ``output`` to compare; ``output`` itself when its shape is not the reference's."""
        if expected.positions is None or output.shape != expected.shape:
            return output
        return output.reshape(-1)[self.tensors[expected.positions]]

    def to_json(self) -> dict[str, Any]:
        """What ``samples.json`` holds."""
        return {
            "origin": self.origin,
            "call_bound": self.call_bound.to_dict(),
            "run_bound": self.run_bound.to_dict(),
            "calls": [_call_content(call) for call in self.calls],
            "runs": [_run_content(run) for run in self.runs],
            "networks": [_network_content(sample) for sample in self.networks],
            "pictures": [_picture_content(sample) for sample in self.pictures],
        }

    @classmethod
    def read(cls, index: Path) -> ReferenceSamples:
        """Reads ``samples.json`` and the tensors beside it, which stay mapped, not copied.

        Raises:
            BundleError: a file is missing or broken, a field is wrong, or a tensor is not there.
        """
        fields = Fields(read_object(index, INDEX, "The reference samples"), INDEX)
        with SafetensorsFile.open(index.with_name(TENSORS)) as file:
            tensors = file.arrays()
        samples = cls(
            origin=fields.text("origin"),
            call_bound=fields.nested("call_bound", Bound.from_fields),
            run_bound=fields.nested("run_bound", Bound.from_fields),
            calls=fields.each("calls", _call),
            runs=fields.each("runs", _run),
            tensors=tensors,
            networks=fields.each("networks", _network) if "networks" in fields else (),
            pictures=fields.each("pictures", _picture) if "pictures" in fields else (),
        )
        fields.done()
        missing = sorted(samples.names() - tensors.keys())
        if missing:
            raise BundleError(f"{INDEX} refers to tensors that {TENSORS} lacks.", given=missing[:5], advice=REBUILD)
        return samples

    def names(self) -> set[str]:
        """Every tensor that some sample refers to."""
        samples: tuple[CallSample | RunSample, ...] = (*self.calls, *self.runs)
        sources = [source for sample in (*samples, *self.networks) for source in sample.inputs.values()]
        sources += [source for run in self.runs for source in run.control.values()]
        outputs = [sample.expected for sample in samples]
        outputs += [expected for run in self.runs for expected in run.trajectory]
        outputs += [expected for sample in self.networks for expected in sample.expected.values()]
        names = {sample.tensor for sample in self.pictures}
        names |= {source.tensor for source in sources if isinstance(source, Stored)}
        names |= {expected.tensor for expected in outputs}
        return names | {expected.positions for expected in outputs if expected.positions is not None}


def write_index(folder: Path, samples: ReferenceSamples) -> Path:
    """Writes ``samples.json`` into ``folder``."""
    path = folder / INDEX
    path.write_text(json.dumps(samples.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _source_content(source: Source) -> dict[str, Any]:
    if isinstance(source, Drawn):
        return {"seed": source.seed, "shape": list(source.shape), "scale": source.scale, "uniform": source.uniform}
    return {"tensor": source.tensor, "repeat": source.repeat}


def _expected_content(expected: Expected) -> dict[str, Any]:
    return {"tensor": expected.tensor, "shape": list(expected.shape), "positions": expected.positions}


def _call_content(call: CallSample) -> dict[str, Any]:
    return {
        "kind": call.phase.kind.value,
        "control": call.phase.control,
        "step": call.step,
        "steps": call.steps,
        "window_shifts": list(call.window_shifts),
        "inputs": {name: _source_content(source) for name, source in call.inputs.items()},
        "expected": _expected_content(call.expected),
    }


def _run_content(run: RunSample) -> dict[str, Any]:
    return {
        "steps": run.steps,
        "sampler": run.sampler,
        "seed": run.seed,
        "guidance_scale": run.guidance_scale,
        "guidance_rescale": run.guidance_rescale,
        "eta": run.eta,
        "inputs": {name: _source_content(source) for name, source in run.inputs.items()},
        "control": {name: _source_content(source) for name, source in run.control.items()},
        "expected": _expected_content(run.expected),
        "trajectory": [_expected_content(expected) for expected in run.trajectory],
    }


def _network_content(sample: NetworkSample) -> dict[str, Any]:
    return {
        "network": sample.network,
        "bound": sample.bound.to_dict(),
        "inputs": {name: _source_content(source) for name, source in sample.inputs.items()},
        "expected": {name: _expected_content(expected) for name, expected in sample.expected.items()},
        "prompt": sample.prompt,
    }


def _picture_content(sample: PictureSample) -> dict[str, Any]:
    return {
        "run": sample.run,
        "bound": sample.bound.to_dict(),
        "corner": list(sample.corner),
        "tensor": sample.tensor,
    }


def _source(fields: Fields, key: str) -> Source:
    def read(inner: Fields) -> Source:
        if "seed" in inner:
            shape = inner.shape("shape")
            return Drawn(inner.whole("seed", SEED_MIN, SEED_MAX), shape, inner.number("scale"), inner.flag("uniform"))
        return Stored(inner.text("tensor"), inner.whole("repeat", 1))

    return fields.nested(key, read)


def _expected(fields: Fields) -> Expected:
    return Expected(fields.text("tensor"), fields.shape("shape"), fields.optional("positions", fields.text))


def _call(fields: Fields) -> CallSample:
    kind = fields.text("kind")
    if kind not in {known.value for known in PhaseKind}:
        raise fields.wrong("kind", f"must be one of {', '.join(known.value for known in PhaseKind)}", kind)
    return CallSample(
        phase=Phase(PhaseKind(kind), fields.flag("control")),
        step=fields.whole("step"),
        steps=fields.whole("steps", 1),
        window_shifts=fields.wholes("window_shifts", 0, 3),
        inputs=fields.named("inputs", _source),
        expected=fields.nested("expected", _expected),
    )


def _run(fields: Fields) -> RunSample:
    return RunSample(
        steps=fields.whole("steps", 1),
        sampler=fields.text("sampler"),
        seed=fields.whole("seed", SEED_MIN, SEED_MAX),
        guidance_scale=fields.optional("guidance_scale", fields.number),
        eta=fields.number("eta"),
        inputs=fields.named("inputs", _source),
        control=fields.named("control", _source),
        expected=fields.nested("expected", _expected),
        trajectory=fields.each("trajectory", _expected),
        guidance_rescale=fields.number("guidance_rescale") if "guidance_rescale" in fields else 0.0,
    )


def _network(fields: Fields) -> NetworkSample:
    return NetworkSample(
        network=fields.text("network"),
        bound=fields.nested("bound", Bound.from_fields),
        inputs=fields.named("inputs", _source),
        expected=fields.named("expected", lambda inner, key: inner.nested(key, _expected)),
        prompt=fields.optional("prompt", lambda key: _prompt(fields, key)),
    )


def _prompt(fields: Fields, key: str) -> str:
    prompt = fields.text(key)
    if len(prompt) > LONGEST_PROMPT:
        raise fields.wrong(key, f"must have at most {LONGEST_PROMPT} characters", len(prompt))
    return prompt


def _picture(fields: Fields) -> PictureSample:
    corner = fields.wholes("corner")
    if len(corner) != 2:
        raise fields.wrong("corner", "must be a row and a column", corner)
    return PictureSample(
        run=fields.whole("run"),
        bound=fields.nested("bound", Bound.from_fields),
        corner=(corner[0], corner[1]),
        tensor=fields.text("tensor"),
    )
