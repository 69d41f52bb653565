"""What a repository does on the real server before it serves: other bundles, broken or read-only ones, environments."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import linked
import pytest
import tritonclient.http
from needs import triton_folder

from hidiff_export.triton.model_config import InstancePlacement
from hidiff_export.triton.repository import BUNDLE, RepositoryPlan, write
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from tests.deploy.clients import MODEL, STREAM, http, inputs, picture
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

PROMPT = "a lighthouse at dusk"
OPTIONS = {"threads": 1, "resident": "all"}
Start = Callable[..., TritonServer]


def draws(server: TritonServer) -> bool:
    """Whether the server makes a picture."""
    with http(server) as client:
        answer = client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT))
    return picture(answer.as_numpy("image")[0, 0]).size == (128, 128)


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file under a folder: time of change, size and identity; not what Python keeps of ``model.py``."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    return {str(path): (one.st_mtime_ns, one.st_size, one.st_ino) for path, one in found.items()}


def ends(triton: Start, repository: Path, **options: Any) -> str:
    """What a server says that does not become ready, and ends with exit code 1."""
    server = triton(repository, wait=False, **options)
    assert server.wait_end() == 1
    return server.said()


def test_a_server_follows_the_links_that_its_repository_allows(
    sd15_bundle: Path, tmp_path: Path, triton: Start
) -> None:
    bundle, repository = linked.elsewhere(sd15_bundle, tmp_path), tmp_path / "models"
    plan = RepositoryPlan(bundle=str(bundle), options=OPTIONS, allow_links=(str(tmp_path / "store"),))
    write(bundle, repository, plan)
    server = triton(repository)
    assert draws(server)
    server.stop()
    write(bundle, repository, plan, force=True)
    config = repository / STREAM / "config.pbtxt"
    config.write_text(config.read_text("utf-8").replace(str(tmp_path / "store"), str(repository)), "utf-8")
    assert "consists of symbolic links that lead out" in ends(triton, repository)


@pytest.mark.parametrize("mounted", [False, pytest.param(True, marks=pytest.mark.needs("private-mounts"))])
def test_neither_repository_nor_bundle_is_written_to(
    sd15_bundle: Path, tmp_path: Path, triton: Start, mounted: bool
) -> None:
    """The bundle lies elsewhere here. Mounted read-only, neither could be."""
    bundle, repository = tmp_path / "bundle", tmp_path / "models"
    shutil.copytree(sd15_bundle, bundle)
    write(bundle, repository, RepositoryPlan(bundle=str(bundle), options=OPTIONS))
    before = state(bundle), state(repository)
    server = triton(repository, before=read_only(bundle, repository) if mounted else [])
    assert draws(server)
    server.stop()
    assert (state(bundle), state(repository)) == before
    (repository / MODEL / "1" / "left").touch()
    assert state(repository) != before[1]


def read_only(*folders: Path) -> list[str]:
    """What makes a command see these folders read-only."""
    mounts = " && ".join(f"mount --bind '{one}' '{one}' && mount -o remount,bind,ro '{one}'" for one in folders)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"]
    tried = subprocess.run([*command, "touch", str(folders[0] / "left")], capture_output=True, text=True, check=False)
    assert "Read-only file system" in tried.stderr
    return command


def test_instances_share_the_work_and_draw_the_same(sd15_bundle: Path, tmp_path: Path, triton: Start) -> None:
    """On the CPU here; they are made the same way on several GPUs."""
    write(sd15_bundle, tmp_path / "models", RepositoryPlan(places=InstancePlacement(count=2), options=OPTIONS))
    server = triton(tmp_path / "models")

    def ask(seed: int) -> bytes:
        with http(server) as client:
            answer = client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT, seed=seed))
        content: bytes = answer.as_numpy("image")[0, 0]
        return content

    seeds = [1, 2, 3] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, seeds))
    pictures = dict(zip(seeds, found, strict=True))
    assert found == [pictures[seed] for seed in seeds]
    assert len(set(found)) == 3
    made = server.measured("hidiff_pictures_total")
    assert len(made) == 2
    assert sum(made.values()) == len(seeds) + 2  # and each instance's warm-up request
    assert min(made.values()) > 1
    assert len(server.measured("hidiff_heartbeat_seconds")) == 4
    assert len({name.split('parity="')[1][:64] for name in server.measured("hidiff_parity_info")}) == 1


def test_another_bundle_than_the_repository_was_written_for_is_not_served(
    sd15_bundle: Path, tmp_path: Path, triton: Start
) -> None:
    write(sd15_bundle, tmp_path / "models", RepositoryPlan(options=OPTIONS))
    config = tmp_path / "models" / STREAM / "config.pbtxt"
    config.write_text(config.read_text().replace(Manifest.read(sd15_bundle).digest, "0" * 64))
    said = ends(triton, tmp_path / "models")
    assert "This is not the bundle that the model repository was written for." in said
    assert "Write the model repository again." in said


def test_a_bundle_with_a_changed_engine_is_not_served(sd15_bundle: Path, tmp_path: Path, triton: Start) -> None:
    write(sd15_bundle, tmp_path / "models", RepositoryPlan(bundle="copy", options=OPTIONS))
    folder = tmp_path / "models" / STREAM / "1" / BUNDLE
    manifest = Manifest.read(folder / MANIFEST)
    engine = folder / manifest.phases[0].engines["onnxruntime"]
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    said = ends(triton, tmp_path / "models")
    assert "its SHA-256 is not the manifest's" in said


def test_the_models_may_have_an_environment_of_their_own(sd15_bundle: Path, tmp_path: Path, triton: Start) -> None:
    environment = triton_folder().parents[4]
    write(sd15_bundle, tmp_path / "with", RepositoryPlan(environment=str(environment), options=OPTIONS))
    write(sd15_bundle, tmp_path / "without", RepositoryPlan(options=OPTIONS))
    elsewhere = {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": ""}
    assert "No module named" in ends(triton, tmp_path / "without", environment=elsewhere)
    assert draws(triton(tmp_path / "with", environment=elsewhere))
