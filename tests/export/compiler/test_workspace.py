"""The folder of a build: locked, resumable, foreign folders untouched, renamed only when whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hidiff_export.compiler.workspace import STATE, FilesChanged, Workspace
from hidiff_export.errors import BundleError, InputError, StorageError
from hidiff_export.files import storage_errors, write_json
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest
from tests.export.compiler.killed_commits import manifest


def build(output: Path, content: bytes, *, force: bool = False) -> None:
    with Workspace(output, force=force) as workspace:
        path = workspace.folder / "a.bin"
        path.write_bytes(content)
        workspace.finish("stage", "key", (path,))
        (workspace.folder / "unet").mkdir()
        (workspace.folder / "unet" / "left-over").write_bytes(b"x")
        assert workspace.commit(manifest) == ("unet/left-over",)


def test_a_committed_bundle_holds_exactly_what_its_manifest_lists(tmp_path: Path) -> None:
    build(tmp_path / "bundle", b"data")
    assert sorted(path.name for path in (tmp_path / "bundle").rglob("*")) == ["a.bin", MANIFEST]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert Manifest.read(tmp_path / "bundle").files["a.bin"] == FileDigest.of(tmp_path / "bundle" / "a.bin")


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
        assert workspace.is_complete("stage", "key")
        assert not workspace.is_complete("stage", "another key")
        assert not workspace.is_complete("another stage", "key")
        path.write_bytes(b"dat4")
        assert not workspace.is_complete("stage", "key")
        path.unlink()
        assert not workspace.is_complete("stage", "key")


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
        assert not workspace.is_complete("stage", "key")
        assert not path.exists()


def test_a_build_that_replaces_a_bundle_goes_on_where_it_is_asked_to(tmp_path: Path) -> None:
    build(tmp_path / "bundle", b"old")
    for whole in (False, True, False):
        with Workspace(tmp_path / "bundle", force=True, resume=True) as workspace:
            assert workspace.is_complete("stage", "key") == whole
            path = workspace.folder / "unet/a.bin"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"data")
            workspace.finish("stage", "key", (path,))
        if whole:
            (workspace.folder / "build.json").write_text("{")
    with Workspace(tmp_path / "bundle", force=True) as workspace:
        assert not workspace.is_complete("stage", "key")
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_stages_of_another_build_are_forgotten(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        for name in ("one", "other"):
            (workspace.folder / name).write_bytes(b"data")
            workspace.finish(name, "key", (workspace.folder / name,))
        workspace.forget_all_but({"one", "third"})
        assert workspace.files().keys() == {"one"}
        assert not (workspace.folder / "other").exists()


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


def test_the_lock_of_an_older_version_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / "bundle.partial").mkdir()
    (tmp_path / "bundle.partial" / ".lock").touch()
    with Workspace(tmp_path / "bundle"):
        pass


def finished(workspace: Workspace, content: bytes = b"data") -> Path:
    """The file of a finished stage."""
    path = workspace.folder / "unet" / "a.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    workspace.finish("stage", "key", (path,))
    return path


def changed(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"dat4")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shortened(path: Path) -> None:
    path.write_bytes(b"dat")


def led_elsewhere(path: Path) -> None:
    path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (changed, "another content"),
        (shortened, "3 bytes instead of 4"),
        (Path.unlink, "missing"),
        (led_elsewhere, "symbolic link"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_bundle_with_a_changed_file_is_not_published(
    tmp_path: Path, harm: Callable[[Path], object], fault: str, force: bool
) -> None:
    output = tmp_path / "bundle"
    if force:
        build(output, b"old")
    with Workspace(output, force=force) as workspace:
        harm(finished(workspace))
        with pytest.raises(FilesChanged, match="changed while the build went on") as caught:
            workspace.commit(manifest)
    assert caught.value.exit_code == 6
    assert fault in caught.value.given
    assert "unet/a.bin" in caught.value.given
    assert caught.value.stages == {"stage"}
    assert output.exists() == force
    if force:
        assert (output / "a.bin").read_bytes() == b"old"


def test_a_bundle_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        finished(workspace)
        build(tmp_path / "other", b"theirs")
        (tmp_path / "other").rename(tmp_path / "bundle")
        with pytest.raises(BundleError, match="already holds a finished bundle"):
            workspace.commit(manifest)
    assert (tmp_path / "bundle" / "a.bin").read_bytes() == b"theirs"


@pytest.mark.parametrize("path", ["../victim", "/victim", "unet/../../victim", "unet\\victim", ""])
@pytest.mark.parametrize("force", [False, True])
def test_a_record_of_files_elsewhere_deletes_nothing(tmp_path: Path, path: str, force: bool) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    given = path.replace("/victim", str(victim)) if path.startswith("/") else path
    partial = tmp_path / "bundle.partial"
    partial.mkdir()
    files = {given: asdict(FileDigest.of(victim))}
    (partial / STATE).write_text(json.dumps({"stages": {"stage": {"key": "key", "files": files}}}))
    expected = nullcontext() if force else pytest.raises(BundleError, match="record of the interrupted build")
    with expected as caught, Workspace(tmp_path / "bundle", force=force) as workspace:
        workspace.begin("stage")
    assert victim.read_text() == "mine"
    assert caught is None or "--force" in caught.value.advice


def foreign_file(partial: Path) -> None:
    (partial / "notes.txt").write_text("mine")


def foreign_folder(partial: Path) -> None:
    (partial / "photos").mkdir()
    (partial / "photos" / "notes.txt").write_text("mine")


def link_to_a_file(partial: Path) -> None:
    (partial.parent / "notes.txt").write_text("mine")
    (partial / "unet" / "notes.txt").symlink_to(partial.parent / "notes.txt")


def link_to_a_folder(partial: Path) -> None:
    (partial.parent / "photos").mkdir()
    (partial.parent / "photos" / "notes.txt").write_text("mine")
    (partial / "vae").symlink_to(partial.parent / "photos")


def pipe(partial: Path) -> None:
    (partial.parent / "notes.txt").write_text("mine")
    os.mkfifo(partial / "unet" / "pipe")


@pytest.mark.parametrize("stranger", [foreign_file, foreign_folder, link_to_a_file, link_to_a_folder, pipe])
@pytest.mark.parametrize("force", [False, True])
def test_strangers_in_the_folder_of_an_interrupted_build_are_left_alone(
    tmp_path: Path, stranger: Callable[[Path], None], force: bool
) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        finished(workspace)
    stranger(workspace.folder)
    with pytest.raises(BundleError, match="no build left there"):
        Workspace(tmp_path / "bundle", force=force).__enter__()
    assert next(tmp_path.rglob("notes.txt")).read_text() == "mine"
    assert (workspace.folder / "unet" / "a.bin").read_bytes() == b"data"


def test_a_stranger_that_came_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        finished(workspace)
        foreign_file(workspace.folder)
        with pytest.raises(BundleError, match=r"notes\.txt"):
            workspace.commit(manifest)
    assert (workspace.folder / "notes.txt").read_text() == "mine"


def test_half_written_files_of_killed_builds_do_not_pile_up(tmp_path: Path) -> None:
    with Workspace(tmp_path / "bundle") as workspace:
        finished(workspace)
        (workspace.folder / "unet" / ".weights.safetensors.7.part").write_bytes(b"half")
    with Workspace(tmp_path / "bundle") as workspace:
        assert [path.name for path in (workspace.folder / "unet").iterdir()] == ["a.bin"]
        assert workspace.commit(manifest) == ()


@pytest.mark.parametrize("name", ["bundle.replaced", "bundle.partial", "bundle.partial.lock"])
def test_names_that_are_taken_are_refused_before_any_work(tmp_path: Path, name: str) -> None:
    build(tmp_path / "bundle", b"old")
    if name == "bundle.replaced":
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="is taken") as caught:
        Workspace(tmp_path / "bundle", force=True).__enter__()
    assert caught.value.given == tmp_path / name
    assert "delete it" in caught.value.advice
    assert (tmp_path / "bundle" / "a.bin").read_bytes() == b"old"
    assert "mine" in [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]


def test_whoever_builds_first_is_not_disturbed_at_its_end(tmp_path: Path) -> None:
    """Another build begins at the very last moment before the folder gets its name."""
    with Workspace(tmp_path / "bundle") as workspace:
        finished(workspace)

        def assemble(files: Mapping[str, FileDigest]) -> Manifest:
            with pytest.raises(StorageError, match="Another build"):
                Workspace(tmp_path / "bundle").__enter__()
            return manifest(files)

        workspace.commit(assemble)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_builds_that_are_killed_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    """Each line is one build, killed before the next of the things that it does to the disk."""
    command = [sys.executable, "-m", "tests.export.compiler.killed_commits", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    for replacing in (False, True):
        kills = [line for line in found if line["replacing"] == replacing]
        assert [line["killed"] for line in kills] == [True] * (len(kills) - 1) + [False]
        assert len(kills) > 20
        assert all(line["last"] == ("newer" if replacing else "new") for line in kills)
        assert all(set(line["beside"]) <= {"bundle", "bundle.partial.lock"} for line in kills)
    assert all(line["then"] == (line["seen"] or "old") for line in found if line["replacing"])
    assert {line["seen"] for line in found if line["replacing"]} == {None, "old", "new"}
    # What was finished is not done again, from the first moment that it is to the end.
    ran = [line.get("ran", []) for line in found if not line["replacing"]]
    assert [len(stages) for stages in ran] == sorted((len(stages) for stages in ran), reverse=True)
    assert {len(stages) for stages in ran} == {0, 1, 2}


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
    record = manifest({"a.bin": FileDigest(4, "0" * 64)})
    stranger = replace(record, report="parity/report.json")
    with pytest.raises(BundleError, match="report"):
        Manifest.from_json(stranger.to_json())
