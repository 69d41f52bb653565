"""The plan record: a JSON file beside a TensorRT plan that says what the plan is, before any library reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import REBUILD, Fields, read_object
from hidiff_runtime.format.manifest import DTYPES, TensorSpec

FORMAT = 1
"""The newest format of plan records that this runtime reads."""

BACKENDS = ("tensorrt", "tensorrt-rtx")
"""The backends whose engines are plan records."""

_TARGET = re.compile(r"sm[0-9]{2,3}")


@dataclass(frozen=True)
class PlanRecord:
    """What a plan is: who built it, for which GPUs, of which files, and what goes in and out.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the library that built it, such as ``1.7.1.116``; plans run on that version.
        targets: compute capabilities it was built for, such as ``sm89``.
        device: name of the GPU that it was built on and is tied to; ``None`` where any GPU of ``targets`` runs it.
        parts: names of files beside the record; the plan is their bytes one after another.
        phases: names of the phases in the plan: one, or all of a merged plan's; none for other graphs.
        selectors: names of a merged plan's bool 0-D inputs, one less than phases: selector i true means phase i + 1,
            none true means phase 0.
        inputs: of the plan without its selectors; a merged plan's are those of all its phases together.
        outputs: of the plan.
        options: that it was built with, for people and for rebuilding.
    """

    backend: str
    version: str
    targets: tuple[str, ...]
    device: str | None
    parts: tuple[str, ...]
    phases: tuple[str, ...]
    selectors: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether the plan holds several phases."""
        return len(self.phases) > 1

    def selected(self, phase: str) -> dict[str, bool]:
        """What each selector must be for ``phase`` to run; nothing where the plan is not merged.

        Raises:
            BundleError: the plan is merged and has no such phase.
        """
        if not self.merged:
            return {}
        if phase not in self.phases:
            raise BundleError(f"The plan has no phase {phase}.", given=", ".join(self.phases), advice=REBUILD)
        chosen = self.phases.index(phase)
        return {name: index + 1 == chosen for index, name in enumerate(self.selectors)}

    def paths(self, record: Path) -> tuple[Path, ...]:
        """The files of the plan, in order, where its record lies at ``record``."""
        return tuple(record.parent / part for part in self.parts)

    @classmethod
    def read(cls, path: Path) -> PlanRecord:
        """Reads what :meth:`write` wrote.

        Raises:
            BundleError: there is no such file, or it is no plan record of a format this runtime reads.
        """
        return _read(read_object(path, path.name, "A plan record"), path.name)

    def write(self, path: Path) -> None:
        """Writes the record to ``path``, beside the plan's parts. Raises BundleError if its fields do not agree."""
        _check(self, path.name)
        content = {
            "format": FORMAT,
            "backend": self.backend,
            "version": self.version,
            "targets": list(self.targets),
            "device": self.device,
            "parts": list(self.parts),
            "phases": list(self.phases),
            "selectors": list(self.selectors),
            "inputs": [_tensor_content(spec) for spec in self.inputs],
            "outputs": [_tensor_content(spec) for spec in self.outputs],
            "options": dict(self.options),
        }
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _is_no_file_name(part: str) -> bool:
    return part in ("", ".", "..") or any(letter in '/\\:"' or ord(letter) < 32 for letter in part)


def _tensor_content(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}


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
    record = PlanRecord(
        backend=fields.text("backend"),
        version=fields.text("version"),
        targets=fields.texts("targets"),
        device=fields.optional("device", fields.text),
        parts=fields.texts("parts"),
        phases=fields.texts("phases"),
        selectors=fields.texts("selectors"),
        inputs=fields.each("inputs", _tensor),
        outputs=fields.each("outputs", _tensor),
        options=fields.mapping("options"),
    )
    fields.done()
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
    if len(set(record.phases)) != len(record.phases):
        raise fields.wrong("phases", "must differ from each other", list(record.phases))
    if len(record.selectors) != max(len(record.phases) - 1, 0):
        raise fields.wrong("selectors", "must be one less than phases", list(record.selectors))
    names = [*record.selectors, *(spec.name for spec in (*record.inputs, *record.outputs))]
    if len(set(names)) != len(names) or not record.outputs:
        raise fields.wrong("inputs", "and selectors and outputs must have names of their own", names)


def _tensor(fields: Fields) -> TensorSpec:
    spec = TensorSpec(fields.text("name"), fields.shape("shape", 0), fields.text("dtype"))
    if spec.dtype not in DTYPES:
        raise fields.wrong("dtype", f"must be one of {', '.join(DTYPES)}", spec.dtype)
    return spec
