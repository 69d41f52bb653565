"""The toy bundle of two sizes: its own, and the same on end."""

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


def _renamed(path: str) -> str:
    stem, dot, ending = path.rpartition(".")
    return f"{stem}-turned{dot}{ending}"
