"""When the real server is ready, when it never is, and how another bundle takes the place of the one it serves."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import toy
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from hidiff_export.triton.repository import RepositoryPlan, write
from hidiff_runtime import Pipeline
from hidiff_runtime.format.manifest import Manifest
from tests.deploy.clients import MODEL, STREAM, http, inputs, picture, same
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

PROMPT = "a lighthouse at dusk"
OPTIONS = {"resident": "all", "threads": 1}
WEIGHTS = "unet/weights.safetensors"


@pytest.fixture
def bundle(sd15_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))


def proofs(server: TritonServer) -> list[str] | None:
    """The hashes of the bundles that were proven; None where the server does not tell yet."""
    try:
        found = server.measured("hidiff_parity_info")
    except (urllib.error.URLError, OSError):
        return None
    return [name.split('bundle="')[1].split('"')[0] for name, value in found.items() if value == 1]


def digest(repository: Path) -> str:
    """The hash of the bundle in a repository."""
    return Manifest.read(repository / STREAM / "1/bundle").digest


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_engines(bundle: Path) -> None:
    """Each of two phases gets the other's engine; all hashes are right."""
    one, other = (bundle / f"unet/{phase}.onnxruntime.onnx" for phase in ("strided", "windowed"))
    aside = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(aside)
    toy.seal(bundle)


def flip_weights(repository: Path) -> None:
    flip(repository / STREAM / "1/bundle" / WEIGHTS)


def name_another_bundle(repository: Path) -> None:
    config = repository / STREAM / "config.pbtxt"
    config.write_text(config.read_text(encoding="utf-8").replace(digest(repository), "0" * 64), encoding="utf-8")


def untouched(_: Path) -> None:
    pass


def test_the_server_is_ready_only_when_the_bundle_is_proven(
    repository: Path, triton: Callable[..., TritonServer]
) -> None:
    server = triton(repository, wait=False)
    while not server.ready():
        assert server.process.poll() is None
    while (proven := proofs(server)) is None:  # the port of the metrics opens last
        assert server.process.poll() is None
    assert proven == [digest(repository)]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (untouched, flip_weights, "given: unet/weights.safetensors has changed"),
        (untouched, name_another_bundle, "BundleError: This is not the bundle that the model"),
        (swap_engines, untouched, "ParityError: The engines of this machine do not compute what"),
    ],
    ids=["weights", "hash", "engines"],
)
def test_a_server_that_cannot_prove_its_bundle_ends(
    bundle: Path,
    tmp_path: Path,
    triton: Callable[..., TritonServer],
    before: Callable[[Path], None],
    after: Callable[[Path], None],
    said: str,
) -> None:
    before(bundle)
    write(bundle, tmp_path / "models", RepositoryPlan(bundle="copy", options=OPTIONS))
    after(tmp_path / "models")
    server = triton(tmp_path / "models", wait=False)
    while server.process.poll() is None:
        assert not server.ready()
    assert server.wait_end() == 1
    assert said in server.said()


def rename(bundle: Path) -> None:
    """Makes another bundle of one: its hash is another, its pictures are the same."""
    manifest = Manifest.read(bundle)
    toy.seal(bundle, dataclasses.replace(manifest, recipe={**manifest.recipe, "name": "another"}))


@contextmanager
def asked_all_the_while(server: TritonServer, wanted: Image.Image) -> Iterator[None]:
    """A client asks the front again and again; every answer is the picture."""
    done = threading.Event()

    def ask() -> int:
        answers = 0
        with http(server) as client:
            while not done.is_set() or not answers:
                answer = client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT, seed=5))
                assert same(picture(answer.as_numpy("image")[0, 0]), wanted)
                answers += 1
        return answers

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask)
        try:
            yield
        finally:
            done.set()
        assert answers.result(60) >= 1


def test_another_bundle_takes_over_without_a_request_lost(
    bundle: Path, tmp_path: Path, triton: Callable[..., TritonServer]
) -> None:
    with Pipeline.open(bundle) as pipe:
        wanted = pipe(PROMPT, seed=5)
    models, plan = tmp_path / "models", RepositoryPlan(bundle="copy", options=OPTIONS)
    write(bundle, models, plan)
    first = digest(models)
    server = triton(models, control="explicit")
    with http(server) as client:
        assert server.ready()  # Triton's own readiness tells nothing while there is no model
        assert not client.is_model_ready(STREAM)
        with ThreadPoolExecutor(1) as pool:
            loaded = pool.submit(_load, server, STREAM)
            while not client.is_model_ready(STREAM):
                assert not loaded.done() or loaded.result() is None
            assert proofs(server) == [first]
        client.load_model(MODEL)

        rename(bundle)
        write(bundle, models, plan, force=True)
        assert digest(models) != first
        with asked_all_the_while(server, wanted):
            for model in (STREAM, MODEL):
                client.load_model(model)
        assert digest(models) in (proofs(server) or [])

        flip(models / STREAM / "1/bundle" / WEIGHTS)
        with asked_all_the_while(server, wanted), pytest.raises(InferenceServerException, match="BundleError"):
            client.load_model(STREAM)
        assert client.is_model_ready(STREAM)

        client.unload_model(STREAM)
        while client.is_model_ready(STREAM):
            assert server.process.poll() is None
        with pytest.raises(InferenceServerException, match="cannot take the request now"):
            client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT))


def _load(server: TritonServer, model: str) -> None:
    with http(server) as client:
        client.load_model(model)
