"""Writes reference samples: the counterpart of `hidiff_runtime.verification.reference_samples`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.format import safetensors
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
from hidiff_runtime.verification.scheduler_samples import SamplerSample

Array = NDArray[Any]


class SampleRecorder:
    """Collects samples, each tensor once, and writes them.

    Samples are added to its lists, with what `inputs` and `output` give for the arrays that they are of.

    Args:
        origin: what computes them: ``PyTorch 2.13.0, float32``.
        call_bound: what an engine's single evaluation must keep to.
        run_bound: what a whole run must keep to.
        limit: outputs with more elements are kept at this many of them.

    Attributes:
        facts: what the manifest is to say; see :class:`ReferenceSamples`.
    """

    def __init__(self, origin: str, call_bound: Bound, run_bound: Bound, *, limit: int = 1 << 16) -> None:
        self.calls: list[CallSample] = []
        self.runs: list[RunSample] = []
        self.networks: list[NetworkSample] = []
        self.pictures: list[PictureSample] = []
        self.samplers: list[SamplerSample] = []
        self.facts: Mapping[str, Any] = {}
        self._origin = origin
        self._bounds = (call_bound, run_bound)
        self._limit = limit
        self._tensors: dict[str, Array] = {}
        self._names: dict[bytes, str] = {}

    def inputs(self, arrays: Mapping[str, Array | Drawn]) -> dict[str, Source]:
        """Keeps what goes into an evaluation or a run, by name.

        A float16 array stands for its exact float32 values, which the reference must have been given.
        """
        return {name: value if isinstance(value, Drawn) else self._stored(value) for name, value in arrays.items()}

    def output(self, array: Array) -> Expected:
        """Keeps what the reference gave, float32: all of it, or a fixed random choice of so many elements."""
        if array.size <= self._limit:
            return Expected(self.keep(array), array.shape)
        chosen = np.random.RandomState(0).choice(array.size, self._limit, replace=False)
        positions = np.sort(chosen).astype(np.int32)
        return Expected(self.keep(array.reshape(-1)[positions]), array.shape, self.keep(positions))

    def keep(self, array: Array) -> str:
        """Keeps a copy of a tensor; returns its name in the file."""
        whole = np.array(array, order="C")
        key = hashlib.sha256(f"{whole.dtype}{whole.shape}".encode() + whole.tobytes()).digest()
        name = self._names.setdefault(key, f"tensor_{len(self._names):03d}")
        self._tensors.setdefault(name, whole)
        return name

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Writes ``samples.json`` and ``samples.safetensors`` into ``folder``; returns the two paths."""
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.write(folder / TENSORS, self._tensors)
        samples = ReferenceSamples(
            self._origin,
            *self._bounds,
            tuple(self.calls),
            tuple(self.runs),
            self._tensors,
            tuple(self.networks),
            tuple(self.pictures),
            samplers=tuple(self.samplers),
            facts=self.facts,
        )
        return write_index(folder, samples), folder / TENSORS

    def _stored(self, array: Array) -> Stored:
        half = len(array) // 2
        if half and len(array) == 2 * half and array[:half].tobytes() == array[half:].tobytes():
            return Stored(self.keep(array[:half]), 2)
        return Stored(self.keep(array))
