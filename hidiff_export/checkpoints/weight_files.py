"""Which files of a network's folder hold its weights: whole or in shards, plain or a variant, under any spelling.

Plain files come first, as diffusers and transformers take them. Where there are none, a variant is taken: `VARIANTS` in
this order, then others by name. Shards are found by an index, and without one by their own names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from hidiff_export.checkpoints.checkpoint_file import OTHER_FORMATS, PICKLES, refuse_lfs_pointer
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.contents import listed
from hidiff_export.errors import CheckpointError

VARIANTS = ("fp32", "fp16", "bf16", "ema", "non_ema")
"""Which variant is taken first where a folder has several and no plain files."""

_ROUNDED = ("fp32", "fp16", "bf16")
"""Variants that are the plain weights in another type; taking one needs no word."""

_SAFETENSORS = ".safetensors"
_INDEX = re.compile(r"\.safetensors\.index(\.(?P<new>[^.]+))?\.json$")
_SHARD = re.compile(r"-(?P<part>\d{5})-of-(?P<parts>\d{5})")


class Folder(Protocol):
    """A network's folder, here or on the hub."""

    def __call__(self, name: str) -> Path | None:
        """Returns the local path of a file by its path inside the checkpoint, None where there is no such file."""

    def names(self, prefix: str) -> list[str]:
        """Returns the names of all files in a folder of the checkpoint, which is empty or ends with a slash."""


class WeightFiles(NamedTuple):
    """The safetensors files that hold a network's weights.

    Args:
        paths: of the files.
        notices: what has to be told about the choice of the files, a line each.
        config: the network's configuration, where one lies beside them.
    """

    paths: tuple[Path, ...]
    notices: tuple[str, ...] = ()
    config: dict[str, Any] | None = None


def stem_of(component: Component) -> str:
    """Returns how the names of a network's weight files begin in its library."""
    return "model" if component.is_text else "diffusion_pytorch_model"


def find_weights(folder: Folder, prefix: str, source: str, component: Component) -> WeightFiles:
    """Returns the weight files of a network.

    Args:
        folder: of the checkpoint.
        prefix: the network's folder in it.
        source: as the user gave it, for messages.
        component: the network.

    Raises:
        CheckpointError: there are none, a shard is missing, or they are pickles or in another format.
    """
    stem = stem_of(component)
    plain = folder(f"{prefix}{stem}{_SAFETENSORS}")
    if plain is not None:
        return WeightFiles((plain,))
    index = folder(f"{prefix}{stem}{_SAFETENSORS}.index.json")
    if index is not None:
        return WeightFiles(_shards(folder, prefix, index))
    names = folder.names(prefix)
    variants = _variants(names, stem)
    if not variants:
        return _odd(folder, prefix, source, component, names)
    ranked = sorted(variants, key=_rank)
    chosen = ranked[0]
    paths = _files_of(folder, prefix, variants[chosen])
    where = f"{component.value}: the weights are "
    if len(ranked) > 1:
        others = ", ".join(ranked[1:])
        return WeightFiles(paths, (f"{where}those of the variant {chosen}; not taken: {others}",))
    told = () if chosen in ("", *_ROUNDED) else (f"{where}those of the variant {chosen}, the only ones there",)
    return WeightFiles(paths, told)


def read_json(path: Path) -> dict[str, Any]:
    """Returns what a JSON file of a checkpoint holds. Raises CheckpointError where it is damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        refuse_lfs_pointer(path)
        raise CheckpointError(
            "A file of the checkpoint cannot be read.",
            given=f"{path}: {error}",
            advice="Take this file from where the checkpoint was published.",
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            "A file of the checkpoint is not a JSON object.",
            given=path,
            advice="Take this file from where the checkpoint was published.",
        )
    return content


def _rank(variant: str) -> tuple[int, str]:
    order = ("", *VARIANTS)
    return (order.index(variant) if variant in order else len(order), variant)


def _variants(names: Iterable[str], stem: str) -> dict[str, list[str]]:
    """Returns the names of weight files and indexes by variant, empty for plain shards without an index."""
    found: dict[str, list[str]] = {}
    for name in names:
        rest = name.removeprefix(stem)
        if rest == name or rest[:1] not in (".", "-"):
            continue
        if index := _INDEX.search(rest):
            variant = index["new"] or rest[: index.start()]
        elif name.endswith(_SAFETENSORS):
            variant = _SHARD.sub("", rest.removesuffix(_SAFETENSORS))
        else:
            continue
        found.setdefault(variant.strip("."), []).append(name)
    return found


def _files_of(folder: Folder, prefix: str, names: list[str]) -> tuple[Path, ...]:
    """Returns the files of a variant: the whole one, else the shards of its index, else the shards that are there."""
    whole = [name for name in names if name.endswith(_SAFETENSORS) and not _SHARD.search(name)]
    if whole:
        return (_fetched(folder, prefix, whole[0]),)
    indexes = [name for name in names if name.endswith(".json")]
    if indexes:
        return _shards(folder, prefix, _fetched(folder, prefix, indexes[0]))
    return _complete(folder, prefix, names)


def _complete(folder: Folder, prefix: str, names: list[str]) -> tuple[Path, ...]:
    """Shards without an index: all parts of as many as their names say."""
    marks = {name: found for name in names if (found := _SHARD.search(name))}
    totals = {mark["parts"] for mark in marks.values()}
    parts = {int(mark["part"]) for mark in marks.values()}
    expected = set(range(1, int(min(totals)) + 1))
    if len(totals) != 1 or parts != expected or len(marks) != len(parts):
        raise CheckpointError(
            "The shards of the checkpoint are not complete, and there is no index that names them.",
            given=f"{prefix}{listed(sorted(names))}; missing: {listed(map(str, sorted(expected - parts))) or 'none'}",
            advice="Download the missing shards, and keep those of one checkpoint alone in the folder.",
        )
    return tuple(_fetched(folder, prefix, name) for name in sorted(names))


def _fetched(folder: Folder, prefix: str, name: str) -> Path:
    path = folder(prefix + name)
    if path is None:
        raise _missing_shard(name, prefix, [])
    return path


def _shards(folder: Folder, prefix: str, index: Path) -> tuple[Path, ...]:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries.values()):
        raise CheckpointError(
            "The index of a sharded checkpoint is damaged.",
            given=f"{index}: expected a weight_map of names",
            advice="Remove the index: shards are found by their names too.",
        )
    paths = []
    for name in sorted(set(entries.values())):
        spellings = _spellings(name, index.name) if PurePosixPath(name).name == name else ()
        found = next((path for spelling in spellings if (path := folder(prefix + spelling)) is not None), None)
        if found is None:
            raise _missing_shard(name, str(index), folder.names(prefix))
        paths.append(found)
    return tuple(paths)


def _spellings(name: str, index: str) -> Iterable[str]:
    """Yields a shard's name, and how other versions of the libraries spelled it with the index's variant."""
    yield name
    mark, named = _SHARD.search(name), _INDEX.search(index)
    if mark is None or named is None:
        return
    before = index[: named.start()]
    variant = named["new"] or before.partition(".")[2]
    stem = name[: mark.start()].removesuffix(f".{variant}")
    if variant:
        yield f"{stem}.{variant}{mark[0]}{_SAFETENSORS}"
        yield f"{stem}{mark[0]}.{variant}{_SAFETENSORS}"


def _missing_shard(name: str, index: str, names: Iterable[str]) -> CheckpointError:
    there = sorted(other for other in names if other.endswith(_SAFETENSORS))
    advice = f"Give it this name if it is there under another ({listed(there)}), or download" if there else "Download"
    return CheckpointError(
        "A shard of the checkpoint is missing.",
        given=f"{name}, named in {index}",
        advice=f"{advice} this file into the folder.",
    )


def _odd(folder: Folder, prefix: str, source: str, component: Component, names: list[str]) -> WeightFiles:
    """Returns the one safetensors file under a name that no library gives, or the reason why there are no weights."""
    odd = [name for name in names if name.endswith(_SAFETENSORS)]
    if len(odd) == 1:
        notice = f"{component.value}: the weights are taken from {odd[0]}, the only safetensors file there"
        return WeightFiles((_fetched(folder, prefix, odd[0]),), (notice,))
    place = f"{source}: {prefix}" if prefix else source
    expected = f"{stem_of(component)}{_SAFETENSORS}"
    if odd:
        raise CheckpointError(
            "The checkpoint's folder has several safetensors files, and none has the name of weights.",
            given=f"{place} has {listed(sorted(odd))}",
            advice=f"Name the right one {expected}.",
        )
    pickled = sorted(name for name in names if _is_pickle(name, stem_of(component)))
    if pickled:
        raise pickled_folder(pickled[0], prefix, source, component)
    for name in sorted(names):
        what = OTHER_FORMATS.get(PurePosixPath(name).suffix)
        if what is not None:
            raise CheckpointError(
                f"The checkpoint's folder has no weights that can be read: it has {what}.",
                given=f"{place}{name}" if prefix else f"{place}/{name}",
                advice=f"Put {expected} from where the checkpoint was published beside it.",
            )
    raise CheckpointError(
        "The checkpoint's folder has a configuration but no weights.",
        given=f"{place} has no {expected}",
        advice="Copy or download this file into the folder: it was left out.",
    )


def _is_pickle(name: str, stem: str) -> bool:
    if name.endswith(".index.json") or ".bin.index." in name:
        return ".bin." in name
    return name.endswith(PICKLES) and name.startswith((stem, "pytorch_model", "diffusion_pytorch_model", "model"))


def pickled_folder(name: str, prefix: str, source: str, component: Component) -> CheckpointError:
    """Returns what is said of a folder whose weights are pickles: how its own library rewrites them."""
    library = "transformers" if component.is_text else "diffusers"
    inner = f", subfolder={prefix.rstrip('/')!r}" if prefix else ""
    variant = _pickled_variant(name, stem_of(component))
    kept = f", variant={variant!r}" if variant else ""
    target = f"{source}/{prefix}".rstrip("/")
    target = target if Path(source).expanduser().is_dir() else f"NEW_FOLDER/{prefix}".rstrip("/")
    return CheckpointError(
        "The checkpoint's weights are pickles, which can run code when they are opened.",
        given=f"{source}: {prefix}{name}",
        advice=f"If you trust it, convert it: `from {library} import {component.class_name} as M; "
        f"M.from_pretrained({source!r}{inner}, use_safetensors=False{kept}).save_pretrained({target!r})`.",
    )


def _pickled_variant(name: str, stem: str) -> str:
    rest = name.removeprefix("pytorch_model" if name.startswith("pytorch_model") else stem)
    return _SHARD.sub("", rest.split(".bin")[0]).strip(".") if ".bin" in rest else ""
