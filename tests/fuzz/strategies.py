"""Which mutations a bundle has: one strategy for each kind."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.mutations import (
    DAMAGES,
    KINDS_OF_FILES,
    MANIFEST,
    TEXTS,
    Copy,
    Mutation,
    changed,
    dump,
    header_of,
    with_header,
)


def mutations(pristine: Path) -> st.SearchStrategy[Mutation]:
    """Every kind of mutation of a bundle."""
    return st.one_of([kind for kind in kinds(pristine).values() if kind is not None])


def kinds(pristine: Path) -> dict[str, st.SearchStrategy[Mutation] | None]:
    """The kinds by name; None for what the bundle does not have."""
    manifest = json.loads((pristine / MANIFEST).read_text())
    tokenizers = [encoder["tokenizer"] for encoder in manifest["text_encoders"]]
    (reference,) = {bucket["reference"] for bucket in manifest["buckets"]}
    tensors = str(Path(reference).with_name("samples.safetensors"))
    configuration = [name for name in manifest["files"] if name.endswith("scheduler_config.json")]
    reports = [manifest["report"]] if manifest["report"] else []
    engines = [engine for record in records(manifest) for engine in record["engines"].values()]
    graphs = [name for name in engines if name.endswith(".onnx")]
    found: dict[str, st.SearchStrategy[Mutation] | None] = {
        "manifest": in_manifest(manifest),
        "paths": paths(manifest),
        "tokenizer": in_json(pristine, tokenizers, "tokenizer"),
        "samples": in_json(pristine, [reference], "samples"),
        "report": in_json(pristine, [*reports, *configuration], "report") if reports or configuration else None,
        "JSON text": as_text(pristine, [MANIFEST, *tokenizers, reference, *reports, *configuration]),
        "weights' headers": in_header(pristine, list(manifest["weights"].values()), "weights' headers"),
        "samples' headers": in_header(pristine, [tensors], "samples' headers"),
        "tables' headers": in_header(pristine, list(manifest["samplers"].values()), "tables' headers"),
        "kinds of files": of_files(manifest, tensors),
        "graphs' weights": of_graphs(pristine, graphs) if graphs else None,
    }
    return found


def records(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Every graph of a manifest."""
    found = list(manifest["text_encoders"])
    for bucket in manifest["buckets"]:
        found += [*bucket["phases"], *(bucket[key] for key in ("controlnet", "step") if bucket.get(key))]
        found += [bucket["vae"][half] for half in ("decoder", "encoder")] if bucket.get("vae") else []
    return found


def in_manifest(manifest: dict[str, Any]) -> st.SearchStrategy[Mutation]:
    """A change of a field; the files' records, which are most of a manifest, are changed by `paths`."""
    content = {key: value for key, value in manifest.items() if key != "files"}

    def made(found: tuple[str, Any]) -> Mutation:
        what, new = found

        def apply(folder: Path) -> None:
            if isinstance(new, dict):
                Copy(folder).seal({**new, "files": manifest["files"]})
            else:
                Copy(folder).put(MANIFEST, json.dumps(new, default=str).encode())

        return Mutation("manifest", what, apply)

    return changed(content).map(made)


@st.composite
def paths(draw: st.DrawFn, manifest: dict[str, Any]) -> Mutation:
    """A file that the manifest lists otherwise: not at all, by another name, or as another one is."""
    files = dict(manifest["files"])
    name, other = draw(st.sampled_from(sorted(files))), draw(st.sampled_from(sorted(files)))
    operation = draw(st.sampled_from(("left out", "renamed", "another's record", "field")))
    what = f"{name} {operation}"
    if operation == "left out":
        del files[name]
    elif operation == "renamed":
        new = draw(st.sampled_from(("x" * 300, "/".join(["z" * 200] * 30), *(t for t in TEXTS if isinstance(t, str)))))
        files[new] = files.pop(name)
        what = f"{what} to {new[:40]!r}"
    elif operation == "another's record":
        files[name] = files[other]
        what = f"{what}, {other}"
    else:
        field, (_, value) = draw(st.sampled_from(("size", "sha256"))), draw(changed([0]))
        files[name] = {**files[name], field: value}
    return Mutation("paths", what, lambda folder: Copy(folder).seal({**manifest, "files": files}))


def in_json(pristine: Path, names: list[str], kind: str) -> st.SearchStrategy[Mutation]:
    """A change of a field in one of these files."""

    def of(name: str) -> st.SearchStrategy[Mutation]:
        def made(found: tuple[str, Any]) -> Mutation:
            new = dump(found[1]).encode("utf-8", "surrogatepass")
            return Mutation(kind, f"{name}: {found[0]}", _rewritten(name, new))

        return changed(json.loads((pristine / name).read_text())).map(made)

    return st.one_of([of(name) for name in names])


def as_text(pristine: Path, names: list[str]) -> st.SearchStrategy[Mutation]:
    """A file of JSON that is damaged as text."""

    def made(found: tuple[str, str, float]) -> Mutation:
        name, damage, share = found
        content = (pristine / name).read_bytes()
        new = DAMAGES[damage](content, int(share * len(content)))
        return Mutation("JSON text", f"{name}: {damage} at {share:.3f}", _rewritten(name, new))

    return st.tuples(st.sampled_from(names), st.sampled_from(sorted(DAMAGES)), st.floats(0, 1)).map(made)


def in_header(pristine: Path, names: list[str], kind: str) -> st.SearchStrategy[Mutation]:
    """A safetensors file with another header, or with other data behind it."""

    def of(name: str) -> st.SearchStrategy[Mutation]:
        header, data = header_of((pristine / name).read_bytes())

        def made(what: str, content: bytes) -> Mutation:
            engine = name.endswith("weights.safetensors")
            return Mutation(kind, f"{name}: {what}", _rewritten(name, content), engine=engine)

        fields = changed(header).map(lambda found: made(found[0], with_header(found[1], data)))
        whole = st.sampled_from(sorted(_HEADERS)).map(lambda what: made(what, _HEADERS[what](header, data)))
        return fields | fields | fields | whole

    return st.one_of([of(name) for name in names])


def _and_one(shape: list[int]) -> Callable[[dict[str, Any], bytes], bytes]:
    """A file with an empty tensor of this shape besides."""
    added = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    return lambda header, data: with_header({**header, **added}, data)


_HEADERS: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "data cut short": lambda header, data: with_header(header, data[: len(data) // 2]),
    "data longer": lambda header, data: with_header(header, data + bytes(8)),
    "length of nothing": lambda _, data: struct.pack("<Q", 0) + data,
    "length of everything": lambda _, data: struct.pack("<Q", 2**64 - 1) + data,
    "header cut short": lambda header, _: with_header(header, b"")[:-7],
    "header of spaces": lambda _, data: struct.pack("<Q", 8 * 2**20) + b" " * (8 * 2**20) + data,
    "header of 90 MB": lambda _, data: struct.pack("<Q", 90_000_000) + b"{" + b" " * 89_999_998 + b"}" + data,
    "many axes": _and_one([0] * 70),
    "an empty giant": _and_one([0, 2**62, 2**62]),
    "a shape of a million": _and_one([9] * 1_000_000),
}


@st.composite
def of_files(draw: st.DrawFn, manifest: dict[str, Any], tensors: str) -> Mutation:
    """A file that is of another kind, or is not what it was, with and without a record that fits."""
    name = draw(st.sampled_from((MANIFEST, manifest["buckets"][0]["reference"], tensors, *sorted(manifest["files"]))))
    kind, unlisted = draw(st.sampled_from(KINDS_OF_FILES)), draw(st.booleans())
    listed = {key: record for key, record in manifest["files"].items() if key != name}

    def apply(folder: Path) -> None:
        if unlisted and name != MANIFEST:
            Copy(folder).seal({**manifest, "files": listed})
        _make(folder / name, kind)
        if kind in ("empty", "cut short", "longer") and name != MANIFEST:
            Copy(folder).seal()

    engine = name.endswith((".onnx", "weights.safetensors", ".toy"))
    what = f"{name}: {kind}{', not listed' if unlisted else ''}"
    return Mutation("kinds of files", what, apply, engine=engine)


def _make(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "unreadable":
        path.unlink()
        path.write_bytes(content)
        path.chmod(0)
    elif kind == "folder unreadable":
        path.parent.chmod(0)
    elif kind == "parent is a link to itself":
        if path.name != MANIFEST:
            path.parent.rename(path.parent.with_name("moved"))
            path.parent.symlink_to(path.parent.name)
    else:
        path.unlink()
        _MADE[kind](path, content)


_MADE: dict[str, Callable[[Path, bytes], object]] = {
    "pipe": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "link to zeros": lambda path, _: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path, _: path.symlink_to("nowhere"),
    "link out": lambda path, _: path.symlink_to("/etc/hostname"),
    "removed": lambda _path, _: None,
    "empty": lambda path, _: path.write_bytes(b""),
    "cut short": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "longer": lambda path, content: path.write_bytes(content + b"\0"),
}


def of_graphs(pristine: Path, graphs: list[str]) -> st.SearchStrategy[Mutation]:
    """A graph that looks for its weights in another file, or is cut short.

    Names are as long as the one that they take the place of, so that nothing else in the file changes.
    """
    store = b"weights.safetensors"
    others = (
        b"../manifest.json/..",
        b"/etc/hostname/././.",
        b"tokenizer.json/././",
        b"nothing.safetensors",
        b"./../unet/nothing.s",
    )
    assert {len(other) for other in others} == {len(store)}

    def made(found: tuple[str, bytes | None]) -> Mutation:
        name, other = found
        content = (pristine / name).read_bytes()
        new = content[: len(content) // 2] if other is None else content.replace(store, other)
        return Mutation("graphs' weights", f"{name}: {other!r}", _rewritten(name, new), engine=True)

    return st.tuples(st.sampled_from(graphs), st.sampled_from((None, *others))).map(made)


def _rewritten(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        made = Copy(folder)
        made.put(name, content)
        if name != MANIFEST:
            made.seal()

    return apply
