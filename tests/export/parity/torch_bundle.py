"""A bundle whose engines are PyTorch itself: an engine or graph file only names its phase.

With it everything in a verification but a real engine is tested, in seconds.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hidiff_export.families import default_scheduler
from hidiff_export.graph.weights import WeightStore
from hidiff_export.model.load import load_unet
from hidiff_export.model.phase_unet import PhaseUNet
from hidiff_export.parity.reference import record_reference
from hidiff_export.parity.source import unet_of_store
from hidiff_export.recipe import Recipe
from hidiff_export.sampler.probe import probe
from hidiff_export.signature import phase_inputs, phase_outputs
from hidiff_runtime import backends
from hidiff_runtime.backends import Availability
from hidiff_runtime.manifest import MANIFEST, FileRecord, Manifest, PhaseRecord
from hidiff_runtime.phases import Phase, PhaseKind

Outputs = dict[str, np.ndarray]


@dataclass
class TorchSession:
    """One phase of the UNet in the bundle's weight store."""

    module: PhaseUNet
    spoil: Callable[[Outputs], Outputs]

    def __enter__(self) -> "TorchSession":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: Mapping[str, np.ndarray]) -> Outputs:
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        with torch.inference_mode():
            return self.spoil({"noise_pred": self.module(**PhaseUNet.arguments(tensors)).numpy()})


def unspoilt(outputs: Outputs) -> Outputs:
    return outputs


@dataclass
class TorchBackend:
    """Opens the files of :func:`build`.

    Args:
        recipe: of the bundle.
        spoil: what becomes of every output.
    """

    recipe: Recipe
    spoil: Callable[[Outputs], Outputs] = unspoilt
    name: str = "onnxruntime"

    def available(self) -> Availability:
        return Availability(True, "torch")

    def open(self, engine: Path, weights: Mapping[str, Path], _record: PhaseRecord, _options: Any) -> TorchSession:
        named = json.loads(engine.read_text(encoding="utf-8"))
        phase = Phase(PhaseKind(named["kind"]), named["control"])
        return TorchSession(_module(self.recipe, phase, weights["unet"]), self.spoil)


_MODULES: dict[tuple[Recipe, Phase, str], PhaseUNet] = {}
"""Phases that were opened before, by recipe, phase and the weight store's hash: opening is what takes the time."""


def _module(recipe: Recipe, phase: Phase, store: Path) -> PhaseUNet:
    key = (recipe, phase, FileRecord.of(store).sha256)
    if key not in _MODULES:
        unet = unet_of_store(store.parent)
        _MODULES[key] = PhaseUNet(unet, recipe.layout, phase, recipe.latent_height, recipe.latent_width)
    return _MODULES[key]


def use(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts ``backend`` in the place of every backend."""
    monkeypatch.setattr(backends, "get", lambda _name: backend)


def build(recipe: Recipe, folder: Path) -> Path:
    """Builds ``recipe`` into ``folder`` without exporting anything."""
    _write_weights(recipe, folder / "unet")
    _, scheduler = default_scheduler(recipe.family)
    table = folder / "samplers" / "table.safetensors"
    table.parent.mkdir()
    probe(recipe.sampler[0].value, scheduler, recipe.steps).write(table)
    record_reference(unet_of_store(folder / "unet"), recipe, scheduler, folder / "reference")
    phases = tuple(_phase(recipe, folder, phase) for phase in recipe.phase_rule().phases())
    manifest = Manifest(
        tools={},
        recipe=recipe.to_dict(),
        family=recipe.family.value,
        task=recipe.task.value,
        width=recipe.width,
        height=recipe.height,
        batch=recipe.batch,
        guidance=recipe.guidance,
        precision=recipe.precision.value,
        rule=recipe.phase_rule(),
        latent=recipe.latent_shape,
        windowed_blocks=recipe.layout.windowed_blocks,
        phases=phases,
        samplers={recipe.sampler[0].value: "samplers/table.safetensors"},
        default_sampler=recipe.sampler[0].value,
        steps=recipe.steps,
        weights={"unet": "unet/weights.safetensors"},
        files={},
        reference="reference/samples.json",
    )
    return write_manifest(folder, manifest)


def refresh(folder: Path) -> Path:
    """Hashes every file anew, as whoever changed one on purpose would."""
    return write_manifest(folder, Manifest.from_json(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))))


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes ``manifest`` with the hashes of the files as they are."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    files = {path.relative_to(folder).as_posix(): FileRecord.of(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()), encoding="utf-8")
    return folder


def _write_weights(recipe: Recipe, folder: Path) -> None:
    folder.mkdir(parents=True)
    config, tensors = load_unet(recipe.source, recipe.family, recipe.task, recipe.unet_width)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    WeightStore.write(tensors, folder / "weights.safetensors", recipe.precision.value)


def _phase(recipe: Recipe, folder: Path, phase: Phase) -> PhaseRecord:
    graph, engine = f"unet/{phase.name}.onnx", f"unet/{phase.name}.engine"
    for path in (graph, engine):
        (folder / path).write_text(json.dumps({"kind": phase.kind.value, "control": phase.control}), encoding="utf-8")
    size = (recipe.latent_height, recipe.latent_width)
    config = recipe.unet_config()
    inputs = phase_inputs(config, recipe.layout, phase, *size, recipe.model_batch)
    outputs = phase_outputs(config, *size, recipe.model_batch)
    return PhaseRecord(graph, {"onnxruntime": engine}, inputs, outputs, phase)
