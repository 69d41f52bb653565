"""What is noted beside a plan while a bundle is built: what it cost, and which files are whole.

Time and memory differ from one build to the next, so they are no part of a bundle, whose bytes the recipe decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_export.errors import BundleError
from hidiff_export.files import write_json
from hidiff_runtime.format.codec import Fields, parse_object
from hidiff_runtime.format.record_codec import decode, encode
from hidiff_runtime.format.specs import FileDigest

SUFFIX = ".built"
COSTS = ("seconds", "peak_bytes")
"""Time and memory that building a plan took."""


@dataclass(frozen=True)
class Built:
    """The note on a plan that is whole.

    Args:
        key: of everything that the plan depends on.
        files: its files, by name.
        costs: by the names in `COSTS`.
    """

    key: str
    files: Mapping[str, FileDigest]
    costs: Mapping[str, float]

    @classmethod
    def of(cls, key: str, paths: Iterable[Path], answer: Mapping[str, Any]) -> Built:
        """Returns the note on the files ``paths`` that a worker has written and answered for."""
        return cls(key, {path.name: FileDigest.of(path) for path in paths}, {name: answer[name] for name in COSTS})

    @classmethod
    def read(cls, engine: Path) -> Built | None:
        """Returns the note on the plan whose record is ``engine``; None where there is none or it is damaged."""
        path = engine.with_suffix(SUFFIX)
        try:
            fields = Fields(parse_object(path.read_text(encoding="utf-8"), path.name), path.name)
            return decode(cls, fields)
        except (BundleError, OSError, UnicodeDecodeError):
            return None

    def write(self, engine: Path) -> None:
        """Writes the note beside the plan's record."""
        write_json(engine.with_suffix(SUFFIX), encode(self))

    def holds(self, key: str, paths: Iterable[Path]) -> bool:
        """Returns whether these are the plan's files, of the same key and as they were written."""
        return self.key == key and all(
            path.is_file() and FileDigest.of(path) == self.files.get(path.name) for path in paths
        )
