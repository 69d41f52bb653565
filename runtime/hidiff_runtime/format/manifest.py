"""The bundle's table of contents: what it computes, for which pictures, of which files, and what each must hash to.

``manifest.json`` is written last, so a folder without one was never finished. It carries a digest of its own
content, since no other file could vouch for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, TypeVar

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import LARGEST_JSON, Fields, parse_object
from hidiff_runtime.format.manifest_record import FORMAT, BucketRecord, ManifestRecord, SharedRecord
from hidiff_runtime.format.record_codec import FLAT, decode, encode
from hidiff_runtime.format.regular_files import read_regular
from hidiff_runtime.format.specs import DTYPES, FileDigest, GraphRecord, PhaseRecord, TensorSpec
from hidiff_runtime.format.validation import validate_contents

T = TypeVar("T", SharedRecord, BucketRecord)

__all__ = [
    "DTYPES",
    "FORMAT",
    "MANIFEST",
    "Contents",
    "FileDigest",
    "GraphRecord",
    "Manifest",
    "PhaseRecord",
    "TensorSpec",
]

MANIFEST = "manifest.json"
"""The manifest's name in a bundle's folder."""


@dataclass(frozen=True)
class Contents:
    """All that ``manifest.json`` says.

    Args:
        shared: what there is once.
        buckets: what there is for each size and batch; the first is the default.
        format: that the file was written in. Older ones keep theirs, for their digest is of what was written.
    """

    shared: SharedRecord = field(metadata=FLAT)
    buckets: tuple[BucketRecord, ...]
    format: int = FORMAT

    @classmethod
    def of(cls, manifests: Sequence[ManifestRecord]) -> Contents:
        """Returns the contents of a bundle with these buckets; what all share is the first one's."""
        return cls(_part(SharedRecord, manifests[0]), tuple(_part(BucketRecord, one) for one in manifests))

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """What the file says of each bucket, beside what all share."""
        return tuple(Manifest.of(self, bucket) for bucket in self.buckets)

    def sharing(self, **changes: Any) -> Contents:
        """Returns the contents with fields of `SharedRecord` replaced, and every bucket kept."""
        return Contents(replace(self.shared, **changes), self.buckets)

    @property
    def files(self) -> Mapping[str, FileDigest]:
        """Every file of the bundle but the manifest, by relative path."""
        return self.shared.files

    @property
    def digest(self) -> str:
        """SHA-256 of the content, which names every file's: the bundle's hash."""
        return _digest(self._content())

    def to_json(self) -> dict[str, Any]:
        """Returns what ``manifest.json`` holds, the content's digest included. Keys may be written in any order."""
        data = self._content()
        return {**data, "digest": _digest(data)}

    def _content(self) -> dict[str, Any]:
        if self.format == 1:
            return {**encode(ManifestRecord(**vars(self.shared), **vars(self.buckets[0]))), "format": 1}
        return encode(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Contents:
        """Reads what :meth:`to_json` gave.

        Raises:
            BundleError: not a whole manifest of a format this runtime reads; the field is named.
        """
        _check_format(data)
        fields = Fields(data, MANIFEST)
        digest = fields.text("digest")
        contents = _format_1(fields) if data["format"] == 1 else decode(cls, fields)
        validate_contents(contents.manifests, fields, listed=contents.format > 1)
        content = {key: value for key, value in data.items() if key != "digest"}
        if digest != _digest(content):
            raise fields.wrong(
                "digest", "does not match the content: the file was changed after it was written", digest
            )
        return contents

    @classmethod
    def read(cls, path: Path) -> Contents:
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


@dataclass(frozen=True, kw_only=True)
class Manifest(ManifestRecord):
    """What ``manifest.json`` says of one bucket; its fields are those of `ManifestRecord`.

    Attributes:
        contents: all that the file says; None of one that is not written yet.
    """

    contents: Contents | None = field(default=None, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, contents: Contents, bucket: BucketRecord) -> Manifest:
        """Returns what ``contents`` says of one of its buckets."""
        manifest = cls(**vars(contents.shared), **vars(bucket))
        object.__setattr__(manifest, "contents", contents)
        return manifest

    @property
    def whole(self) -> Contents:
        """All that the file says, or will where this bucket is its only one."""
        return Contents.of([self]) if self.contents is None else self.contents

    @property
    def digest(self) -> str:
        """The bundle's hash, see `Contents.digest`."""
        return self.whole.digest

    def to_json(self) -> dict[str, Any]:
        """Returns what ``manifest.json`` holds."""
        return self.whole.to_json()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Reads what :meth:`to_json` gave: what it says of the first bucket. Raises as `Contents.from_json` does."""
        return Contents.from_json(data).manifests[0]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads what a bundle's manifest says of its first bucket. Raises as `Contents.read` does."""
        return Contents.read(path).manifests[0]


def _part(cls: type[T], record: ManifestRecord) -> T:
    """Returns the fields that one of a record's bases has."""
    return cls(**{field.name: getattr(record, field.name) for field in fields_of(cls)})


def _format_1(fields: Fields) -> Contents:
    """Reads a manifest of the format that had one bucket, whose fields were among the others."""
    fields.take("format")
    record = decode(ManifestRecord, fields)
    return replace(Contents.of([record]), format=1)


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
