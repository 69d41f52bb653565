"""Finding a checkpoint's files: in a folder, as one file, or on the Hugging Face hub (its cache first)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.checkpoint_file import PICKLES, looks_like_safetensors, no_checkpoint
from hidiff_export.checkpoints.compatibility import check_class
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.contents import listed
from hidiff_export.checkpoints.stored_configs import SCHEDULER_CONFIG
from hidiff_export.checkpoints.weight_files import Folder, WeightFiles, find_weights, read_json
from hidiff_export.demo_model import DEMO_SOURCE, demo_model
from hidiff_export.errors import CheckpointError, StorageError
from hidiff_export.recipe.field_types import random_seed
from hidiff_runtime.format.manifest import FileDigest

MODEL_INDEX = "model_index.json"
"""Where a diffusers folder says what its pipeline is."""

_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
"""Whose tokenizer every family's text encoders were trained with; single files come without one."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_SINGLE = ".safetensors"


def local_path(source: str) -> Path:
    """Returns where a source lies if it lies on this machine: ``demo`` is the model that comes with the package.

    Raises:
        CheckpointError: the demo model is damaged.
    """
    return demo_model() if source == DEMO_SOURCE else Path(source).expanduser()


def is_single_file(source: str) -> bool:
    """Returns whether a source is the path of a safetensors file, and no folder or hub id."""
    path = local_path(source)
    return path.suffix.lower() == _SINGLE and not path.is_dir()


def find_checkpoint(source: str, component: Component) -> WeightFiles:
    """Returns the files of a network.

    Args:
        source: path of a pipeline's or a network's diffusers folder, path of a ``.safetensors`` file, a hub id, or
            ``demo``.
        component: the network wanted.

    Raises:
        CheckpointError: when there is nothing there, it is incomplete, or it is a pickle or of another format.
        StorageError: when a download cannot be written.
    """
    path = local_path(source)
    if source and path.is_dir():
        return _in_folder(_LocalFolder(path), source, component)
    if path.suffix.lower() in PICKLES:
        raise _pickle(path, component)
    if is_single_file(source):
        return WeightFiles((path,))
    if source and path.exists():
        raise no_checkpoint(path)
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            "There is no checkpoint at this path.",
            given=source,
            advice="Give a diffusers folder, a .safetensors file, a hub id like org/name, demo, or random:SEED.",
        )
    return _on_hub(source, component)


def source_fingerprint(source: str, component: Component, hashes: dict[Path, str] | None = None) -> str:
    """Returns what a source holds: SHA-256 of its configuration and weights, of a fabricated one its own name.

    Args:
        source: as for `find_checkpoint`.
        component: the network.
        hashes: of files that were read already, which it adds to: the networks of a single file share it.

    Raises what `find_checkpoint` raises.
    """
    if random_seed(source) is not None:
        return source
    files = find_checkpoint(source, component)
    known = {} if hashes is None else hashes
    sha = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    for path in files.paths:
        try:
            if path not in known:
                known[path] = FileDigest.of(path).sha256
            sha.update(known[path].encode())
        except OSError as error:
            raise CheckpointError(
                "A file of the checkpoint cannot be read.",
                given=f"{path}: {error.strerror}",
                advice="Check the path and its permissions.",
            ) from error
    return sha.hexdigest()


def find_scheduler_config(source: str) -> dict[str, Any] | None:
    """Returns the noise schedule that comes with a checkpoint, as diffusers writes it; None where none does.

    Raises:
        CheckpointError: it is damaged, or the hub that may have one cannot be reached.
        StorageError: when a download cannot be written.
    """
    return _find_json(source, SCHEDULER_CONFIG, "noise schedule")


def find_model_index(source: str) -> dict[str, Any] | None:
    """Returns what a checkpoint's ``model_index.json`` holds; None where there is none, as with single files.

    Raises what `find_scheduler_config` raises.
    """
    return _find_json(source, MODEL_INDEX, MODEL_INDEX)


def _find_json(source: str, name: str, called: str) -> dict[str, Any] | None:
    """Returns a file of a folder or of the hub, its cache first; None where the checkpoint has no such file."""
    path = local_path(source)
    found: Path | None = None
    if path.is_dir():
        found = path / name if (path / name).is_file() else None
    elif random_seed(source) is None and not is_single_file(source):
        hub = _HubFolder(source, connect=True)
        with _hub_errors(source):
            found = _HubFolder(source, connect=False)(name) or hub(name)
        if found is None and not hub.connect:
            raise CheckpointError(
                f"The checkpoint's {called} is not in the local cache, and the hub cannot be reached.",
                given=f"{source}: {name}",
                advice=f"Go online, or run `hf download {source}` elsewhere and give the folder.",
            )
    return None if found is None else read_json(found)


def find_tokenizer(source: str, folder: str) -> dict[str, Path]:
    """Returns the files of a tokenizer by their names, as transformers writes them.

    Args:
        source: as for `find_checkpoint`; a single file's tokenizer is the one that CLIP was published with.
        folder: ``tokenizer`` or ``tokenizer_2``.

    Raises:
        CheckpointError: there is none, or the hub that has it cannot be reached.
        StorageError: when a download cannot be written.
    """
    path = local_path(source)
    if path.is_dir():
        found = _tokenizer_files(_LocalFolder(path), f"{folder}/")
    elif is_single_file(source):
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


def _tokenizer_files(fetch: Folder, prefix: str) -> dict[str, Path]:
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


def _in_folder(fetch: Folder, source: str, component: Component) -> WeightFiles:
    # A folder of the network itself is taken for the two that recipes name by themselves.
    alone = ("",) if component in (Component.UNET, Component.CONTROLNET) else ()
    for prefix in (f"{component.value}/", *alone):
        found = fetch(f"{prefix}config.json")
        if found is not None:
            config = read_json(found)
            check_class(component, config)
            return find_weights(fetch, prefix, source, component)._replace(config=config)
    if not alone:
        key = "text" if component.is_text else "vae"
        raise CheckpointError(
            f"There is no {component.value} in this checkpoint.",
            given=f"{source} has no {component.value}/config.json",
            advice=f"Give the whole pipeline's folder, or set {key}: false for a bundle without.",
        )
    raise _no_network(fetch, source, component)


def _no_network(fetch: Folder, source: str, component: Component) -> CheckpointError:
    """Returns what is said of a folder without the configuration of a UNet or ControlNet: what is there instead."""
    what, index = "", fetch("model_index.json")
    if index is not None:
        what = f"; model_index.json says {read_json(index).get('_class_name')}"
    advice = "Give a folder as diffusers' save_pretrained writes it."
    files = [] if index is not None else sorted(name for name in fetch.names("") if name.endswith((_SINGLE, *PICKLES)))
    if files:
        advice = f"Give a file of this folder as the source ({listed(files)}), or a diffusers folder."
    return CheckpointError(
        f"There is no {component.class_name} in this checkpoint.",
        given=f"{source} has neither {component.value}/config.json nor config.json{what}",
        advice=advice,
    )


class _LocalFolder:
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, name: str) -> Path | None:
        path = self._path / name
        return path if path.is_file() else None

    def names(self, prefix: str) -> list[str]:
        """Returns the files of a folder in it."""
        folder = self._path / prefix
        return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _on_hub(repository: str, component: Component) -> WeightFiles:
    """Returns the files of a hub checkpoint, from the cache when all are there: no connection, no newer version."""
    with _hub_errors(repository):
        cached = _HubFolder(repository, connect=False)
        try:
            return _in_folder(cached, repository, component)
        except CheckpointError as error:
            why = f"; of what is there: {error.summary}" if cached(f"{component.value}/config.json") else ""
        folder = _HubFolder(repository, connect=True)
        try:
            return _in_folder(folder, repository, component)
        except CheckpointError as error:
            if folder.connect:
                raise
            raise CheckpointError(
                "The checkpoint is not in the local cache, and the hub cannot be reached.",
                given=f"{repository}{why}",
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

    def names(self, prefix: str) -> list[str]:
        """Returns the files of a folder of the repository: those in the cache, or all of them when connected."""
        from huggingface_hub import list_repo_files

        if not self.connect:
            cached = self(f"{prefix}config.json")
            return sorted(path.name for path in cached.parent.iterdir() if path.is_file()) if cached else []
        try:
            found = list_repo_files(self.repository)
        except OSError:
            raise
        except Exception:  # the HTTP library's own errors of connection have no class in common with others
            self.connect = False
            return []
        inside = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
        return sorted(name for name in inside if "/" not in name)


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


def _pickle(path: Path, component: Component) -> CheckpointError:
    if looks_like_safetensors(path):
        return CheckpointError(
            "The checkpoint is a safetensors file under the name of a pickle.",
            given=path,
            advice=f"Rename it to {path.stem}{_SINGLE}.",
        )
    loader = "ControlNetModel" if component is Component.CONTROLNET else "StableDiffusionPipeline"
    other = "" if component is Component.CONTROLNET else " (StableDiffusionXLPipeline for SDXL)"
    return CheckpointError(
        "The checkpoint is a pickle, which can run code when it is opened.",
        given=path,
        advice=f"Take its .safetensors file where there is one. If you trust it, convert it with diffusers: "
        f"{loader}.from_single_file({str(path)!r}).save_pretrained('NEW_FOLDER'){other}, and give NEW_FOLDER.",
    )
