"""A bundle whose engines are PyTorch itself: an engine or graph file only names its phase.

With it everything in a verification but a real engine is tested, in seconds.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint, load
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.families.family import Task, default_scheduler
from hidiff_export.families.graph_io import controlnet_inputs, controlnet_outputs, phase_inputs, phase_outputs
from hidiff_export.modules.controlnet import ControlNetModule
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe import Recipe
from hidiff_export.reference.reference import record_reference
from hidiff_export.reference.reference_weights import networks_of_store
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_export.verification import portable_graphs
from hidiff_runtime import backends
from hidiff_runtime.backends.protocol import Availability
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, GraphRecord, Manifest, PhaseRecord
from hidiff_runtime.phases import Phase, PhaseKind

Outputs = dict[str, np.ndarray]


@dataclass
class TorchSession:
    """One phase of the UNet, or the ControlNet, in the bundle's weight store."""

    module: PhaseUNet | ControlNetModule
    record: GraphRecord
    spoil: Callable[[Outputs], Outputs]

    def __enter__(self) -> "TorchSession":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: Mapping[str, np.ndarray]) -> Outputs:
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        with torch.inference_mode():
            phase = isinstance(self.module, PhaseUNet)
            outputs = self.module(**(PhaseUNet.arguments(tensors) if phase else tensors))
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        names = [spec.name for spec in self.record.outputs]
        return self.spoil({name: output.numpy() for name, output in zip(names, outputs, strict=True)})


def unspoilt(outputs: Outputs) -> Outputs:
    return outputs


@dataclass
class TorchBackend:
    """Opens the files of :func:`build`.

    Args:
        recipe: of the bundle.
        spoil: what becomes of every output.
        missing: why it cannot run here.
    """

    recipe: Recipe
    spoil: Callable[[Outputs], Outputs] = unspoilt
    name: str = "onnxruntime"
    missing: str = ""

    def available(self) -> Availability:
        return Availability(not self.missing, self.missing or "torch", "pip install it" if self.missing else "")

    memory: None = None
    maps_weights = False

    def files(self, engine: Path) -> tuple[Path, ...]:
        return (engine,)

    def device(self, _options: Mapping[str, Any]) -> "TorchBackend":
        """Itself: it keeps nothing on a device."""
        return self

    def __enter__(self) -> "TorchBackend":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, engine: Path, weights: Mapping[str, Path], record: GraphRecord) -> TorchSession:
        named = json.loads(engine.read_text(encoding="utf-8"))
        phase = record.phase if isinstance(record, PhaseRecord) else None
        if phase is not None:
            phase = replace(phase, kind=PhaseKind(named["kind"]), control=named["control"])
        store = weights["unet"]
        # A graph is judged in a folder that only has links to the stores of its bundle.
        root = (store if (store.parent / "config.json").is_file() else store.readlink()).parent.parent
        return TorchSession(_module(self.recipe, phase, root), record, self.spoil)


_MODULES: dict[tuple[Recipe, Phase | None, str], PhaseUNet | ControlNetModule] = {}
"""What was opened before, by recipe, phase and the weight store's hash: opening is what takes the time."""


def _module(recipe: Recipe, phase: Phase | None, root: Path) -> PhaseUNet | ControlNetModule:
    """A phase, or the ControlNet for ``None``."""
    key = (recipe, phase, FileDigest.of(root / "unet/weights.safetensors").sha256)
    if key not in _MODULES:
        networks = networks_of_store(root, recipe)
        size = (recipe.latent_height, recipe.latent_width)
        if phase is not None:
            _MODULES[key] = PhaseUNet(networks.unet, recipe.unet_layout, phase, *size, **recipe.phase_options(phase))
        elif networks.controlnet is not None:
            _MODULES[key] = ControlNetModule(networks.controlnet, *size)
    return _MODULES[key]


def use(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts ``backend`` in the place of every backend; it opens graphs as they are."""
    monkeypatch.setattr(backends, "get", lambda _name: backend)
    monkeypatch.setattr(portable_graphs, "write_rounded_copy", shutil.copyfile)


def build(recipe: Recipe, folder: Path, *, reference: bool = True) -> Path:
    """Builds ``recipe`` into ``folder`` without exporting anything; ``reference``: with samples to check against."""
    weights = {
        "unet": _write_weights(
            recipe, folder / "unet", load(Component.UNET, recipe.source, recipe.family, recipe.task, recipe.unet_width)
        )
    }
    if recipe.controlnet is not None:
        loaded = load(Component.CONTROLNET, recipe.controlnet, recipe.family, Task.CONTROLNET, recipe.unet_width)
        weights["controlnet"] = _write_weights(recipe, folder / "controlnet", loaded)
    _, scheduler = default_scheduler(recipe.family)
    path = folder / "samplers" / "table.safetensors"
    path.parent.mkdir()
    table = probe(recipe.sampler[0].value, scheduler, recipe.steps)
    table.write(path)
    if reference:
        tables = {table.sampler: table}
        record_reference(networks_of_store(folder, recipe), recipe, scheduler, folder / "reference", tables=tables)
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
        guidance_rescale=recipe.guidance_rescale or 0.0,
        precision=recipe.precision.value,
        rule=recipe.phase_rule(),
        latent=recipe.latent_shape,
        windowed_blocks=recipe.unet_layout.windowed_blocks,
        phases=phases,
        samplers={recipe.sampler[0].value: "samplers/table.safetensors"},
        default_sampler=recipe.sampler[0].value,
        steps=recipe.steps,
        weights=weights,
        files={},
        controlnet=None if recipe.controlnet is None else _controlnet(recipe, folder),
        reference="reference/samples.json" if reference else None,
        forecast=recipe.forecast_record,
    )
    return write_manifest(folder, manifest)


def refresh(folder: Path) -> Path:
    """Hashes every file anew, as whoever changed one on purpose would."""
    return write_manifest(folder, Manifest.from_json(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))))


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes ``manifest`` with the hashes of the files as they are."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    files = {path.relative_to(folder).as_posix(): FileDigest.of(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()), encoding="utf-8")
    return folder


def _write_weights(recipe: Recipe, folder: Path, checkpoint: Checkpoint) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
    WeightStore.write(checkpoint.state_dict, folder / "weights.safetensors", recipe.precision.value)
    return f"{folder.name}/weights.safetensors"


def _named(folder: Path, name: str, content: object) -> tuple[str, dict[str, str]]:
    """Graph and engine of that name, both with ``content``."""
    graph, engine = f"{name}.onnx", f"{name}.engine"
    for path in (graph, engine):
        (folder / path).write_text(json.dumps(content), encoding="utf-8")
    return graph, {"onnxruntime": engine}


def _controlnet(recipe: Recipe, folder: Path) -> GraphRecord:
    shape = (recipe.controlnet_config(), recipe.latent_height, recipe.latent_width, recipe.model_batch)
    named = _named(folder, "controlnet/controlnet", {"kind": "controlnet"})
    return GraphRecord(*named, controlnet_inputs(*shape), controlnet_outputs(*shape))


def _phase(recipe: Recipe, folder: Path, phase: Phase) -> PhaseRecord:
    named = _named(folder, f"unet/{phase.name}", {"kind": phase.kind.value, "control": phase.control})
    size = (recipe.latent_height, recipe.latent_width)
    config = recipe.unet_config()
    of_phase = (config, recipe.unet_layout, phase, *size, recipe.batch_of(phase))
    inputs = phase_inputs(*of_phase, **recipe.phase_options(phase))
    outputs = phase_outputs(*of_phase, reuse_depth=recipe.depth_of(phase))
    return PhaseRecord(*named, inputs, outputs, phase)
