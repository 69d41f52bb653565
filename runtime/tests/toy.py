"""A bundle whose "UNet" is a few lines of numpy, for tests of everything but real engines.

The engine file names its phase; the weights come from the bundle's store; the output depends on every input, on the
phase, on each shift and on each weight, so that a wrong one of them shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hidiff_runtime.backends.protocol import Availability
from hidiff_runtime.errors import EngineError
from hidiff_runtime.format import safetensors
from hidiff_runtime.format.manifest import (
    MANIFEST,
    Contents,
    FileDigest,
    GraphRecord,
    Manifest,
    PhaseRecord,
    TensorSpec,
)
from hidiff_runtime.format.step_graph import step_inputs, step_outputs
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule, StepRange
from hidiff_runtime.reused_features import Reuse
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.table_rows import Rows
from hidiff_runtime.sampling.torch_rng import TorchGenerator
from hidiff_runtime.verification.comparison import Bound
from hidiff_runtime.verification.reference_samples import CallSample, Drawn, RunSample
from hidiff_runtime.verification.sample_recorder import SampleRecorder

Arrays = Mapping[str, np.ndarray]

HEIGHT, WIDTH, TOKENS, DIM, POOLED = 6, 8, 3, 5, 4
BLOCKS = ("down.0", "down.1", "up.0")
MAX_STEPS = 12
GAINS = {kind: 0.2 + 0.1 * index for index, kind in enumerate(PhaseKind)}
CALL_BOUND = Bound(120.0, "the same numpy")
RUN_BOUND = Bound(100.0, "the same numpy, a few steps")


def unet(phase: str, weights: Arrays, inputs: Arrays) -> np.ndarray:
    """``noise_pred`` of the toy."""
    latents = inputs["latents"]
    noise = np.einsum("oc,bchw->bohw", weights["mix"], latents) * GAINS[PhaseKind(phase.partition("-")[0])]
    shifts = inputs["window_shifts"]
    for row, own in enumerate(shifts if shifts.ndim > 1 else [shifts] * len(latents)):
        for index, shift in enumerate(own):
            noise[row] += weights["blocks"][index] * np.roll(latents[row, :4], (int(shift), index + 1), (1, 2))
    noise = noise + 1e-4 * inputs["timestep"][0]
    for name in ("prompt_embeds", "text_embeds", "time_ids"):
        if name in inputs:
            told = np.tanh(inputs[name]).reshape(len(latents), -1).mean(1)[:, None, None, None]
            noise = noise + told * (1 + latents[:, :1])  # a deviation of its own for each half of guidance
    for name in ("down_residual_00", "mid_residual"):
        if name in inputs:
            noise = noise + inputs[name].mean(axis=(1, 2, 3), keepdims=True)
    if "deep_features" in inputs:
        noise = 0.7 * noise + 0.3 * inputs["deep_features"][:, :1]
    return noise.astype(np.float32)


def evaluated(record: PhaseRecord, weights: Arrays, inputs: Arrays, phase: str | None = None) -> dict[str, np.ndarray]:
    """Every output of the toy, in a phase that may not be the record's; deep features are the noise twice over, and
    depend on all that it depends on.
    """
    noise = unet(phase or record.phase.name, weights, inputs)
    features = {spec.name: np.concatenate([2 * noise] * 2, axis=1) for spec in record.outputs[1:]}
    return {"noise_pred": noise, **features}


@dataclass
class ToySession:
    """Runs the toy; notes when it was entered and left."""

    backend: ToyBackend
    phase: str
    weights: Arrays
    record: PhaseRecord

    def __enter__(self) -> ToySession:
        self.backend.events.append(f"open {self.phase}")
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.events.append(f"close {self.phase}")

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        self.backend.calls.append((self.phase, dict(inputs)))
        for spec in self.record.inputs:
            found = inputs[spec.name]
            if found.shape != spec.shape or found.dtype != spec.dtype:
                raise EngineError(f"{spec} is not {found.dtype}{list(found.shape)}")
        assert inputs.keys() == {spec.name for spec in self.record.inputs}
        found = evaluated(self.record, self.weights, inputs, self.phase)
        return self.backend.spoil(found, len(self.backend.calls))


def unspoilt(outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
    return outputs


@dataclass
class ToyBackend:
    """Opens toy engines.

    Args:
        spoil: given the outputs and the number of the call (from 1), returns the outputs to give.
    """

    spoil: Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]] = unspoilt
    opened_with: ClassVar[Mapping[str, Any]] = {}
    name: str = "toy"
    events: list[str] = field(default_factory=list)
    calls: list[tuple[str, dict[str, np.ndarray]]] = field(default_factory=list)

    def available(self) -> Availability:
        return Availability(True, "numpy")

    def files(self, engine: Path) -> tuple[Path, ...]:
        return (engine,)

    def device(self, options: Mapping[str, Any]) -> ToyDevice:
        ToyBackend.opened_with = dict(options)
        return ToyDevice(self)

    def open(self, engine: Path, weights: Mapping[str, Path], record: PhaseRecord) -> ToySession:
        phase = json.loads(engine.read_text())["phase"]
        with safetensors.SafetensorsFile.open(weights["unet"]) as file:
            return ToySession(self, phase, file.arrays(), record)


@dataclass
class ToyDevice:
    """Nothing but host memory; opens what its backend opens."""

    backend: ToyBackend
    memory: None = None
    maps_weights: bool = False

    def __enter__(self) -> ToyDevice:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, engine: Path, weights: Mapping[str, Path], record: PhaseRecord) -> ToySession:
        return self.backend.open(engine, weights, record)


@dataclass(frozen=True)
class Toy:
    """What kind of bundle to make."""

    guidance: bool = True
    sdxl: bool = False
    inpainting: bool = False
    control: bool = False
    batch: int = 1
    own_shifts: bool = False
    reference: bool = True
    tokens: int = TOKENS
    guided: StepRange | None = None
    reuse: Reuse | None = None

    @property
    def rule(self) -> PhaseRule:
        return PhaseRule(StepRange(0, 0.5), StepRange(0, 0.25), 0.6 if self.control else None, self.guided, self.reuse)

    @property
    def graph_batch(self) -> int:
        return self.batch * (2 if self.guidance else 1)

    def record(self, phase: Phase) -> PhaseRecord:
        batch = self.batch if phase.unguided else self.graph_batch
        inputs = [
            TensorSpec("latents", (batch, 9 if self.inpainting else 4, HEIGHT, WIDTH), "float32"),
            TensorSpec("timestep", (1,), "float32"),
            TensorSpec("prompt_embeds", (batch, self.tokens, DIM), "float32"),
            TensorSpec("window_shifts", (*[batch] * self.own_shifts, len(BLOCKS)), "int32"),
        ]
        if self.sdxl:
            inputs += [
                TensorSpec("text_embeds", (batch, POOLED), "float32"),
                TensorSpec("time_ids", (batch, 6), "float32"),
            ]
        if phase.control:
            names = ("down_residual_00", "mid_residual")[: 1 if phase.shallow else 2]
            inputs += [TensorSpec(name, (batch, 2, 3, 3), "float32") for name in names]
        outputs = [TensorSpec("noise_pred", (batch, 4, HEIGHT, WIDTH), "float32")]
        features = TensorSpec("deep_features", (batch, 8, HEIGHT, WIDTH), "float32")
        if phase.shallow:
            inputs.append(features)
        if self.rule.gives_features(phase):
            outputs.append(features)
        return PhaseRecord(
            phase=phase,
            graph=f"unet/{phase.name}.graph",
            engines={"toy": f"unet/{phase.name}.toy"},
            inputs=tuple(inputs),
            outputs=tuple(outputs),
        )

    def step(self, *, unguided: bool = False) -> GraphRecord:
        """Of a step graph, with one state, as the samplers here have."""
        guided = self.record(Phase(PhaseKind.WINDOWED))
        phase = self.record(Phase(PhaseKind.WINDOWED, unguided=unguided))
        due = (self.batch, phase.outputs[0], guided.inputs[0], 1)
        name = "unguided_step" if unguided else "step"
        outputs = step_outputs(*due, unguided=self.guided is not None)
        return GraphRecord(f"step/{name}.graph", {"toy": f"step/{name}.toy"}, step_inputs(*due), outputs)

    def given(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Everything the denoiser needs by keyword."""
        generator = TorchGenerator(1000 + seed)
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (self.batch, self.tokens, DIM)}
        if self.sdxl:
            shapes |= {"text_embeds": (self.batch, POOLED), "time_ids": (self.batch, 6)}
        if self.guidance:
            shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
        if self.inpainting:
            shapes |= {
                "mask": (self.batch, 1, HEIGHT, WIDTH),
                "masked_image_latents": (self.batch, 4, HEIGHT, WIDTH),
            }
        return {name: generator.randn(shape) for name, shape in shapes.items()}


def table(name: str, *, order: int = 1, noise: float = 0.0) -> SamplerTable:
    """A table for 1 to 12 steps: the sample shrinks by a fixed part of the output; one state remembers the output."""
    counts = np.arange(1, MAX_STEPS + 1)
    evaluations = counts * order - (order - 1)
    first = np.concatenate([[0], np.cumsum(evaluations)]).astype(np.int64)
    total = int(first[-1])
    rows = np.zeros((total, 2, 4))
    rows[:, 0] = [0.9, -0.2, noise, 0.05]
    rows[:, 1] = [0.0, 1.0, 0.0, 0.0]
    return SamplerTable(
        sampler=name,
        order=order,
        steps=counts.astype(np.int64),
        first=first,
        init_noise_sigma=np.full(MAX_STEPS, 1.5),
        timesteps=np.concatenate([np.linspace(999, 0, count) for count in evaluations]).astype(np.float32),
        input_scale=np.full(total, 0.8),
        draws_noise=np.full(total, noise != 0),
        noising=np.concatenate([np.stack([np.linspace(0.1, 1, n), np.linspace(1, 0.1, n)], 1) for n in evaluations]),
        rows=Rows.of(rows, np.concatenate([rows[None], rows[None]]) * [[1.0, 1.0, 1.0, 2.0]]),
    )


def stored_weights(toy: Toy) -> dict[str, np.ndarray]:
    generator = TorchGenerator(7)
    mix = generator.randn((4, 9 if toy.inpainting else 4)) * np.float32(0.3)
    return {"mix": mix, "blocks": generator.randn((len(BLOCKS),)) * np.float32(0.1)}


def make(folder: Path, toy: Toy | None = None) -> Path:
    """Writes a bundle into ``folder``."""
    toy = toy or Toy()
    for name in ("unet", "samplers", "step"):
        (folder / name).mkdir(parents=True)
    stored = stored_weights(toy)
    safetensors.write(folder / "unet/weights.safetensors", stored)
    samplers = {"plain": table("plain"), "noisy": table("noisy", noise=0.3), "second": table("second", order=2)}
    for name, tabled in samplers.items():
        tabled.write(folder / f"samplers/{name}.safetensors")
    records = tuple(toy.record(phase) for phase in toy.rule.phases())
    for record in records:
        (folder / record.graph).write_text("a graph")
        (folder / record.engines["toy"]).write_text(json.dumps({"phase": record.phase.name}))
    for name in ("step", "unguided_step")[: 1 if toy.guided is None else 2]:
        for kind in ("graph", "toy"):
            (folder / f"step/{name}.{kind}").write_text("sums and products")
    manifest = Manifest(
        tools={"hidiff-runtime": "0.1.0"},
        recipe={"family": "toy"},
        family="sdxl" if toy.sdxl else "sd15",
        task="inpainting" if toy.inpainting else "text-to-image",
        width=WIDTH * 8,
        height=HEIGHT * 8,
        batch=toy.batch,
        guidance=toy.guidance,
        precision="float32",
        rule=toy.rule,
        latent=(4, HEIGHT, WIDTH),
        windowed_blocks=BLOCKS,
        phases=records,
        samplers={name: f"samplers/{name}.safetensors" for name in samplers},
        default_sampler="plain",
        steps=tuple(range(1, MAX_STEPS + 1)),
        weights={"unet": "unet/weights.safetensors"},
        files={},
        step=toy.step(),
        unguided_step=None if toy.guided is None else toy.step(unguided=True),
    )
    if toy.reference:
        record_samples(folder, toy, manifest, stored)
        manifest = replace(manifest, reference="reference/samples.json")
    seal(folder, manifest)
    return folder


def seal(folder: Path, *manifests: Manifest) -> Manifest:
    """Writes the manifest for the files as they are now; the first bucket's is returned."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    files = {path.relative_to(folder).as_posix(): FileDigest.of(path) for path in paths}
    buckets = manifests or Manifest.read(folder).whole.manifests
    contents = Contents.of([replace(manifest, files=files) for manifest in buckets])
    (folder / MANIFEST).write_text(json.dumps(contents.to_json()))
    return contents.manifests[0]


def record_samples(folder: Path, toy: Toy, manifest: Manifest, stored: Arrays) -> None:
    """Records, for each phase, one evaluation on noise with every kind of shift, and a run of eight steps."""
    recorder = SampleRecorder("numpy", CALL_BOUND, RUN_BOUND, limit=150)
    for index, record in enumerate(manifest.phases):
        generator = TorchGenerator(index)
        inputs: dict[str, Any] = {}
        for spec in record.inputs:
            half = generator.randn((spec.shape[0] // 2 or 1, *spec.shape[1:]))
            inputs[spec.name] = np.concatenate([half, half])[: spec.shape[0]]
        inputs["timestep"] = np.array([500], dtype=np.float32)
        for residual in record.residuals:
            inputs[residual.name] = Drawn(5, residual.shape, 0.1)
        shifts = [index % 4, 1, 2]
        shape = next(spec.shape for spec in record.inputs if spec.name == "window_shifts")
        shifts = [(shift + row) % 4 for row in range(shape[0] if toy.own_shifts else 1) for shift in shifts]
        del inputs["window_shifts"]
        arrays = {name: value.array() if isinstance(value, Drawn) else value for name, value in inputs.items()}
        arrays["window_shifts"] = np.array(shifts, dtype=np.int32).reshape(shape)
        output = unet(record.phase.name, stored, arrays)
        record_call(recorder, record.phase, inputs, shifts, output, step=index)
    record_run(recorder, reference_run(toy, manifest, stored))
    recorder.write(folder / "reference")


def record_call(
    recorder: SampleRecorder,
    phase: Phase,
    inputs: Mapping[str, Any],
    shifts: list[int],
    output: np.ndarray,
    step: int = 0,
) -> None:
    """Records one evaluation of a run of eight steps."""
    sources, expected = recorder.inputs(inputs), recorder.output(output)
    recorder.calls.append(CallSample(phase, step, 8, tuple(shifts), sources, expected))


def record_run(recorder: SampleRecorder, run: Mapping[str, Any]) -> None:
    """Records what `reference_run` gave."""
    sample = RunSample(
        **{name: run[name] for name in ("steps", "sampler", "seed", "guidance_scale")},
        eta=0.0,
        inputs=recorder.inputs(run["inputs"]),
        control=recorder.inputs(run["control"]),
        expected=recorder.output(run["latents"]),
        trajectory=tuple(map(recorder.output, run["trajectory"])),
    )
    recorder.runs.append(sample)


def reference_run(toy: Toy, manifest: Manifest, stored: Arrays, steps: int = 8, seed: int = 3) -> dict[str, Any]:
    """A run written out plainly, for the denoiser to be compared with."""
    given = toy.given()
    generator = TorchGenerator(seed)
    scale = 4.0 if toy.guidance else None
    control = {spec.name: Drawn(9, spec.shape, 0.1) for spec in manifest.phases[0].residuals}
    latents = generator.randn((toy.batch, 4, HEIGHT, WIDTH)) * np.float32(1.5)
    previous = np.zeros_like(latents)
    trajectory = []
    features, age, before = latents, 0, None
    for step in range(steps):
        whole, age = manifest.rule.phase_at(step, steps), age + 1
        shallow = toy.reuse is not None and whole == before and age < toy.reuse.every
        phase, before, age = replace(whole, shallow=shallow), whole, age if shallow else 0
        signs = ("negative_", "") if toy.guidance and not phase.unguided else ("",)
        halves = [latents * np.float32(0.8)] * len(signs)
        if toy.inpainting:
            halves = [np.concatenate([half, given["mask"], given["masked_image_latents"]], 1) for half in halves]
        inputs = {"latents": np.concatenate(halves)}
        inputs["timestep"] = np.linspace(999, 0, steps, dtype=np.float32)[step : step + 1]
        for name in ("prompt_embeds", "text_embeds", "time_ids"):
            if name in given:
                inputs[name] = np.concatenate([given[sign + name] for sign in signs])
        uniforms = [generator.rand(1)[0] for _ in BLOCKS]
        inputs["window_shifts"] = np.array([int(np.ceil(r * 4)) - 1 if r > 0 else 0 for r in uniforms], np.int32)
        if phase.control:
            inputs |= {name: drawn.array() for name, drawn in control.items()}
        if shallow:
            inputs["deep_features"] = features
        found = evaluated(toy.record(phase), stored, inputs)
        noise, features = found["noise_pred"], found.get("deep_features", features)
        if scale is not None and len(signs) == 2:
            negative_noise, positive_noise = np.split(noise, 2)
            noise = negative_noise + np.float32(scale) * (positive_noise - negative_noise)
        draw = generator.randn(latents.shape)
        latents = 0.9 * latents - 0.2 * noise + 0.3 * draw + 0.05 * previous
        latents, previous = latents.astype(np.float32), noise
        trajectory.append(latents)
    return {
        "steps": steps,
        "sampler": "noisy",
        "seed": seed,
        "guidance_scale": scale,
        "inputs": given,
        "control": control,
        "latents": latents,
        "trajectory": trajectory,
    }
