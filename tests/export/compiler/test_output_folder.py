"""What can never become a bundle's folder is refused before any work, and a link's bundle goes where it leads."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hidiff_export.compiler import output_folder as module
from hidiff_export.compiler.output_folder import output_folder, try_renaming
from hidiff_export.compiler.workspace import Workspace
from hidiff_export.errors import HidiffError, InputError, StorageError
from hidiff_export.triton.repository import replacing
from hidiff_runtime.format.manifest import MANIFEST
from tests.export.compiler.test_workspace import build

SUFFIXES = (".partial",)


def test_a_new_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_folder(Path("new"), SUFFIXES) == tmp_path / "new"
    assert output_folder(Path("a/b/new"), SUFFIXES) == tmp_path / "a" / "b" / "new"
    assert output_folder(Path(), SUFFIXES) == tmp_path
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert output_folder(Path(".."), SUFFIXES) == tmp_path


def test_what_can_never_become_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not" / "there")
    refusals = {
        Path("/"): "root of a disk",
        Path("/proc"): "mount point",
        tmp_path / "file": "a file, not a folder",
        tmp_path / "file" / "in" / "it": "below a file",
        tmp_path / "circle": "round in a circle",
        tmp_path / "nowhere": "folder that it leads into is not there",
        tmp_path / ("n" * 248): "name is too long",
        tmp_path / ("ä" * 124): "name is too long",
        tmp_path / ("n" * 300): "name is too long",
        tmp_path / ("n" * 300) / "in": "name is too long",
    }
    for path, refusal in refusals.items():
        with pytest.raises(InputError, match=refusal) as caught:
            output_folder(path, SUFFIXES)
        assert caught.value.advice
        assert caught.value.exit_code == 2
    assert output_folder(tmp_path / ("n" * 247), SUFFIXES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "file", "nowhere"]


def test_a_folder_that_is_bound_to_another_place_of_its_disk_is_a_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my bundle"
    folder.mkdir()
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 98:0 /a {tmp_path}/my\\040bundle rw - ext4 /dev/sda rw\n")
    assert output_folder(folder, SUFFIXES)
    monkeypatch.setattr(module, "_MOUNTS", mounts)
    with pytest.raises(InputError, match="mount point") as caught:
        output_folder(folder, SUFFIXES)
    assert str(folder / "bundle") in caught.value.advice
    assert output_folder(tmp_path / "my", SUFFIXES)
    monkeypatch.setattr(module, "_MOUNTS", tmp_path / "none")
    assert output_folder(folder, SUFFIXES)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="cannot be written to"):
            output_folder(tmp_path / "new", SUFFIXES)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("code", "kind", "refusal"),
    [
        (errno.EBUSY, InputError, "mount point"),
        (errno.EXDEV, StorageError, "cannot be renamed"),
        (errno.EPERM, StorageError, "cannot be renamed"),
    ],
)
def test_a_bundle_that_cannot_be_renamed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[HidiffError], refusal: str
) -> None:
    build(tmp_path / "bundle", b"old")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == tmp_path / "bundle":
            raise OSError(code, os.strerror(code))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(kind, match=refusal) as caught:
        Workspace(tmp_path / "bundle", force=True).__enter__()
    assert caught.value.advice
    assert (tmp_path / "bundle" / "a.bin").read_bytes() == b"old"


def test_trying_changes_nothing(tmp_path: Path) -> None:
    build(tmp_path / "bundle", b"old")
    before = (tmp_path / "bundle").stat()
    try_renaming(tmp_path / "bundle", tmp_path / "aside")
    after = (tmp_path / "bundle").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a bundle"])
def test_a_bundle_goes_where_a_link_leads(tmp_path: Path, there: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "bundle"
    link.symlink_to(disk / "bundle")
    if there == "an empty folder":
        (disk / "bundle").mkdir()
    elif there == "a bundle":
        build(disk / "bundle", b"old")
    build(link, b"new", force=there == "a bundle")
    assert link.is_symlink()
    assert (disk / "bundle" / "a.bin").read_bytes() == b"new"
    assert [path.name for path in disk.iterdir()] == ["bundle"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "disk"]


_COMMAND = """
import json, sys
from hidiff_export.cli import main
code = main(json.loads(sys.argv[1]), standalone_mode=False)
print(json.dumps([code, [name for name in ("torch", "diffusers", "onnx", "onnx_ir") if name in sys.modules]]))
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="folders can be made anywhere but below Linux's /proc")
def test_a_folder_that_the_system_does_not_let_be_made_is_a_storage_error() -> None:
    for work in (
        lambda output: Workspace(output).__enter__(),
        lambda output: replacing(output, force=False).__enter__(),
    ):
        with pytest.raises(StorageError, match="folder that the output is to lie in cannot be made") as caught:
            work(Path("/proc/nowhere/bundle"))
        assert "Choose a folder" in caught.value.advice


@pytest.mark.parametrize("there", ["file", "finished"])
@pytest.mark.parametrize("command", ["build", "rebase"])
def test_an_output_is_refused_before_torch_is_imported(tmp_path: Path, there: str, command: str) -> None:
    (tmp_path / "file").write_text("mine")
    build(tmp_path / "finished", b"old")
    start = ["build", "tiny"] if command == "build" else ["rebase", str(tmp_path / "finished"), "--source", "random:1"]
    arguments = [*start, "-o", str(tmp_path / there)]
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, json.dumps(arguments)], capture_output=True, text=True, check=True
    )
    code, imported = json.loads(done.stdout)
    assert imported == []
    assert code == (4 if (there, command) == ("finished", "build") else 2)
    assert "next:" in done.stderr
    assert (tmp_path / "finished" / MANIFEST).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "finished"]
