"""Where checkpoints come from: folders, and the hub with its cache, its refusals and its silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.sources import find_scheduler_config, source_fingerprint
from hidiff_export.errors import CheckpointError, StorageError
from tests.export.checkpoints.checkpoint_files import STEM, Arrays
from tests.export.checkpoints.loading import edit, holds, load, refused


def test_a_source_is_known_by_what_it_holds(tmp_path: Path, pipeline: Path) -> None:
    def fingerprint(source: Path | str) -> str:
        return source_fingerprint(str(source), Component.UNET)

    first = fingerprint(pipeline)
    moved = pipeline.rename(tmp_path / "moved")
    assert fingerprint(moved) == first
    edit(moved, upcast_attention=True)
    assert fingerprint(moved) != first
    edit(moved, upcast_attention=False)
    second = fingerprint(moved)
    path = moved / "unet" / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert fingerprint(moved) != second
    assert fingerprint("random:3") != fingerprint("random:4")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint(tmp_path / "none.safetensors")


def test_the_noise_schedule_comes_with_the_checkpoint(offline: Path, tmp_path: Path, pipeline: Path) -> None:
    own = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    for source in ("random:0", str(tmp_path / "a.safetensors"), str(pipeline)):
        assert find_scheduler_config(source) is None
    with pytest.raises(CheckpointError, match="noise schedule is not in the local cache"):
        find_scheduler_config("someone/something")
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(own))
    assert find_scheduler_config(str(pipeline)) == own
    cache(offline, "someone/something", pipeline)
    assert find_scheduler_config("someone/something") == own


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's downloads, empty, on a machine that is not connected."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache(hub: Path, repository: str, pipeline: Path) -> None:
    """Puts a pipeline's UNet where a download would have put it."""
    home, commit = hub / f"models--{repository.replace('/', '--')}", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    pipeline.rename(home / "snapshots" / commit)


@pytest.mark.parametrize("half", [False, True])
def test_a_cached_checkpoint_of_the_hub_needs_no_connection(
    offline: Path, pipeline: Path, tensors: Arrays, half: bool
) -> None:
    if half:
        path = pipeline / "unet" / f"{STEM}.safetensors"
        path.rename(path.with_name(f"{STEM}.fp16.safetensors"))
    cache(offline, "someone/something", pipeline)
    assert holds(load("someone/something").state_dict, tensors)


@pytest.mark.parametrize("source", ["someone/something", "something"])
def test_an_uncached_checkpoint_of_the_hub_is_told(offline: Path, source: str) -> None:
    message = refused(source)
    assert "hub cannot be reached" in message
    assert f"hf download {source}" in message
    assert not offline.exists()


def _answer(error: Callable[..., Exception]) -> Exception:
    return error("refused", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (lambda: _answer(RepositoryNotFoundError), CheckpointError, "no such checkpoint"),
        (lambda: _answer(GatedRepoError), CheckpointError, "accept its licence"),
        (lambda: HFValidationError("two dashes"), CheckpointError, "no such checkpoint"),
        (lambda: _answer(HfHubHTTPError), CheckpointError, "hub did not give"),
        (lambda: ConnectionError("reset"), CheckpointError, "hub did not give"),
        (lambda: OSError(28, "No space left on device", "/cache/file"), StorageError, "No space left"),
    ],
)
def test_what_the_hub_answers_is_told(
    monkeypatch: pytest.MonkeyPatch, failure: Callable[[], Exception], kind: type[Exception], words: str
) -> None:
    def download(*_: str, local_files_only: bool) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        raise failure()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(kind) as caught:
        load("someone/something")
    assert words in str(caught.value)


def test_a_repository_of_the_hub_without_a_unet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: str, local_files_only: bool) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda _: ["README.md", "dream.safetensors"])
    message = refused("someone/something")
    assert "no UNet2DConditionModel in this checkpoint" in message
    assert "Give a file of this folder as the source (dream.safetensors)" in message


def test_an_incomplete_cache_is_completed_from_the_hub(
    pipeline: Path, tensors: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_: str, name: str, *, local_files_only: bool) -> str:
        if local_files_only and name != "unet/config.json":
            raise LocalEntryNotFoundError("not in the cache")
        return str(pipeline / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert holds(load("someone/something").state_dict, tensors)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(_: str, name: str, *, local_files_only: bool) -> str:
        if not local_files_only:
            asked.append(name)
        raise LocalEntryNotFoundError("neither in the cache nor reachable")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert "hub cannot be reached" in refused("someone/something")
    assert asked == ["unet/config.json"]
