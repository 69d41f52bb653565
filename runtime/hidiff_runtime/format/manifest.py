"""The bundle's table of contents: what it computes, which files it is made of, and what each file must hash to.

``manifest.json`` is written last, so a folder without one was never finished. It carries a digest of its own
content, since no other file could vouch for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import LARGEST_JSON, Fields, parse_object
from hidiff_runtime.format.manifest_record import FORMAT, ManifestRecord
from hidiff_runtime.format.record_codec import decode, encode
from hidiff_runtime.format.regular_files import read_regular
from hidiff_runtime.format.specs import DTYPES, FileDigest, GraphRecord, PhaseRecord, TensorSpec
from hidiff_runtime.format.validation import validate_manifest

__all__ = ["DTYPES", "FORMAT", "MANIFEST", "FileDigest", "GraphRecord", "Manifest", "PhaseRecord", "TensorSpec"]

MANIFEST = "manifest.json"
"""The manifest's name in a bundle's folder."""


@dataclass(frozen=True)
class Manifest(ManifestRecord):
    """A manifest as ``manifest.json`` holds it; its fields are those of `ManifestRecord`."""

    def to_json(self) -> dict[str, Any]:
        """Returns what ``manifest.json`` holds, the content's digest included. Keys may be written in any order."""
        data = encode(self)
        return {**data, "digest": _digest(data)}

    @property
    def digest(self) -> str:
        """SHA-256 of the content, which names every file's: the bundle's hash."""
        return _digest(encode(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Reads what :meth:`to_json` gave.

        Raises:
            BundleError: not a whole manifest of a format this runtime reads; the field is named.
        """
        _check_format(data)
        fields = Fields(data, MANIFEST)
        digest = fields.text("digest")
        manifest = decode(cls, fields)
        validate_manifest(manifest, fields)
        content = {key: value for key, value in data.items() if key != "digest"}
        if digest != _digest(content):
            raise fields.wrong(
                "digest", "does not match the content: the file was changed after it was written", digest
            )
        return manifest

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads the manifest at ``path``, a ``manifest.json`` or the bundle's folder.

        Raises:
            BundleError: there is none, or it is broken, foreign or of a newer format.
        """
        file = path / MANIFEST if os.path.isdir(path) else path  # noqa: PTH112 - never raises
        try:
            content = read_regular(file, LARGEST_JSON)
        except FileNotFoundError as error:
            raise BundleError(
                "This folder is not a finished bundle: it has no manifest.json.",
                given=path,
                advice="Give the folder that 'hidiff-export build RECIPE -o DIR' made, or run that again to finish it.",
            ) from error
        except OSError as error:
            raise BundleError(
                "manifest.json cannot be read.", given=error.strerror, advice="Check the file."
            ) from error
        return cls.from_json(parse_object(content, MANIFEST))


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_format(data: Mapping[str, Any]) -> None:
    found = data.get("format")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise BundleError(
            "This is not the manifest of a HiDiffusion bundle: it states no format.",
            given=f"format {found!r}, keys {sorted(data)[:8]}",
            advice="Give the folder that 'hidiff-export build' made.",
        )
    if found > FORMAT:
        tools = data.get("tools")
        version = tools.get("hidiff-runtime", "") if isinstance(tools, dict) else ""
        needed = f"hidiff-runtime>={version}" if version else "hidiff-runtime"
        raise BundleError(
            f"This bundle has format {found}; this hidiff-runtime reads formats up to {FORMAT}.",
            given=f"written for {needed}",
            advice=f"pip install --upgrade '{needed}'",
        )
