"""Bulk jobs with a real Ray and a real S3 endpoint: the same pictures whatever happens to workers and drivers."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import pytest
from PIL import Image

from hidiff_runtime import Pipeline
from hidiff_runtime.bulk.rows import derived_seed, picture_name
from hidiff_runtime.bulk.storage import Location, Store
from hidiff_runtime.errors import StorageError

pytestmark = [pytest.mark.needs("ray", "pyarrow"), pytest.mark.slow]

MINUTES = 60.0
PATIENCE = 5 * MINUTES
GOOD = 10
BAD = [
    {"id": "steps", "prompt": "a tree", "steps": 99},
    {"id": "empty", "prompt": " "},
    {"id": "image", "prompt": "a tree", "image": "none.png"},
    {"id": "row-1", "prompt": "twice"},
    {"id": "half", "prompt": "a \ud800 tree"},
    {"id": "separator", "prompt": "a\u2028tree", "steps": 99},
]


@dataclass(frozen=True)
class Ray:
    """A cluster of one node on this machine.

    Args:
        process: that started it and all of its own.
        address: for --ray.
    """

    process: subprocess.Popen[bytes]
    address: str

    def busy_worker(self) -> psutil.Process | None:
        """A worker that makes a picture just now."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = child.cmdline()[:1]
            except psutil.Error:
                continue
            if title and "MapWorker" in title[0] and title[0].endswith(".submit"):
                return child
        return None


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of every process: one thread for each, a token of our own, nothing of Amazon's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # by default workers step back, here for the other tests
        "RAY_prestart_worker_first_driver": "0",  # processes that nobody asks for
        "RAY_enable_worker_prestart": "0",
        "AWS_ACCESS_KEY_ID": "bulk",
        "AWS_SECRET_ACCESS_KEY": "bulk",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def ray(environment: dict[str, str]) -> Iterator[Ray]:
    port = free_port()
    folder = tempfile.mkdtemp(prefix="hd")  # short: Ray's sockets are in it
    words = ["ray", "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    words += ["--object-store-memory=100000000", "--include-dashboard=false", f"--temp-dir={folder}"]
    with (Path(folder) / "log").open("wb") as log:
        process = subprocess.Popen([tool(words[0]), *words[1:]], env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: b"Ray runtime started" in (Path(folder) / "log").read_bytes(), process)
        yield Ray(process, f"127.0.0.1:{port}")
    finally:
        for member in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):  # some end by themselves once others do
                member.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def s3(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server that has an empty bucket called ``bucket``."""
    from pyarrow.fs import S3FileSystem

    port = free_port()
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(port), process)
        files = S3FileSystem(**credentials(f"http://127.0.0.1:{port}"), allow_bucket_creation=True)
        files.create_dir("bucket")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        log.close()


def credentials(endpoint: str) -> dict[str, str]:
    return {
        "access_key": "bulk",
        "secret_key": "bulk",
        "endpoint_override": endpoint.removeprefix("http://"),
        "scheme": "http",
        "region": "us-east-1",
    }


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows(), *BAD]))
    return path


def rows() -> list[dict[str, Any]]:
    """Some say their seed, most do not."""
    return [
        {"id": f"row-{number}", "prompt": f"picture {number}", **({"seed": 7} if number < 2 else {})}
        for number in range(GOOD)
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def wait_for(done: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Until something is so. Fails where the process ends before, or it takes unreasonably long."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def words(bundle: Path, prompts: Path | str, output: Path | str, *more: str) -> list[str]:
    options = ["--option", "threads=1", "--json", *more]
    return [tool("hidiff-run"), "bulk", str(bundle), "--prompts", str(prompts), "-o", str(output), *options]


def finish(process: subprocess.Popen[bytes]) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary and standard error."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, json.loads(out) if out else {}, err.decode()


def start(command: list[str], environment: dict[str, str], **changes: str) -> subprocess.Popen[bytes]:
    env = {**environment, **changes}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def pictures(output: Path) -> list[str]:
    return sorted(path.stem for path in (output / "pictures").glob("*.png"))


def pixels(file: Path | IO[bytes]) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def index(output: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    found: list[dict[str, Any]] = parquet.read_table(output / "rows.parquet").to_pylist()
    return found


def check_whole(output: Path, bundle: Path, summary: dict[str, Any]) -> None:
    """Each good row is there exactly once, with the plain pipeline's pixels, and each bad one has its dead letter."""
    names = sorted(row["id"] for row in rows())
    assert pictures(output) == names
    told = index(output)
    assert sorted(row["id"] for row in told) == names
    assert (summary["done"], summary["failed"]) == (GOOD, len(BAD))
    assert len(summary["parity"]) <= 1
    with Pipeline.open(bundle, threads=1) as pipe:
        for row in rows():
            seed = row.get("seed", derived_seed(0, row["id"]))
            assert np.array_equal(pixels(output / f"pictures/{row['id']}.png"), pipe(row["prompt"], seed=seed))
    assert len({row["seed"] for row in told}) == GOOD - 1  # two say 7
    letters = [json.loads(line) for line in (output / "dead-letters.jsonl").read_text().split("\n")[:-1]]
    assert [letter["id"] for letter in letters] == [row["id"] for row in BAD]
    assert all(letter["reason"] and letter["advice"] for letter in letters)
    assert not list((output / "rows").glob("*"))


def test_drivers_that_are_killed_and_interrupted_and_a_worker_that_is_killed(
    ray: Ray, sd15_bundle: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """One worker; the third driver, with two, finds what the first two left, and makes again what is not what was made.

    One of its workers is killed over a picture, which the other makes.
    """
    output = tmp_path / "out"
    command = words(sd15_bundle, prompts, output, "--actors", "1", "--ray", ray.address)
    killed = start(command, environment)
    wait_for(lambda: len(pictures(output)) >= 2, killed)
    killed.kill()
    killed.communicate()
    before = len(pictures(output))
    interrupted = start(command, environment)
    wait_for(lambda: len(pictures(output)) >= before + 1, interrupted)
    os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal does
    code, _, err = finish(interrupted)
    assert (code, err.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in err
    made = pictures(output)
    assert before < len(made) < GOOD
    path = output / f"pictures/{made[0]}.png"
    with Image.open(path) as image:
        image.load()
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    (output / f"pictures/{made[1]}.png").unlink()
    job = start([*command, "--actors", "2"], environment)
    busy: list[psutil.Process] = []
    wait_for(lambda: busy.extend(filter(None, [ray.busy_worker()])) or busy, job)
    busy[0].kill()
    assert len(pictures(output)) < GOOD  # in the middle
    code, summary, err = finish(job)
    assert (code, "Traceback" in err) == (7, False)
    missing = GOOD - len(made) + 2
    assert missing - 1 <= summary["made"] <= missing  # the killed worker may have written one that it did not tell of
    assert summary["made"] + summary["finished"] + summary["found"] == GOOD
    check_whole(output, sd15_bundle, summary)


def test_a_bundle_that_is_broken_ends_the_job_at_once(
    ray: Ray, sd15_bundle: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sd15_bundle, broken)
    weights = broken / "unet/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    command = words(broken, prompts, tmp_path / "out", "--actors", "2", "--ray", ray.address)
    code, summary, err = finish(start(command, environment))
    assert (code, summary) == (4, {})
    assert "its files are not those it was written with" in err
    assert "unet/weights.safetensors" in err
    assert "Traceback" not in err
    assert pictures(tmp_path / "out") == []


@pytest.mark.needs("moto")
def test_from_a_bucket_into_a_bucket_with_a_ray_of_its_own(
    s3: str, sd15_bundle: Path, environment: dict[str, str]
) -> None:
    from pyarrow.fs import FileSelector, S3FileSystem

    files = S3FileSystem(**credentials(s3))
    lines = [
        "id,prompt,seed,image,strength",
        "a/b,a boat,3,,",
        "é,a tree,,,",
        "image,a fox,1,in/image.png,0.9",
        "bad,,,,",
    ]
    start_from = Image.new("RGB", (128, 128), (200, 30, 90))
    with files.open_output_stream("bucket/in/prompts.csv") as file:
        file.write("\n".join(lines).encode())
    with files.open_output_stream("bucket/in/in/image.png") as file, tempfile.TemporaryFile() as content:
        start_from.save(content, "PNG")
        content.seek(0)
        file.write(content.read())
    command = words(sd15_bundle, "s3://bucket/in/prompts.csv", "s3://bucket/out")
    own = ["--actors", "1", "--object-store", "100", "--s3-endpoint", s3]
    code, summary, err = finish(start([*command, *own], environment))
    assert (code, summary.get("made"), summary.get("failed")) == (7, 3, 1), err
    found = {info.base_name for info in files.get_file_info(FileSelector("bucket/out/pictures"))}
    assert found == {"a%2Fb.png", "%C3%A9.png", "image.png"}
    with Pipeline.open(sd15_bundle, threads=1) as pipe:
        wanted = {
            "a%2Fb": pipe("a boat", seed=3),
            "%C3%A9": pipe("a tree", seed=derived_seed(0, "é")),
            "image": pipe("a fox", seed=1, image=start_from, strength=0.9),
        }
    for name, image in wanted.items():
        with files.open_input_file(f"bucket/out/pictures/{name}.png") as file:
            assert np.array_equal(pixels(file), image)
    again = start(command, environment, AWS_ENDPOINT_URL=s3)
    code, summary, _ = finish(again)
    assert (code, summary["finished"], summary["made"], summary["failed"]) == (7, 3, 0, 1)


@pytest.mark.needs("moto")
def test_files_of_any_name_in_a_bucket(s3: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, environment[name])
    store = Store(Location("s3://bucket/any", s3))
    assert store.is_empty()
    assert (store.read("pictures/none.png"), store.sizes("pictures")) == (None, {})
    names = {f"{picture_name(row_id)}.png": row_id.encode() for row_id in ("a/b", "..", "é +&=?#", "x" * 300, "A", "a")}
    for name, content in names.items():
        store.write(f"pictures/{name}", content + b"before")
        store.write(f"pictures/{name}", content)
    assert store.sizes("pictures") == {name: len(content) for name, content in names.items()}
    assert {name: store.read(f"pictures/{name}") for name in names} == names
    store.delete("pictures/A.png")
    assert set(store.sizes("pictures")) == {*names} - {"A.png"}
    assert not store.is_empty()
    with store.locked(), store.locked():  # a bucket has no lock
        pass
    with pytest.raises(StorageError, match="cannot be written"):
        Store(Location("s3://no-such-bucket/any", s3)).write("a.png", b"x")


def test_a_dry_run_checks_every_row_and_writes_nothing(
    sd15_bundle: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    output = tmp_path / "out"
    code, told, err = finish(start(words(sd15_bundle, prompts, output, "--dry-run"), environment))
    assert (code, told["would_make"], [row["id"] for row in told["failed"]]) == (
        7,
        GOOD,
        ["row-1", "half", "steps", "empty", "image", "separator"],
    )
    assert not output.exists()
    assert "line 14, id row-1" in err
