"""The folder of a build: locked, resumable, foreign folders untouched, renamed only when whole."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hidiff_export.bundle import LOCK, STATE, Workspace, storage_errors, write_json
from hidiff_export.errors import BundleError, InputError, StorageError
from hidiff_runtime.manifest import MANIFEST, FileRecord, Manifest, PhaseRecord, TensorSpec
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule


def manifest(files: dict[str, FileRecord]) -> Manifest:
    shapes = {"latents": (1, 4, 8, 8), "timestep": (1,), "prompt_embeds": (1, 77, 32)}
    inputs = tuple(TensorSpec(name, shape, "float32") for name, shape in shapes.items())
    noise = TensorSpec("noise_pred", (1, 4, 8, 8), "float32")
    return Manifest(
        tools={"hidiff-runtime": "0.1.0"},
        recipe={"name": "test"},
        family="sd15",
        task="text-to-image",
        width=64,
        height=64,
        batch=1,
        guidance=False,
        precision="float32",
        rule=PhaseRule(),
        latent=(4, 8, 8),
        windowed_blocks=(),
        phases=(PhaseRecord("a.bin", {}, inputs, (noise,), Phase(PhaseKind.WINDOWED)),),
        samplers={"ddim": "a.bin"},
        default_sampler="ddim",
        steps=(1,),
        weights={"unet": "a.bin"},
        files=files,
    )


def build(output: Path, content: bytes, *, force: bool = False) -> None:
    with Workspace(output, force=force) as workspace:
        path = workspace.folder / "a.bin"
        path.write_bytes(content)
        workspace.finish("stage", "key", (path,))
        (workspace.folder / "scratch").mkdir()
        (workspace.folder / "scratch" / "left-over").write_bytes(b"x")
        workspace.commit(manifest(workspace.files()))


def test_a_committed_bundle_holds_exactly_what_its_manifest_lists(tmp_path: Path) -> None:
    build(tmp_path / "bundle", b"data")
    assert sorted(path.name for path in (tmp_path / "bundle").rglob("*")) == ["a.bin", MANIFEST]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert Manifest.read(tmp_path / "bundle").files["a.bin"] == FileRecord.of(tmp_path / "bundle" / "a.bin")


def test_a_finished_bundle_is_replaced_only_by_force(tmp_path: Path) -> None:
    build(tmp_path / "bundle", b"old")
    with pytest.raises(BundleError, match="finished bundle"):
        build(tmp_path / "bundle", b"new")
    assert (tmp_path / "bundle" / "a.bin").read_bytes() == b"old"
    build(tmp_path / "bundle", b"new", force=True)
    assert (tmp_path / "bundle" / "a.bin").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_half_built_is_there_next_time(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        path = workspace.folder / "a.bin"
        path.write_bytes(b"data")
        workspace.finish("stage", "key", (path,))
    assert not (tmp_path / "bundle").exists()
    with Workspace(tmp_path / "bundle") as workspace:
        assert workspace.whole("stage", "key")
        assert not workspace.whole("stage", "another key")
        assert not workspace.whole("another stage", "key")
        path.write_bytes(b"dat4")
        assert not workspace.whole("stage", "key")
        path.unlink()
        assert not workspace.whole("stage", "key")


def test_beginning_a_stage_again_forgets_its_files(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        path = workspace.folder / "a.bin"
        path.write_bytes(b"data")
        workspace.finish("stage", "key", (path,))
        workspace.begin("stage")
        assert not path.exists()
        assert workspace.files() == {}


def test_force_forgets_what_is_half_built(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        path = workspace.folder / "a.bin"
        path.write_bytes(b"data")
        workspace.finish("stage", "key", (path,))
    with Workspace(tmp_path / "bundle", force=True) as workspace:
        assert not workspace.whole("stage", "key")
        assert not path.exists()


def test_two_builds_of_one_bundle_are_kept_apart(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle"), pytest.raises(StorageError, match="Another build") as caught:
        Workspace(tmp_path / "bundle").__enter__()
    assert caught.value.exit_code == 6
    with Workspace(tmp_path / "bundle"):
        pass


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, force: bool) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(BundleError, match="no bundle") as caught:
        Workspace(tmp_path / "photos", force=force).__enter__()
    assert caught.value.exit_code == 4
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    assert not (tmp_path / "photos.partial").exists()


def test_a_foreign_partial_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bundle.partial").mkdir()
    (tmp_path / "bundle.partial" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="no build left there"):
        Workspace(tmp_path / "bundle", force=True).__enter__()
    assert (tmp_path / "bundle.partial" / "notes.txt").read_text() == "mine"


def test_a_newer_bundle_is_left_alone_even_by_force(tmp_path: Path) -> None:
    build(tmp_path / "bundle", b"old")
    newer = json.loads((tmp_path / "bundle" / MANIFEST).read_text())
    newer["format"] = 99
    write_json(tmp_path / "bundle" / MANIFEST, newer)
    with pytest.raises(BundleError, match="format 99"):
        Workspace(tmp_path / "bundle", force=True).__enter__()


def test_the_output_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("a file")
    with pytest.raises(InputError, match="a file"):
        Workspace(tmp_path / "bundle").__enter__()


def test_a_damaged_record_of_an_interrupted_build_says_how_to_go_on(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle"):
        pass
    (tmp_path / "bundle.partial" / STATE).write_text('{"stages": {"weights": 3}}')
    with pytest.raises(BundleError) as caught:
        Workspace(tmp_path / "bundle").__enter__()
    assert "--force" in caught.value.advice
    with Workspace(tmp_path / "bundle", force=True):
        pass


def test_a_build_killed_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    build(tmp_path / "bundle", b"old")
    (tmp_path / "bundle").rename(tmp_path / "bundle.replaced")
    with pytest.raises(BundleError, match="finished bundle"):
        Workspace(tmp_path / "bundle").__enter__()
    assert (tmp_path / "bundle" / "a.bin").read_bytes() == b"old"


def test_the_lock_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / "bundle.partial").mkdir()
    (tmp_path / "bundle.partial" / LOCK).touch()
    with Workspace(tmp_path / "bundle"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_refusals_to_write_say_what_to_do(code: int) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(Path("bundle")):
        raise OSError(code, "refused")
    assert caught.value.advice


def test_other_errors_of_the_system_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), storage_errors(Path("bundle")):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_manifest_that_lists_a_file_of_no_stage_is_refused_when_read() -> None:
    record = manifest({"a.bin": FileRecord(4, "0" * 64)})
    stranger = replace(record, report="parity/report.json")
    with pytest.raises(BundleError, match="report"):
        Manifest.from_json(stranger.to_json())
