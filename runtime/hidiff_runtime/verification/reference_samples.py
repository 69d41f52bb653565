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
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import REBUILD, Fields, read_object
from hidiff_runtime.format.record_codec import (
    FLAT,
    LATER,
    OMITTED,
    UNWRITTEN,
    Form,
    Positive,
    Shape,
    decode,
    encode,
    whole,
    wholes,
)
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.format.specs import SAMPLE_TENSORS
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampling.torch_rng import SEED_MAX, SEED_MIN, TorchGenerator
from hidiff_runtime.verification.comparison import Bound
from hidiff_runtime.verification.scheduler_samples import SamplerSample

Array = NDArray[Any]

INDEX = "samples.json"
TENSORS = SAMPLE_TENSORS

LONGEST_PROMPT = 10_000
"""Characters of a sample's prompt."""

Seed = Annotated[int, whole(SEED_MIN, SEED_MAX)]


def _prompt(fields: Fields, name: str) -> str:
    prompt = fields.text(name)
    if len(prompt) > LONGEST_PROMPT:
        raise fields.wrong(name, f"must have at most {LONGEST_PROMPT} characters", len(prompt))
    return prompt


Prompt = Annotated[str, Form(_prompt)]
Corner = Annotated[tuple[int, int], wholes(2, "must be a row and a column")]
Shift = Annotated[int, whole(0, 3)]


@dataclass(frozen=True)
class Stored:
    """An input kept in the file under ``tensor``, ``repeat`` times along its first axis.

    A float16 tensor stands for its exact float32 values: the reference was computed from those.
    """

    tensor: str
    repeat: Positive = 1


@dataclass(frozen=True)
class Drawn:
    """An input of noise: ``scale`` times ``torch.randn(shape)`` of a CPU generator seeded with ``seed``.

    With ``uniform`` it is ``torch.rand(shape)``, from 0 to 1, as a picture's values are.
    """

    seed: Seed
    shape: Shape
    scale: float = 1.0
    uniform: bool = False

    def array(self) -> NDArray[np.float32]:
        """Returns the noise, float32."""
        generator = TorchGenerator(self.seed)
        draw = generator.rand if self.uniform else generator.randn
        noise: NDArray[np.float32] = draw(self.shape) * np.float32(self.scale)
        return noise


def _source(fields: Fields, name: str) -> Stored | Drawn:
    def read(inner: Fields) -> Stored | Drawn:
        return decode(Drawn, inner) if "seed" in inner else decode(Stored, inner)

    return fields.nested(name, read)


Source = Annotated[Stored | Drawn, Form(_source)]


@dataclass(frozen=True)
class Expected:
    """An output kept under ``tensor``: whole, or at the flat indices that the tensor ``positions`` lists."""

    tensor: str
    shape: Shape
    positions: str | None = None


@dataclass(frozen=True)
class CallSample:
    """One evaluation of one phase.

    Args:
        phase: which graph.
        step: logical step it stands for, from 0.
        steps: of the run that step belongs to.
        window_shifts: 0 to 3 for each windowed block, in execution order; row after row where the graph takes several.
        inputs: every other graph input by name.
        expected: ``noise_pred`` of the reference.
        features: its ``deep_features``, where the phase gives them and the reference was asked.
    """

    phase: Phase = field(metadata=FLAT)
    step: int
    steps: Positive
    window_shifts: tuple[Shift, ...]
    inputs: Mapping[str, Source]
    expected: Expected
    features: Expected | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class RunSample:
    """A whole run.

    Args:
        steps: asked of the sampler.
        sampler: its name in the bundle.
        seed: of the run's random stream.
        guidance_scale: as given to the denoiser; ``None`` for a bundle without guidance.
        guidance_rescale: as given to the denoiser; 0 in samples of older bundles, which do not say.
        eta: as given to the denoiser.
        inputs: arrays given to the denoiser by keyword: ``prompt_embeds``, ``latents``, …
        control: ControlNet residuals by input name, the same at each step that takes them.
        expected: the final latents.
        trajectory: the latents after each logical step, or empty.
    """

    steps: Positive
    sampler: str
    seed: Seed
    guidance_scale: float | None
    guidance_rescale: float = field(default=0.0, kw_only=True, metadata=LATER)
    eta: float
    inputs: Mapping[str, Source]
    control: Mapping[str, Source]
    expected: Expected
    trajectory: tuple[Expected, ...] = ()


@dataclass(frozen=True)
class NetworkSample:
    """Checks one evaluation of a text encoder, or of half of the VAE.

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
    prompt: Prompt | None = None


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
    corner: Corner
    tensor: str


@dataclass(frozen=True)
class ReferenceSamples:
    """The samples of a bundle and the tensors they refer to.

    Args:
        samplers: of every sampler; none in bundles from before they were recorded.
        facts: fields of the manifest that no engine shows, as they were when the samples were recorded, see
            `hidiff_runtime.verification.manifest_facts`; empty likewise.
        origin: what computed them, for people: ``PyTorch 2.13.0, float32``.
        call_bound: what an engine's single evaluation must keep to.
        run_bound: what a whole run must keep to.
        calls: in the order of their phases.
        runs: whole runs, usually one.
        tensors: everything referred to.
        networks: of the text encoders and the VAE, where the bundle has them.
        pictures: of the runs, where it has a VAE.
    """

    samplers: tuple[SamplerSample, ...] = field(default=(), kw_only=True, metadata=OMITTED)
    facts: Mapping[str, Any] = field(default_factory=dict, kw_only=True, metadata=OMITTED)
    origin: str
    call_bound: Bound
    run_bound: Bound
    calls: tuple[CallSample, ...]
    runs: tuple[RunSample, ...]
    tensors: Mapping[str, Array] = field(repr=False, metadata=UNWRITTEN)
    networks: tuple[NetworkSample, ...] = field(default=(), metadata=LATER)
    pictures: tuple[PictureSample, ...] = field(default=(), metadata=LATER)

    def array(self, source: Source) -> Array:
        """Returns the input that ``source`` stands for; float16 is widened to float32."""
        if isinstance(source, Drawn):
            return source.array()
        stored = self.tensors[source.tensor]
        values = stored.astype(np.float32) if stored.dtype == np.float16 else stored
        return np.concatenate([values] * source.repeat) if source.repeat > 1 else values

    def reference(self, expected: Expected) -> Array:
        """Returns the stored part of an output: its own shape when whole, else one axis."""
        return self.tensors[expected.tensor]

    def candidate(self, expected: Expected, output: Array) -> Array:
        """Returns the part of ``output`` to compare; ``output`` itself when its shape is not the reference's."""
        if expected.positions is None or output.shape != expected.shape:
            return output
        return output.reshape(-1)[self.tensors[expected.positions]]

    @classmethod
    def read(cls, index: Path) -> ReferenceSamples:
        """Reads ``samples.json`` and the tensors beside it, which stay mapped, not copied.

        Raises:
            BundleError: a file is missing or broken, a field is wrong, or a tensor is not there.
        """
        fields = Fields(read_object(index, INDEX, "The reference samples"), INDEX)
        with SafetensorsFile.open(index.with_name(TENSORS)) as file:
            tensors = file.arrays()
        samples = decode(cls, fields, tensors=tensors)
        missing = sorted(samples.names() - tensors.keys())
        if missing:
            raise BundleError(f"{INDEX} refers to tensors that {TENSORS} lacks.", given=missing[:5], advice=REBUILD)
        return samples

    def names(self) -> set[str]:
        """Returns every tensor that some sample refers to."""
        samples: tuple[CallSample | RunSample, ...] = (*self.calls, *self.runs)
        sources = [source for sample in (*samples, *self.networks) for source in sample.inputs.values()]
        sources += [source for run in self.runs for source in run.control.values()]
        outputs = [sample.expected for sample in samples]
        outputs += [call.features for call in self.calls if call.features is not None]
        outputs += [expected for run in self.runs for expected in run.trajectory]
        outputs += [expected for sample in self.networks for expected in sample.expected.values()]
        names = {sample.tensor for sample in self.pictures}
        names |= {name for sample in self.samplers for name in sample.tensors().values()}
        names |= {source.tensor for source in sources if isinstance(source, Stored)}
        names |= {expected.tensor for expected in outputs}
        return names | {expected.positions for expected in outputs if expected.positions is not None}


def write_index(folder: Path, samples: ReferenceSamples) -> Path:
    """Writes ``samples.json`` into ``folder``."""
    path = folder / INDEX
    path.write_text(json.dumps(encode(samples), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
