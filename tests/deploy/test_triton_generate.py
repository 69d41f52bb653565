"""A repository on the real server: each way of asking gives the picture that the pipeline makes of the same request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from click.testing import CliRunner
from PIL import Image

from hidiff_export.cli import main
from hidiff_runtime import Pipeline
from tests.deploy.clients import MODEL, http, inputs, picture, same
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

PROMPT = "a lighthouse at dusk"


@pytest.fixture(scope="module")
def pipe(sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(sd15_bundle) as opened:
        yield opened


@pytest.fixture
def drawn() -> Image.Image:
    """A picture to start from, of the bundle's size."""
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8))


def test_what_the_command_writes_serves_the_pictures_of_the_pipeline(
    sd15_bundle: Path, tmp_path: Path, pipe: Pipeline, triton: Callable[..., TritonServer]
) -> None:
    done = CliRunner().invoke(main, ["triton", str(sd15_bundle), "-o", str(tmp_path / "repository")])
    assert done.exit_code == 0, done.output
    server = triton(tmp_path / "repository")
    with http(server) as client:
        answer = client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT, seed=7))
    found = picture(answer.as_numpy("image")[0, 0])
    assert same(found, pipe(PROMPT, seed=7))
    assert not same(found, pipe(PROMPT, seed=8))
    assert found.info["hidiff"] == answer.as_numpy("parameters")[0, 0].decode()
    assert json.loads(found.info["hidiff"])["seed"] == 7
