"""Every engine a model of its own on the real server: the same pictures, readiness only after proof, short errors.

The tests' server has no backend for ONNX files; `engine_stand_in` opens the same files in its place. TensorRT plans are
not run anywhere here.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from click.testing import CliRunner
from PIL import Image
from tritonclient.utils import InferenceServerException

from hidiff_export.cli import main
from hidiff_runtime import Pipeline
from tests.deploy.clients import MODEL, grpc, http, inputs, picture, png, post, same, stream
from tests.deploy.engine_stand_in import stand_in
from tests.deploy.server import PATIENCE, TritonServer

pytestmark = pytest.mark.needs("tritonserver")

PROMPT = "a lighthouse at dusk"
ENGINES = ["hidiff_strided", "hidiff_text_encoder", "hidiff_vae_decoder", "hidiff_vae_encoder", "hidiff_windowed"]


def repository(bundle: Path, output: Path) -> dict[str, Any]:
    """What the command writes and says of it, with stand-ins for Triton's own backend."""
    done = CliRunner().invoke(main, ["triton", str(bundle), "-o", str(output), "--layout", "per-phase", "--json"])
    assert done.exit_code == 0, done.output
    assert stand_in(output) == ENGINES
    told: dict[str, Any] = json.loads(done.output)
    return told


def ready(server: TritonServer, model: str = MODEL) -> bool:
    """Whether Triton says that a model is ready, and with it the server."""
    with http(server) as client:
        try:
            return bool(client.is_model_ready(model) and client.is_server_ready())
        except OSError:  # it does not listen yet
            return False


@pytest.fixture(scope="module")
def server(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server of the repository, started with the options that the command told."""
    folder = tmp_path_factory.mktemp("per-phase")
    told = repository(sd15_bundle, folder / "models")
    options = [option for option in told["options"] if "model-control-mode" not in option]
    with TritonServer(folder / "models", folder, control="explicit", options=options, wait=False) as started:
        deadline = time.monotonic() + PATIENCE
        while not ready(started):
            assert started.process.poll() is None, started.said()[-4000:]
            assert time.monotonic() < deadline, started.said()[-4000:]
            time.sleep(0.1)
        yield started


def infer(server: TritonServer, **values: Any) -> Image.Image:
    with http(server) as client:
        return picture(client.infer(MODEL, inputs(tritonclient.http, **values)).as_numpy("image")[0, 0])


def test_pictures_are_those_of_the_pipeline_in_one_process(server: TritonServer, sd15_bundle: Path) -> None:
    start = Image.fromarray(np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8))
    with Pipeline.open(sd15_bundle) as pipe:
        expected = pipe(PROMPT, seed=7)
        assert same(infer(server, prompt=PROMPT, seed=7), expected)
        assert not same(infer(server, prompt=PROMPT, seed=8), expected)
        changed = infer(server, prompt=PROMPT, seed=7, image=png(start), strength=0.7)
        assert same(changed, pipe(PROMPT, seed=7, image=start, strength=0.7))


def test_progress_is_streamed_phase_by_phase(server: TritonServer) -> None:
    with grpc(server) as client:
        *steps, result = stream(client, prompt=PROMPT, seed=7, previews=3)
    assert [message["phase"][0, 0] for message in steps] == [b"strided", b"windowed", b"windowed"]
    assert all("preview" in message for message in steps)
    assert result["event"][0, 0] == b"result"


def test_engines_are_the_server_s_and_the_pipeline_s_parity_is_told(server: TritonServer) -> None:
    assert server.measured("hidiff_parity_info")
    asked = server.measured("nv_inference_request_success")
    for model in ENGINES:
        assert any(f'model="{model}"' in name and count > 0 for name, count in asked.items()), model


def test_nobody_without_the_secret_loads_a_model(server: TritonServer) -> None:
    for connect in (http, grpc):
        with connect(server) as client, pytest.raises(InferenceServerException, match="restricted"):
            client.unload_model(MODEL)
    assert ready(server)


def test_an_engine_that_is_gone_is_a_short_error(server: TritonServer) -> None:
    """The last test of this server: a stub that was killed is not started again by this version of Triton."""
    os.kill(server.stubs("hidiff_windowed")[0], signal.SIGKILL)
    status, content = post(server, f"{MODEL}/generate", {"prompt": PROMPT, "seed": 7, "output": "base64"})
    assert status >= 400
    assert "hidiff_windowed" in json.loads(content)["error"]
    assert b"/" not in content
    assert b"Traceback" not in content


def test_another_phase_s_engine_is_never_served(sd15_bundle: Path, tmp_path: Path) -> None:
    told = repository(sd15_bundle, tmp_path / "models")
    one, other = (tmp_path / f"models/hidiff_{phase}/1/model.onnx" for phase in ("strided", "windowed"))
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    options = [option for option in told["options"] if "model-control-mode" not in option]
    with TritonServer(tmp_path / "models", tmp_path, control="explicit", options=options, wait=False) as server:
        seen = []
        while server.process.poll() is None:
            seen.append(ready(server))
            time.sleep(0.05)
        assert not any(seen)
        assert "hidiff_stream is not proven" in server.said()
        assert "do not compute what PyTorch computed" in server.said()
