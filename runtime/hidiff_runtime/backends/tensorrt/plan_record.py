"""The plan record: a JSON file beside a TensorRT plan that says what the plan is, before any library reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import REBUILD, Fields, read_object
from hidiff_runtime.format.record_codec import Form, decode, encode, key
from hidiff_runtime.format.specs import TensorSpec

FORMAT = 1
"""The newest format of plan records that this runtime reads."""

BACKENDS = ("tensorrt", "tensorrt-rtx")
"""The backends whose engines are plan records."""

_TARGET = re.compile(r"sm[0-9]{2,3}")


def _phase(fields: Fields, name: str) -> str | None:
    """Reads the one phase of the plan; None where it is no phase's."""
    phases = fields.listed(name, Fields.text)
    if len(phases) > 1:
        raise BundleError(
            "The engine holds several phases (layout: merged), which this hidiff-runtime does not run.",
            given=f"{fields.source}: {', '.join(phases)}",
            advice="Take layout out of the recipe and build the bundle again with 'hidiff-export build': each phase "
            "then has an engine of its own.",
        )
    return next(iter(phases), None)


def _tensors(fields: Fields, name: str) -> tuple[TensorSpec, ...]:
    """Reads a plan's tensors, which may have no axes."""
    return fields.each(name, lambda inner: decode(TensorSpec, inner, shape=inner.shape("shape", 0)))


Phases = Annotated[str | None, Form(_phase, lambda phase: [] if phase is None else [phase])]
Tensors = Annotated[tuple[TensorSpec, ...], Form(_tensors)]


@dataclass(frozen=True)
class PlanRecord:
    """What a plan is: who built it, for which GPUs, of which files, and what goes in and out.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the library that built it, such as ``1.7.1.116``; plans run on that version.
        targets: compute capabilities it was built for, such as ``sm89``.
        device: name of the GPU that it was built on and is tied to; ``None`` where any GPU of ``targets`` runs it.
        parts: names of files beside the record; the plan is their bytes one after another.
        phase: name of the phase that it evaluates; ``None`` for other graphs.
        selectors: empty; of plans of several phases, which there were once: older runtimes want the field.
        inputs: of the plan.
        outputs: of the plan.
        options: that it was built with, for people and for rebuilding.
    """

    backend: str
    version: str
    targets: tuple[str, ...]
    device: str | None
    parts: tuple[str, ...]
    phase: Phases = field(metadata=key("phases"))
    selectors: tuple[str, ...] = field(default=(), kw_only=True)
    inputs: Tensors
    outputs: Tensors
    options: Mapping[str, Any] = field(default_factory=dict)

    def paths(self, record: Path) -> tuple[Path, ...]:
        """Returns the files of the plan, in order, where its record lies at ``record``."""
        return tuple(record.parent / part for part in self.parts)

    @classmethod
    def read(cls, path: Path) -> PlanRecord:
        """Reads what :meth:`write` wrote.

        Raises:
            BundleError: there is no such file, it is no plan record of a format this runtime reads, or its plan holds
                several phases, as older versions could build it.
        """
        return _read(read_object(path, path.name, "A plan record"), path.name)

    def write(self, path: Path) -> None:
        """Writes the record to ``path``, beside the plan's parts. Raises BundleError if its fields do not agree."""
        _check(self, path.name)
        content = {"format": FORMAT, **encode(self)}
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _is_no_file_name(part: str) -> bool:
    return part in ("", ".", "..") or any(letter in '/\\:"' or ord(letter) < 32 for letter in part)


def _read(data: Mapping[str, Any], source: str) -> PlanRecord:
    found = data.get("format")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise BundleError(f"{source} is no plan record: it states no format.", given=sorted(data)[:8], advice=REBUILD)
    if found > FORMAT:
        raise BundleError(
            f"{source} has format {found}; this hidiff-runtime reads plan records up to {FORMAT}.",
            advice="pip install --upgrade hidiff-runtime",
        )
    fields = Fields(data, source)
    fields.take("format")
    record = decode(PlanRecord, fields)
    _check(record, source)
    return record


def _check(record: PlanRecord, source: str) -> None:
    """Refuses fields that do not agree with each other."""
    fields = Fields({}, source)
    if record.backend not in BACKENDS:
        raise fields.wrong("backend", f"must be one of {', '.join(BACKENDS)}", record.backend)
    if not record.targets or any(_TARGET.fullmatch(target) is None for target in record.targets):
        raise fields.wrong("targets", "must be compute capabilities such as sm89", list(record.targets))
    if not record.parts or any(_is_no_file_name(part) for part in record.parts):
        raise fields.wrong("parts", "must be names of files beside the record", list(record.parts))
    if record.selectors:
        raise fields.wrong("selectors", "must be empty", list(record.selectors))
    names = [spec.name for spec in (*record.inputs, *record.outputs)]
    if len(set(names)) != len(names) or not record.outputs:
        raise fields.wrong("inputs", "and outputs must have names of their own", names)
