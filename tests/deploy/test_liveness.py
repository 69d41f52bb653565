"""The server as the image starts it: pictures come out, and when a model's process is killed the probe says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.deploy.clients import grpc, http, inputs
from tests.deploy.server import TritonServer

PATIENCE = 300.0

SCRIPT = Path(__file__).parents[2] / "deploy/docker/hidiff-triton"


def started(repository: Path) -> list[str]:
    """The words that the image's script starts Triton with."""
    environment = {"PATH": "/usr/bin:/bin", "MODEL_REPOSITORY": str(repository), "TRITONSERVER": "/bin/echo"}
    return subprocess.run([SCRIPT], capture_output=True, text=True, check=True, env=environment).stdout.split()


def options(repository: Path) -> list[str]:
    """Those of them that not every server of the tests has."""
    own = ("--model-repository=", "--model-control-mode=none")
    said = started(repository)
    assert [sum(word.startswith(start) for word in said) for start in own] == [1, 1]
    return [word for word in said if not word.startswith(own)]


def probe(server: TritonServer) -> tuple[int, str]:
    """What the liveness probe says; a model's process sets its heartbeat every five seconds."""
    url = f"http://{server.metrics}/metrics"
    command = [sys.executable, "-m", "hidiff_runtime.serving.probe", url, "--older-than", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.needs("tritonserver")
@pytest.mark.parametrize("model", ["hidiff", "hidiff_stream"])
def test_a_killed_model_is_seen_by_the_probe_alone(
    model: str, repository: Path, triton: Callable[..., TritonServer]
) -> None:
    server = triton(repository, options=options(repository))
    with http(server) as client:
        answer = client.infer("hidiff", inputs(tritonclient.http, prompt="a lighthouse", seed=1))
        assert answer.as_numpy("image")[0, 0].startswith(b"\x89PNG")
    with grpc(server) as client:
        assert client.is_server_ready()
        for closed in (
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_log_settings,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                closed()
        with pytest.raises(InferenceServerException, match="restricted"):
            client.load_model("hidiff")
    deadline = time.monotonic() + PATIENCE
    while (found := probe(server))[0] != 0:  # a beat may be late on a busy machine
        assert time.monotonic() < deadline, found
    code, said = found
    assert said.startswith("alive: the oldest of 2 heartbea")
    (stub,) = server.stubs(model)
    os.kill(stub, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while code == 0:
        assert time.monotonic() < deadline
        time.sleep(0.5)
        code, said = probe(server)
    assert f'{{model="{model}",' in said
    assert "s old, more than 7 s" in said
    assert server.ready()
