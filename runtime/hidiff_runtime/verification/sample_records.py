"""The kinds of reference samples, and how ``samples.json`` writes each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.format.codec import Fields
from hidiff_runtime.phases import Phase, PhaseKind
from hidiff_runtime.sampling.torch_rng import SEED_MAX, SEED_MIN, TorchGenerator
from hidiff_runtime.verification.comparison import Bound

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


def _source_content(source: Source) -> dict[str, Any]:
    if isinstance(source, Drawn):
        return {"seed": source.seed, "shape": list(source.shape), "scale": source.scale, "uniform": source.uniform}
    return {"tensor": source.tensor, "repeat": source.repeat}


def _expected_content(expected: Expected) -> dict[str, Any]:
    return {"tensor": expected.tensor, "shape": list(expected.shape), "positions": expected.positions}


def call_content(call: CallSample) -> dict[str, Any]:
    """What ``samples.json`` says of an evaluation."""
    return {
        "kind": call.phase.kind.value,
        "control": call.phase.control,
        "step": call.step,
        "steps": call.steps,
        "window_shifts": list(call.window_shifts),
        "inputs": {name: _source_content(source) for name, source in call.inputs.items()},
        "expected": _expected_content(call.expected),
    }


def run_content(run: RunSample) -> dict[str, Any]:
    """What ``samples.json`` says of a run."""
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


def network_content(sample: NetworkSample) -> dict[str, Any]:
    """What ``samples.json`` says of a network's evaluation."""
    return {
        "network": sample.network,
        "bound": sample.bound.to_dict(),
        "inputs": {name: _source_content(source) for name, source in sample.inputs.items()},
        "expected": {name: _expected_content(expected) for name, expected in sample.expected.items()},
        "prompt": sample.prompt,
    }


def picture_content(sample: PictureSample) -> dict[str, Any]:
    """What ``samples.json`` says of a picture."""
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


def read_call(fields: Fields) -> CallSample:
    """Reads what `call_content` gave."""
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


def read_run(fields: Fields) -> RunSample:
    """Reads what `run_content` gave."""
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


def read_network(fields: Fields) -> NetworkSample:
    """Reads what `network_content` gave."""
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


def read_picture(fields: Fields) -> PictureSample:
    """Reads what `picture_content` gave."""
    corner = fields.wholes("corner")
    if len(corner) != 2:
        raise fields.wrong("corner", "must be a row and a column", corner)
    return PictureSample(
        run=fields.whole("run"),
        bound=fields.nested("bound", Bound.from_fields),
        corner=(corner[0], corner[1]),
        tensor=fields.text("tensor"),
    )
