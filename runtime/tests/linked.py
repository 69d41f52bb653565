"""Bundles whose files are symbolic links, as tools leave them that keep files in a store of their own."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

REVISION = "1" * 40


def hub(bundle: Path, home: Path) -> Path:
    """As the Hugging Face hub's cache: snapshots of links to blobs that are named by their content."""
    return _stored(bundle, home / "snapshots" / REVISION, lambda digest, _: home / "blobs" / digest)


def dvc(bundle: Path, home: Path) -> Path:
    """As DVC's checkout with ``cache.type = symlink``: absolute links into folders named by the content's beginning."""
    cache = home / ".dvc/cache/files/md5"
    return _stored(bundle, home / "models/demo", lambda digest, _: cache / digest[:2] / digest[2:], absolute=True)


def annex(bundle: Path, home: Path) -> Path:
    """As git-annex and DataLad: each file in a folder of its own, with the same ending."""

    def place(digest: str, path: Path) -> Path:
        key = f"MD5E-s{path.stat().st_size}--{digest[:32]}{path.suffix}"
        return home / ".git/annex/objects" / digest[:2] / digest[2:4] / key / key

    return _stored(bundle, home / "models/demo", place)


def config_map(bundle: Path, home: Path) -> Path:
    """As Kubernetes mounts a ConfigMap or a projected volume: what is at the top leads through ``..data``."""
    mount = home / "mount"
    mount.mkdir(parents=True)
    publish(bundle, mount, "..2026_12_01")
    for entry in sorted((mount / "..data").iterdir()):
        (mount / entry.name).symlink_to(f"..data/{entry.name}")
    return mount


def publish(bundle: Path, mount: Path, name: str) -> None:
    """Another content of a `config_map`, all at once, as the kubelet does it; the one before goes away."""
    shutil.copytree(bundle, mount / name)
    before = (mount / "..data").resolve()
    (mount / "..data_tmp").symlink_to(name)
    (mount / "..data_tmp").rename(mount / "..data")
    if before.name != "..data":
        shutil.rmtree(before)


def elsewhere(bundle: Path, home: Path) -> Path:
    """Links into a store that nothing tells of."""
    return _stored(bundle, home / "bundle", lambda digest, _: home / "store" / digest[:2] / digest[2:], absolute=True)


KNOWN: dict[str, Callable[[Path, Path], Path]] = {"hub": hub, "dvc": dvc, "annex": annex, "config map": config_map}
"""Layouts that open as they are."""


def _stored(bundle: Path, folder: Path, place: Callable[[str, Path], Path], *, absolute: bool = False) -> Path:
    """Puts each file where ``place`` says, by its hash and its path, and a link to it into ``folder``."""
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        target = place(hashlib.sha256(path.read_bytes()).hexdigest(), path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        link = folder / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target.absolute() if absolute else os.path.relpath(target, link.parent))
    return folder


def relink(link: Path, target: Path) -> None:
    """Leads a link elsewhere, all at once."""
    beside = link.with_name(f"{link.name}.new")
    beside.symlink_to(target.absolute())
    beside.rename(link)
