"""The compile record: a JSON file that says how OpenVINO compiles a graph; it may choose none of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import REBUILD, Fields, read_object
from hidiff_runtime.format.paths import path_error
from hidiff_runtime.format.record_codec import Form, decode, encode

FORMAT = 1
"""The newest format of compile records that this runtime reads."""

PRECISIONS = ("float32", "bfloat16")

Precision = Annotated[str, Form(lambda fields, name: fields.choice(name, PRECISIONS))]


@dataclass(frozen=True)
class CompileRecord:
    """How OpenVINO compiles a graph.

    Args:
        graph: its file's name, which lies beside the record.
        precision: ``float32`` or ``bfloat16``, in which everything is computed that is not among ``float32``.
        float32: names of nodes that a graph of their own computes in float32, from inputs and constants alone; the rest
            takes their results as inputs.
    """

    graph: str
    precision: Precision
    float32: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> CompileRecord:
        """Reads what :meth:`write` wrote.

        Raises:
            BundleError: there is no such file, or it is no compile record of a format that this runtime reads.
        """
        fields = Fields(read_object(path, path.name, "A compile record"), path.name)
        found = fields.whole("format", least=1)
        if found > FORMAT:
            raise BundleError(
                f"{path.name} has format {found}; this hidiff-runtime reads compile records up to {FORMAT}.",
                advice="pip install --upgrade hidiff-runtime",
            )
        record = decode(cls, fields)
        if "/" in record.graph or path_error(record.graph):
            raise BundleError(f"{path.name} names a graph that is not beside it.", given=record.graph, advice=REBUILD)
        return record

    def write(self, path: Path) -> None:
        """Writes the record to ``path``, beside the graph."""
        content = {"format": FORMAT, **encode(self)}
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
