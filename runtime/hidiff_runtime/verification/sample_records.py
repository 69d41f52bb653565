"""The kinds of reference samples, and how ``samples.json`` writes each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.format.codec import Fields
from hidiff_runtime.format.record_codec import FLAT, LATER, Form, Positive, Shape, decode, whole, wholes
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampling.torch_rng import SEED_MAX, SEED_MIN, TorchGenerator
from hidiff_runtime.verification.comparison import Bound

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
        window_shifts: 0 to 3 for each windowed block, in execution order.
        inputs: every other graph input by name.
        expected: ``noise_pred`` of the reference.
    """

    phase: Phase = field(metadata=FLAT)
    step: int
    steps: Positive
    window_shifts: tuple[Shift, ...]
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
