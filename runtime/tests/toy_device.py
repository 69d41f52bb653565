"""The toy on a device: memory that does nothing until it is asked for a result, and engines that work in it.

What is uploaded, evaluated and downloaded is put in a queue; the queue runs when something is downloaded. So whatever
relies on more than the order of a stream shows, and so does an array that is changed after it was handed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import toy

from hidiff_runtime.errors import EngineError
from hidiff_runtime.format import safetensors
from hidiff_runtime.format.specs import GraphRecord


@dataclass(eq=False)
class Tensor:
    """A device array; nothing may read ``content`` but the memory it is in."""

    shape: tuple[int, ...]
    dtype: str
    content: np.ndarray


@dataclass
class Memory:
    """A queue. New tensors hold NaN, or a large number."""

    on_host: bool = False
    events: list[str] = field(default_factory=list)
    queue: list[Callable[[], None]] = field(default_factory=list)
    made: int = 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        self.made += 1
        return Tensor(shape, dtype, np.full(shape, np.nan if dtype == "float32" else 1 << 30, dtype))

    def upload(self, array: np.ndarray, into: Tensor) -> None:
        assert (array.shape, array.dtype) == (into.shape, np.dtype(into.dtype))
        staged = array.copy()
        self.queue.append(lambda: np.copyto(into.content, staged))
        self.events.append("upload")

    def download(self, array: Tensor) -> np.ndarray:
        self.events.append("download")
        with np.errstate(invalid="ignore"):  # a device that meets NaN goes on
            for work in self.queue:
                work()
        self.queue.clear()
        return array.content.copy()


@dataclass
class Session:
    """An engine whose work waits in the queue; its own `run` is a function of host arrays."""

    backend: Backend
    record: GraphRecord
    name: str
    compute: Callable[[toy.Arrays], dict[str, np.ndarray]]

    def __enter__(self) -> Session:
        self.backend.events.append(f"open {self.name}")
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.events.append(f"close {self.name}")

    def run(self, inputs: toy.Arrays) -> dict[str, np.ndarray]:
        return self.compute(inputs)

    def execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        assert not {id(tensor) for tensor in inputs.values()} & {id(tensor) for tensor in outputs.values()}
        for specs, given in ((self.record.inputs, inputs), (self.record.outputs, outputs)):
            assert {spec.name: spec.shape for spec in specs} == {name: given[name].shape for name in given}
        self.backend.memory.events.append(self.name)
        self.backend.memory.queue.append(lambda: self._work(inputs, outputs))

    def _work(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        found = self.compute({name: tensor.content.copy() for name, tensor in inputs.items()})
        for name, tensor in outputs.items():
            np.copyto(tensor.content, found[name])


def step(inputs: toy.Arrays, outputs: int, *, both: bool = False) -> dict[str, np.ndarray]:
    """A step graph in numpy; ``outputs`` is how many rows a guided UNet's batch has, ``both`` whether others follow."""
    noise = inputs["noise_pred"]
    done, first, count = inputs["unsound"].tolist()
    bad = int(noise.size - np.isfinite(noise).sum())
    unsound = np.array([done + 1, done + 1, bad] if bad and not first else [done + 1, first, count], np.int32)
    if "guidance_scale" in inputs:
        negative, positive = np.split(noise, 2)
        scale = inputs["guidance_scale"]
        noise = positive if scale[0] <= 1 else negative + scale * (positive - negative)
        if scale[0] > 1 and (share := inputs.get("guidance_rescale", np.zeros(1, np.float32))) > 0:
            deviations = [half.std(axis=(1, 2, 3), keepdims=True) for half in (positive, noise)]
            noise = share * noise * deviations[0] / deviations[1] + (1 - share) * noise
    vector = np.stack([inputs["sample"], noise, inputs["noise"], *inputs["state"]])
    sample, *state = np.einsum("rv,v...->r...", inputs["rows"].astype(np.float64), vector).astype(np.float32)
    latents = np.concatenate([sample * inputs["input_scale"]] * (outputs // len(sample)))
    if "channels" in inputs:
        latents = np.concatenate([latents, inputs["channels"]], axis=1)
    found = {"next_sample": sample, "next_state": np.stack(state), "latents": latents, "next_unsound": unsound}
    return {**found, **({"unguided_latents": latents[: len(sample)]} if both else {})}


@dataclass
class Backend(toy.ToyBackend):
    """Opens the toy's engines on a device.

    Args:
        fail: called with the number of each evaluation of a phase, from 1, when it is asked for.
    """

    memory: Memory = field(default_factory=Memory)
    left: int = 0
    fail: Callable[[int], None] = lambda _call: None

    def device(self, options: Mapping[str, Any]) -> Any:
        super().device(options)
        return Device(self)

    def open(self, engine: Path, weights: Mapping[str, Path], record: Any) -> Any:
        if engine.parent.name == "step":
            batch = next(spec for spec in record.outputs if spec.name == "latents").shape[0]
            both = any(spec.name == "unguided_latents" for spec in record.outputs)
            return Session(self, record, engine.stem, lambda inputs: step(inputs, batch, both=both))
        phase = json.loads(engine.read_text())["phase"]
        with safetensors.SafetensorsFile.open(weights["unet"]) as file:
            stored = {name: np.array(array) for name, array in file.arrays().items()}

        def compute(inputs: toy.Arrays) -> dict[str, np.ndarray]:
            self.calls.append((phase, dict(inputs)))
            return self.spoil(toy.evaluated(record, stored, inputs, phase), len(self.calls))

        return Failing(self, record, phase, compute)


class Failing(Session):
    """A phase's session, which fails when its backend says so."""

    def execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.backend.fail(
            1
            + sum(event not in ("upload", "download", "step", "unguided_step") for event in self.backend.memory.events)
        )
        super().execute(inputs, outputs)


@dataclass
class Device:
    """Gives its memory once it is entered; may be entered once."""

    backend: Backend
    memory: Memory | None = None
    maps_weights: bool = False

    def __enter__(self) -> Device:
        self.backend.events.append("enter device")
        self.memory = self.backend.memory
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.events.append("leave device")
        self.backend.left += 1

    def open(self, engine: Path, weights: Mapping[str, Path], record: Any) -> Any:
        if self.memory is None or self.backend.left:
            raise EngineError("The device is not open.")
        return self.backend.open(engine, weights, record)
