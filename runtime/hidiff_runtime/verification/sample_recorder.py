"""Writes reference samples: the counterpart of `hidiff_runtime.verification.reference_samples`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.format import safetensors
from hidiff_runtime.phases import Phase
from hidiff_runtime.verification.comparison import Bound
from hidiff_runtime.verification.reference_samples import (
    TENSORS,
    CallSample,
    Drawn,
    Expected,
    NetworkSample,
    PictureSample,
    ReferenceSamples,
    RunSample,
    Source,
    Stored,
    write_index,
)
from hidiff_runtime.verification.scheduler_samples import SamplerAnswers, SamplerSample

Array = NDArray[Any]


class SampleRecorder:
    """Collects samples, each tensor once, and writes them.

    Args:
        origin: what computes them: ``PyTorch 2.13.0, float32``.
        call_bound: what an engine's single evaluation must keep to.
        run_bound: what a whole run must keep to.
        limit: outputs with more elements are kept at this many of them.
    """

    def __init__(self, origin: str, call_bound: Bound, run_bound: Bound, *, limit: int = 1 << 16) -> None:
        self._origin = origin
        self._bounds = (call_bound, run_bound)
        self._limit = limit
        self._calls: list[CallSample] = []
        self._runs: list[RunSample] = []
        self._networks: list[NetworkSample] = []
        self._pictures: list[PictureSample] = []
        self._samplers: list[SamplerSample] = []
        self._facts: Mapping[str, Any] = {}
        self._tensors: dict[str, Array] = {}
        self._names: dict[bytes, str] = {}

    def call(
        self,
        phase: Phase,
        *,
        step: int,
        steps: int,
        window_shifts: Sequence[int],
        inputs: Mapping[str, Array | Drawn],
        noise_pred: Array,
    ) -> None:
        """Adds one evaluation.

        Args:
            phase: which graph.
            step: logical step, from 0.
            steps: of the run.
            window_shifts: 0 to 3 each.
            inputs: every other graph input. A float16 array stands for its exact float32 values, which the
                reference must have been given.
            noise_pred: the reference's output, float32.
        """
        shifts = tuple(int(shift) for shift in window_shifts)
        self._calls.append(CallSample(phase, step, steps, shifts, self._sources(inputs), self._expected(noise_pred)))

    def run(
        self,
        *,
        steps: int,
        sampler: str,
        seed: int,
        guidance_scale: float | None,
        inputs: Mapping[str, Array | Drawn],
        latents: Array,
        trajectory: Sequence[Array] = (),
        control: Mapping[str, Array | Drawn] | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
    ) -> None:
        """Adds a whole run: what the denoiser is given by keyword, and the latents it must come to."""
        self._runs.append(
            RunSample(
                steps=steps,
                sampler=sampler,
                seed=seed,
                guidance_scale=guidance_scale,
                eta=eta,
                inputs=self._sources(inputs),
                control=self._sources(control or {}),
                expected=self._expected(latents),
                trajectory=tuple(self._expected(after) for after in trajectory),
                guidance_rescale=guidance_rescale,
            )
        )

    def network(
        self,
        network: str,
        *,
        bound: Bound,
        inputs: Mapping[str, Array | Drawn],
        outputs: Mapping[str, Array],
        prompt: str | None = None,
    ) -> None:
        """Adds one evaluation of a text encoder, or of half of the VAE; see :class:`NetworkSample`."""
        expected = {name: self._expected(output) for name, output in outputs.items()}
        self._networks.append(NetworkSample(network, bound, self._sources(inputs), expected, prompt))

    def picture(self, part: Array, corner: tuple[int, int], *, bound: Bound) -> None:
        """Adds part of the picture that the latents of the run added last become; see :class:`PictureSample`."""
        self._pictures.append(PictureSample(len(self._runs) - 1, bound, corner, self._keep(part)))

    def sampler(self, name: str, answers: SamplerAnswers, *, order: int, depth: int, eta: float | None) -> None:
        """Adds what a sampler's scheduler answered; see :class:`SamplerSample`."""
        tensors = {key: self._keep(array) for key, array in vars(answers).items()}
        self._samplers.append(SamplerSample(name, order, eta, depth, **tensors))

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Keeps what the manifest is to say; see :class:`ReferenceSamples`."""
        self._facts = facts

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Writes ``samples.json`` and ``samples.safetensors`` into ``folder``; returns the two paths."""
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.write(folder / TENSORS, self._tensors)
        samples = ReferenceSamples(
            self._origin,
            *self._bounds,
            tuple(self._calls),
            tuple(self._runs),
            self._tensors,
            tuple(self._networks),
            tuple(self._pictures),
            samplers=tuple(self._samplers),
            facts=self._facts,
        )
        return write_index(folder, samples), folder / TENSORS

    def _sources(self, inputs: Mapping[str, Array | Drawn]) -> dict[str, Source]:
        return {name: value if isinstance(value, Drawn) else self._stored(value) for name, value in inputs.items()}

    def _stored(self, array: Array) -> Stored:
        half = len(array) // 2
        if half and len(array) == 2 * half and array[:half].tobytes() == array[half:].tobytes():
            return Stored(self._keep(array[:half]), 2)
        return Stored(self._keep(array))

    def _expected(self, output: Array) -> Expected:
        if output.size <= self._limit:
            return Expected(self._keep(output), output.shape)
        chosen = np.random.RandomState(0).choice(output.size, self._limit, replace=False)
        positions = np.sort(chosen).astype(np.int32)
        return Expected(self._keep(output.reshape(-1)[positions]), output.shape, self._keep(positions))

    def _keep(self, array: Array) -> str:
        whole = np.array(array, order="C")
        key = hashlib.sha256(f"{whole.dtype}{whole.shape}".encode() + whole.tobytes()).digest()
        name = self._names.setdefault(key, f"tensor_{len(self._names):03d}")
        self._tensors.setdefault(name, whole)
        return name
