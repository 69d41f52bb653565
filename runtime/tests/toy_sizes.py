"""The toy bundle of two sizes, its own and the same on end, or of several batches."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import toy

from hidiff_runtime.format.manifest import GraphRecord, Manifest, TensorSpec

Record = TypeVar("Record", bound=GraphRecord)


def add_turned(folder: Path) -> Path:
    """Adds the size with sides exchanged to a toy bundle of one size."""
    manifest = Manifest.read(folder)
    for record in _own(manifest):
        for path in (record.graph, *record.engines.values()):
            shutil.copyfile(folder / path, folder / _renamed(path))
    toy.seal(folder, manifest, _turned_manifest(manifest))
    return folder


def add_batch(folder: Path, kind: toy.Toy, batch: int) -> Path:
    """Adds another batch of its size to a toy bundle of one picture; its pictures have window shifts of their own."""
    buckets = Manifest.read(folder).whole.manifests
    first, many = buckets[0], replace(kind, batch=batch, own_shifts=True)
    manifest = replace(
        first,
        batch=batch,
        phases=tuple(_numbered(many.record(record.phase), record, batch) for record in first.phases),
        step=_numbered(many.step(), many.step(), batch),
        controlnet=None if first.controlnet is None else _widened(first.controlnet, many.graph_batch, batch),
        reference=None,
    )
    own = [*first.phases, *(record for record in (first.step, first.controlnet) if record is not None)]
    for record in own:
        for path in (record.graph, *record.engines.values()):
            shutil.copyfile(folder / path, folder / _renamed(path, f"x{batch}"))
    toy.seal(folder, *buckets, manifest)
    return folder


def alone(folder: Path, bucket: int, copy: Path) -> Path:
    """Returns a copy of a bundle with one of its buckets alone."""
    shutil.copytree(folder, copy)
    toy.seal(copy, replace(Manifest.read(copy).whole.manifests[bucket]))
    return copy


def without_second_reference(folder: Path) -> None:
    """Takes the second bucket's reference samples out of the manifest."""
    first, second = Manifest.read(folder).whole.manifests
    toy.seal(folder, first, replace(second, reference=None))


def _own(manifest: Manifest) -> list[GraphRecord]:
    """The graphs that are for one size."""
    others = [record for name, record in manifest.others() if not name.startswith("text_encoder")]
    return [*manifest.phases, *others]


def _turned_manifest(manifest: Manifest) -> Manifest:
    channels, height, width = manifest.latent
    vae = manifest.vae
    return replace(
        manifest,
        width=manifest.height,
        height=manifest.width,
        latent=(channels, width, height),
        phases=tuple(_turned(record) for record in manifest.phases),
        step=None if manifest.step is None else _turned(manifest.step),
        controlnet=None if manifest.controlnet is None else _turned(manifest.controlnet),
        vae=None if vae is None else replace(vae, decoder=_turned(vae.decoder), encoder=_turned(vae.encoder)),
    )


def _numbered(made: Record, like: Record, batch: int) -> Record:
    """A record of a batch, whose prompts are as long as those of the bundle's own."""
    renamed = {name: _renamed(path, f"x{batch}") for name, path in made.engines.items()}
    own = {spec.name: spec for spec in like.inputs}
    inputs = tuple(
        replace(spec, shape=(spec.shape[0], *own[spec.name].shape[1:])) if spec.name == "prompt_embeds" else spec
        for spec in made.inputs
    )
    return replace(made, graph=_renamed(made.graph, f"x{batch}"), engines=renamed, inputs=inputs)


def _widened(record: Record, graph_batch: int, batch: int) -> Record:
    """A record whose pictures are as many."""

    def wide(spec: TensorSpec) -> TensorSpec:
        return spec if len(spec.shape) < 3 else replace(spec, shape=(graph_batch, *spec.shape[1:]))

    return _numbered(
        replace(record, inputs=tuple(map(wide, record.inputs)), outputs=tuple(map(wide, record.outputs))), record, batch
    )


def _turned(record: Record) -> Record:
    return replace(
        record,
        graph=_renamed(record.graph),
        engines={name: _renamed(path) for name, path in record.engines.items()},
        inputs=tuple(map(_turned_spec, record.inputs)),
        outputs=tuple(map(_turned_spec, record.outputs)),
    )


def _turned_spec(spec: TensorSpec) -> TensorSpec:
    """What is as large as the picture has its last two axes exchanged; residuals are square."""
    *first, rows, columns = spec.shape if len(spec.shape) > 3 else (*spec.shape, 0, 0)
    return TensorSpec(spec.name, (*first, columns, rows) if rows else spec.shape, spec.dtype)


def _renamed(path: str, suffix: str = "turned") -> str:
    stem, dot, ending = path.rpartition(".")
    return f"{stem}-{suffix}{dot}{ending}"
