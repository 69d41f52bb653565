"""Bundles that get engines of OpenVINO beside those that they have."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import toy

from hidiff_export.engines.openvino import OpenVinoBuilder
from hidiff_export.engines.protocol import PortableGraph
from hidiff_runtime.format.manifest import GraphRecord, Manifest


def with_openvino(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle of one size, with an engine of OpenVINO for each graph, as the builder makes it."""
    shutil.copytree(bundle, folder)
    manifest = Manifest.read(folder)
    graphs = [PortableGraph(folder / record.graph, record) for record in _records(manifest)]
    builder = OpenVinoBuilder()
    builder.build(graphs, lambda *_: None)
    engines = {
        graph.record.graph: engine.relative_to(folder).as_posix()
        for graph, engine in zip(graphs, builder.engines(graphs), strict=True)
    }
    toy.seal(folder, _changed(manifest, engines))
    return folder


def _records(value: Any) -> Iterator[GraphRecord]:
    if isinstance(value, GraphRecord):
        yield value
    elif isinstance(value, tuple):
        for inner in value:
            yield from _records(inner)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _records(getattr(value, field.name))


def _changed(value: Any, engines: dict[str, str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_changed(inner, engines) for inner in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed = {field.name: _changed(getattr(value, field.name), engines) for field in fields(value) if field.init}
    if isinstance(value, GraphRecord):
        changed["engines"] = {**value.engines, "openvino": engines[value.graph]}
    return replace(value, **changed)
