"""Finding a checkpoint's files: in a folder, as one file, or on the Hugging Face hub (its cache first)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hidiff_export.errors import CheckpointError, StorageError
from hidiff_export.model.component import Component
from hidiff_runtime.manifest import FileRecord


def _names(component: Component) -> tuple[str, ...]:
    """Where diffusers and transformers put a network's weights, the most precise first."""
    stem = _stem(component)
    if component.is_text:
        return (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors")
    return (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
    )


def _stem(component: Component) -> str:
    return "model" if component.is_text else "diffusion_pytorch_model"


_SCHEDULER = "scheduler/scheduler_config.json"
MODEL_INDEX = "model_index.json"
"""Where a diffusers folder says what its pipeline is."""

_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
"""Whose tokenizer every family's text encoders were trained with; single files come without one."""

RANDOM = "random:"
"""How the source of a fabricated checkpoint begins."""

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_AGAIN = "Copy or download the checkpoint again."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Fetch = Callable[[str], "Path | None"]
"""Gives the local path of a checkpoint's file by its path inside the checkpoint, None when it has no such file."""


@dataclass(frozen=True)
class CheckpointFiles:
    """What was found: the safetensors files, and the network's configuration where one lies beside them."""

    weights: tuple[Path, ...]
    config: dict[str, Any] | None


def find_checkpoint(source: str, component: Component) -> CheckpointFiles:
    """The files of a network.

    Args:
        source: path of a pipeline's or a network's diffusers folder, path of a ``.safetensors`` file, or a hub id.
        component: the network wanted.

    Raises:
        CheckpointError: when there is nothing there, it is incomplete, or it is a pickle.
        StorageError: when a download cannot be written.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in _PICKLES:
        raise _pickle(path)
    if source and path.is_dir():
        return _in_folder(lambda name: path / name if (path / name).is_file() else None, source, component)
    if path.suffix == ".safetensors":
        return CheckpointFiles((path,), config=None)
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            "There is no checkpoint at this path.",
            given=source,
            advice="Give a diffusers folder, a .safetensors file, a hub id like org/name, or random:SEED.",
        )
    return _on_hub(source, component)


def source_fingerprint(source: str, component: Component) -> str:
    """What a source holds, as SHA-256 over its configuration and weight files; a fabricated one is its own name.

    Raises what `find_checkpoint` raises.
    """
    if source.startswith(RANDOM):
        return source
    files = find_checkpoint(source, component)
    sha = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    for path in files.weights:
        try:
            sha.update(FileRecord.of(path).sha256.encode())
        except OSError as error:
            raise CheckpointError(
                "A file of the checkpoint cannot be read.", given=f"{path}: {error.strerror}", advice=_AGAIN
            ) from error
    return sha.hexdigest()


def find_scheduler_config(source: str) -> dict[str, Any] | None:
    """The noise schedule that comes with a checkpoint, as diffusers writes it; None where none does.

    Raises:
        CheckpointError: it is damaged, or the hub that may have one cannot be reached.
        StorageError: when a download cannot be written.
    """
    return _find_json(source, _SCHEDULER, "noise schedule")


def find_model_index(source: str) -> dict[str, Any] | None:
    """What a checkpoint's ``model_index.json`` holds; None where there is none, as with single files.

    Raises what `find_scheduler_config` raises.
    """
    return _find_json(source, MODEL_INDEX, MODEL_INDEX)


def _find_json(source: str, name: str, called: str) -> dict[str, Any] | None:
    """A file of a folder or of the hub, its cache first; None where the checkpoint has no such file."""
    path = Path(source).expanduser()
    found: Path | None = None
    if path.is_dir():
        found = path / name if (path / name).is_file() else None
    elif not source.startswith(RANDOM) and path.suffix != ".safetensors":
        hub = _HubFolder(source, connect=True)
        with _hub_errors(source):
            found = _HubFolder(source, connect=False)(name) or hub(name)
        if found is None and not hub.connect:
            raise CheckpointError(
                f"The checkpoint's {called} is not in the local cache, and the hub cannot be reached.",
                given=f"{source}: {name}",
                advice=f"Go online, or run `hf download {source}` elsewhere and give the folder.",
            )
    return None if found is None else _read_json(found)


def find_tokenizer(source: str, folder: str) -> dict[str, Path]:
    """The files of a tokenizer by their names, as transformers writes them.

    Args:
        source: as for `find_checkpoint`; a single file's tokenizer is the one that CLIP was published with.
        folder: ``tokenizer`` or ``tokenizer_2``.

    Raises:
        CheckpointError: there is none, or the hub that has it cannot be reached.
        StorageError: when a download cannot be written.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _tokenizer_files(lambda name: path / name if (path / name).is_file() else None, f"{folder}/")
    elif path.suffix == ".safetensors":
        found = _tokenizer_on_hub(_CLIP_TOKENIZER, "")
    else:
        found = _tokenizer_on_hub(source, f"{folder}/")
    if not found:
        raise CheckpointError(
            "There is no tokenizer in this checkpoint.",
            given=f"{source} has neither {folder}/vocab.json with merges.txt nor {folder}/tokenizer.json",
            advice="Give the whole pipeline's folder, or set text: false for a bundle without.",
        )
    return found


def _tokenizer_files(fetch: Fetch, prefix: str) -> dict[str, Path]:
    whole = {name: path for name in _TOKENIZER if (path := fetch(prefix + name)) is not None}
    if "tokenizer.json" not in whole and len(whole) < 2:
        return {}
    return whole | {name: path for name in _TOKENIZER_SETTINGS if (path := fetch(prefix + name)) is not None}


def _tokenizer_on_hub(repository: str, prefix: str) -> dict[str, Path]:
    with _hub_errors(repository):
        folder = _HubFolder(repository, connect=False)
        found = _tokenizer_files(folder, prefix)
        if not found:
            folder = _HubFolder(repository, connect=True)
            found = _tokenizer_files(folder, prefix)
    if not found and not folder.connect:
        raise CheckpointError(
            "The tokenizer is not in the local cache, and the hub cannot be reached.",
            given=repository,
            advice=f"Go online, run `hf download {repository}` elsewhere and copy the cache, give a diffusers folder "
            "that has its tokenizer, or set text: false for a bundle without.",
        )
    return found


def _in_folder(fetch: Fetch, source: str, component: Component) -> CheckpointFiles:
    # A folder of the network itself is taken for the two that recipes name by themselves.
    alone = ("",) if component in (Component.UNET, Component.CONTROLNET) else ()
    for prefix in (f"{component.value}/", *alone):
        found = fetch(f"{prefix}config.json")
        if found is not None:
            return CheckpointFiles(_weights(fetch, prefix, source, component), _read_json(found))
    if not alone:
        key = "text" if component.is_text else "vae"
        raise CheckpointError(
            f"There is no {component.value} in this checkpoint.",
            given=f"{source} has no {component.value}/config.json",
            advice=f"Give the whole pipeline's folder, or set {key}: false for a bundle without.",
        )
    raise CheckpointError(
        f"There is no {component.class_name} in this checkpoint.",
        given=f"{source} has neither {component.value}/config.json nor config.json",
        advice="Give a folder as diffusers' save_pretrained writes it.",
    )


def _weights(fetch: Fetch, prefix: str, source: str, component: Component) -> tuple[Path, ...]:
    for name in _names(component):
        found = fetch(prefix + name)
        if found is not None:
            return _shards(fetch, prefix, found) if name.endswith(".json") else (found,)
    pickled = fetch(f"{prefix}{'pytorch_model' if component.is_text else _stem(component)}.bin")
    if pickled is not None:
        raise _pickle(pickled)
    raise CheckpointError(
        "The checkpoint's folder has a configuration but no weights.",
        given=f"{source}: no {prefix}{_names(component)[0]}",
        advice=_AGAIN,
    )


def _shards(fetch: Fetch, prefix: str, index: Path) -> tuple[Path, ...]:
    entries = _read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries.values()):
        raise CheckpointError(
            "The index of a sharded checkpoint is damaged.",
            given=index,
            advice=_AGAIN,
        )
    paths = []
    for name in sorted(set(entries.values())):
        found = fetch(prefix + name) if PurePosixPath(name).name == name else None
        if found is None:
            raise CheckpointError(
                "A shard of the checkpoint is missing.",
                given=f"{name}, named in {index}",
                advice=_AGAIN,
            )
        paths.append(found)
    return tuple(paths)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            "A file of the checkpoint cannot be read.",
            given=f"{path}: {error}",
            advice=_AGAIN,
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            "A file of the checkpoint is not a JSON object.",
            given=path,
            advice=_AGAIN,
        )
    return content


def _on_hub(repository: str, component: Component) -> CheckpointFiles:
    """The files of a hub checkpoint, from the cache when all are there: no connection, no newer version."""
    with _hub_errors(repository):
        with suppress(CheckpointError):
            return _in_folder(_HubFolder(repository, connect=False), repository, component)
        folder = _HubFolder(repository, connect=True)
        try:
            return _in_folder(folder, repository, component)
        except CheckpointError as error:
            if folder.connect:
                raise
            raise CheckpointError(
                "The checkpoint is not in the local cache, and the hub cannot be reached.",
                given=repository,
                advice=f"Go online, or run `hf download {repository}` elsewhere and give the folder.",
            ) from error


class _HubFolder:
    """A repository of the hub, whose files are looked up in the cache, and downloaded unless told not to connect."""

    def __init__(self, repository: str, *, connect: bool) -> None:
        self.repository = repository
        self.connect = connect

    def __call__(self, name: str) -> Path | None:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(self.repository, name, local_files_only=not self.connect))
        except errors.LocalEntryNotFoundError:
            self.connect = False  # the hub does not answer: asking for every file would take half a minute each
            return None
        except errors.EntryNotFoundError:
            return None


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            "There is no such checkpoint, neither a path here nor one the hub lets you read.",
            given=repository,
            advice="Check the spelling; for a private or gated one run `hf auth login` and accept its licence.",
        ) from error
    except (errors.HfHubHTTPError, ConnectionError) as error:
        raise CheckpointError(
            "The hub did not give the checkpoint.", given=f"{repository}: {error}", advice="Try again later."
        ) from error
    except OSError as error:
        raise StorageError(
            "The download could not be written.",
            given=f"{os.fspath(error.filename) if error.filename else repository}: {error.strerror}",
            advice="Free space on the disk, or set HF_HOME to a folder on another one.",
        ) from error


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is a pickle, which can run code when it is opened.",
        given=path,
        advice="If you trust it, convert it: diffusers' StableDiffusionPipeline.from_single_file(FILE) "
        "or from_pretrained(FOLDER, use_safetensors=False), then save_pretrained(NEW_FOLDER).",
    )
