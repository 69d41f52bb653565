"""Mutations of a bundle, drawn by hypothesis: fields, headers, and the kinds of its files.

Hashes and sizes are made to match what was changed, so that the checks behind them are reached.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

MANIFEST = "manifest.json"

Way = tuple[str | int, ...]
"""Keys and places that lead to a value in JSON."""


@dataclass(frozen=True)
class Mutation:
    """One change.

    Args:
        kind: what is changed, for the table.
        what: a line that tells of it.
        apply: makes it, in a copy of the bundle.
        engine: whether what an engine reads is changed, so that the engine may refuse it (exit code 5).
    """

    kind: str
    what: str
    apply: Callable[[Path], object]
    engine: bool = False


@dataclass(frozen=True)
class Token:
    """Something to be written into JSON as it is."""

    text: str


NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, -(10**30)),
    *(0.5, -0.5, 1.5, 1e-320, 1e38, 1e39, 1e308, -1e308, 3.0),
    *map(Token, ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1" * 400, "1" * 5000, "-0", "1e-999")),
)
TEXTS = (
    *("", " ", "x", "x" * 300, "y" * 5000, "a/b", "../manifest.json", "/etc/hostname", "a/../../b", "c:\\x", "a\0b"),
    *("é", "\u2028", "\x1b[31m", "[/bold]", "[link", "%s{0}", "self", "steps", "callback", "__class__", "onnxruntime"),
    *("float16", "int64", "F64", "Left", "true", "null"),
    *map(Token, ('"\\ud800"', '"\\udfff/x"')),
)
OTHERS = (None, True, False, [], {}, [[]], {"": 0}, [1, 2], [1] * 70, [0] * 3, [[[[]]]], {"a": {"b": 1}}, ["x", "y"])
KINDS_OF_FILES = (
    *("pipe", "folder", "link to itself", "link to zeros", "link to nothing", "link out", "unreadable", "empty"),
    *("removed", "cut short", "longer", "folder unreadable", "parent is a link to itself"),
)


def dump(value: Any) -> str:
    """JSON with what no JSON has: infinite numbers, halves of surrogate pairs, thousands of digits."""
    if isinstance(value, Token):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{dump(key)}:{dump(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def ways(value: Any, way: Way = ()) -> Iterator[Way]:
    """Every place in JSON, the outermost first; of long lists and objects the first few and the last."""
    yield way
    if isinstance(value, dict):
        keys: Sequence[str | int] = list(value)
    else:
        keys = range(len(value)) if isinstance(value, list) else ()
    for key in (*keys[:30], *keys[-1:]) if len(keys) > 31 else keys:
        yield from ways(value[key], (*way, key))


def at(value: Any, way: Way) -> Any:
    """What lies there."""
    for key in way:
        value = value[key]
    return value


def replaced(value: Any, way: Way, new: Any) -> Any:
    """The same with something else there, and what is not on the way shared."""
    if not way:
        return new
    found: Any = dict(value) if isinstance(value, dict) else list(value)
    found[way[0]] = replaced(value[way[0]], way[1:], new)
    return found


def changed(value: Any) -> st.SearchStrategy[tuple[str, Any]]:
    """JSON with a change, and what it is."""
    return _changed(value, list(ways(value)))


@st.composite
def _changed(draw: st.DrawFn, value: Any, every: list[Way]) -> tuple[str, Any]:
    way = draw(st.sampled_from(every))
    found, name = at(value, way), ".".join(map(str, way)) or "all"
    operation = draw(st.sampled_from(("value", "value", "value", "number", "other's", "left out", "added", "renamed")))
    if operation == "number" or (operation == "value" and isinstance(found, (int, float)) and draw(st.booleans())):
        new = draw(st.sampled_from(NUMBERS))
    elif operation == "other's":
        new = copy.deepcopy(at(value, draw(st.sampled_from(every[1:] or every))))
    elif operation == "value":
        new = draw(st.sampled_from((*NUMBERS, *TEXTS, *OTHERS)))
    elif isinstance(found, dict) and found:
        return _keys_changed(draw, value, way, name, operation)
    elif isinstance(found, list) and found:
        place = draw(st.integers(0, len(found) - 1))
        new = {"left out": found[:place] + found[place + 1 :], "added": [*found, copy.deepcopy(found[place])]}.get(
            operation, found[::-1]
        )
        return f"{name}: list {operation} at {place}", replaced(value, way, new)
    else:
        new = draw(st.sampled_from(OTHERS))
    return f"{name} = {dump(new)[:80]}", replaced(value, way, new)


def _keys_changed(draw: st.DrawFn, value: Any, way: Way, name: str, operation: str) -> tuple[str, Any]:
    found = dict(at(value, way))
    key = draw(st.sampled_from(list(found)))
    if operation == "left out":
        del found[key]
        return f"{name}.{key} left out", replaced(value, way, found)
    other = draw(st.sampled_from((*(text for text in TEXTS if isinstance(text, str)), *found)))
    if operation == "added":
        found[other] = copy.deepcopy(found[key])
    else:
        found[other] = found.pop(key)
    return f"{name}.{key} {operation} as {other[:40]!r}", replaced(value, way, found)


DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "cut short": lambda content, place: content[:place],
    "followed by more": lambda content, _: content + b"{}",
    "a byte order mark": lambda content, _: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content, _: content.decode().encode("utf-16"),
    "no UTF-8": lambda content, place: content[:place] + b"\xff\xfe" + content[place:],
    "deep": lambda _content, _: b'{"a":' * 100_000,
    "deep lists": lambda _content, _: b"[" * 500_000,
    "a key twice": lambda content, _: b'{"format":1,' + content.lstrip()[1:],
    "empty lists": lambda _content, _: b"[" + b"[]," * 1_000_000 + b"0]",
    "long": lambda content, _: content + b" " * (64 * 2**20),
}
"""What becomes of a file of JSON as text, given a place in it."""


class Copy:
    """A copy of the bundle that is to be changed: links to the pristine files, and a manifest sealed anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, content: bytes) -> None:
        """Writes a file in the place of the pristine one's link."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    def seal(self, manifest: dict[str, Any] | None = None) -> None:
        """Writes the manifest with a digest that fits, and with sizes and hashes of the files that were changed."""
        found = manifest or json.loads((self.folder / MANIFEST).read_text())
        if isinstance(found.get("files"), dict):
            for name, record in found["files"].items():
                path = self.folder / name if isinstance(name, str) and "\0" not in name and len(name) < 250 else None
                if isinstance(record, dict) and path is not None and _is_own(path):
                    content = path.read_bytes()
                    record |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.put(MANIFEST, sealed(found))


def _is_own(path: Path) -> bool:
    """Whether a file was written for this copy: the pristine ones have more than one link."""
    try:
        return path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1 and os.access(path, os.R_OK)
    except (OSError, ValueError):
        return False


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as bytes, with the digest of its content."""
    content = {key: below for key, below in manifest.items() if key != "digest"}
    digest = "0" * 64
    try:
        plain = json.loads(dump(content))
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
    except (ValueError, RecursionError):
        pass  # of what is no JSON there is no digest
    kept = {"digest": digest} if "digest" in manifest else {}
    return dump({**content, **kept}).encode("utf-8", "surrogatepass")


def linked(pristine: Path, folder: Path) -> Copy:
    """A copy that shares the pristine bundle's files."""
    shutil.copytree(pristine, folder, copy_function=os.link)
    return Copy(folder)


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and what follows it."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    """A safetensors file."""
    text = dump(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data
