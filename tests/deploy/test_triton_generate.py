"""A repository on the real server: each way of asking gives the picture that the pipeline makes of the same request."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from click.testing import CliRunner
from PIL import Image
from tritonclient.utils import InferenceServerException

from hidiff_export.cli import main
from hidiff_runtime import Pipeline
from tests.deploy.clients import MODEL, STREAM, events, grpc, http, inputs, picture, png, post, same, stream
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

PROMPT = "a lighthouse at dusk"


@pytest.fixture(scope="module")
def pipe(sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(sd15_bundle, resident="all", threads=1) as opened:
        yield opened


@pytest.fixture
def drawn() -> Image.Image:
    """A picture to start from, of the bundle's size."""
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8))


def painted() -> Image.Image:
    """A mask whose left half is to be painted."""
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (0, 0, 64, 128))
    return mask


def test_what_the_command_writes_serves_the_pictures_of_the_pipeline(
    sd15_bundle: Path, tmp_path: Path, pipe: Pipeline, triton: Callable[..., TritonServer]
) -> None:
    options = ["--option", "threads=1", "--queue-size", "4"]
    done = CliRunner().invoke(main, ["triton", str(sd15_bundle), "-o", str(tmp_path / "repository"), *options])
    assert done.exit_code == 0, done.output
    server = triton(tmp_path / "repository")
    with http(server) as client:
        answer = client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT, seed=7))
    found = picture(answer.as_numpy("image")[0, 0])
    assert same(found, pipe(PROMPT, seed=7))
    assert not same(found, pipe(PROMPT, seed=8))
    assert found.info["hidiff"] == answer.as_numpy("parameters")[0, 0].decode()
    assert json.loads(found.info["hidiff"])["seed"] == 7


def test_every_row_of_a_request_is_a_run_of_its_own(served: TritonServer, pipe: Pipeline) -> None:
    prompts, seeds = [PROMPT, "a heron", PROMPT], [3, 3, 4]
    with grpc(served) as client:
        answer = client.infer(MODEL, inputs(tritonclient.grpc, 3, prompt=prompts, seed=seeds, guidance_scale=4.0))
    found = [picture(content) for content in answer.as_numpy("image")[:, 0]]
    wanted = [pipe(prompt, seed=seed, guidance_scale=4.0) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert len(found) == 3
    assert all(same(one, other) for one, other in zip(found, wanted, strict=True))
    assert not same(found[0], found[1])
    assert not same(found[0], found[2])
    assert [json.loads(text)["seed"] for text in answer.as_numpy("parameters")[:, 0]] == seeds


def test_pixels_come_as_an_array_where_that_is_asked(served: TritonServer, pipe: Pipeline) -> None:
    with http(served) as client:
        answer = client.infer(MODEL, inputs(tritonclient.http, 2, prompt=PROMPT, seed=[1, 2], output="uint8"))
    pixels = answer.as_numpy("pixels")
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 1, 128, 128, 3)
    assert same(pixels[0, 0], pipe(PROMPT, seed=1))
    assert same(pixels[1, 0], pipe(PROMPT, seed=2))
    assert answer.as_numpy("image") is None


def test_json_alone_is_enough_for_a_picture(served: TritonServer, pipe: Pipeline) -> None:
    body = {"prompt": PROMPT, "negative_prompt": "fog", "seed": 5, "guidance_scale": 3.5, "output": "base64"}
    status, content = post(served, f"{MODEL}/generate", body)
    assert status == 200, content
    answer = json.loads(content)
    wanted = pipe(PROMPT, negative_prompt="fog", seed=5, guidance_scale=3.5)
    assert same(picture(base64.b64decode(answer["image"])), wanted)
    assert json.loads(answer["parameters"])["negative_prompt"] == "fog"


def test_progress_and_previews_stream_over_grpc(served: TritonServer, pipe: Pipeline) -> None:
    with grpc(served) as client:
        messages = stream(client, rows=2, prompt=PROMPT, seed=[7, 8], previews=1)
    told = [(int(one["row"][0, 0]), one["event"][0, 0], "preview" in one) for one in messages]
    steps = [b"progress"] * 3
    assert [row for row, _, _ in told] == [0] * 4 + [1] * 4
    assert [event for _, event, _ in told] == [*steps, b"result"] * 2
    assert [shown for _, _, shown in told] == [False, False, True, False] * 2
    assert [int(one["step"][0, 0]) for one in messages[:3]] == [1, 2, 3]
    assert {int(one["steps"][0, 0]) for one in messages[:3]} == {3}
    assert [one["phase"][0, 0].decode() for one in messages[:3]] == phases(pipe)
    assert picture(messages[2]["preview"][0, 0]).size == (16, 16)
    results = [picture(one["image"][0, 0]) for one in messages if one["event"][0, 0] == b"result"]
    assert same(results[0], pipe(PROMPT, seed=7))
    assert same(results[1], pipe(PROMPT, seed=8))


def phases(pipe: Pipeline) -> list[str]:
    """The phase of each step of a run."""
    seen: list[str] = []
    pipe(PROMPT, callback=lambda step: seen.append(step.phase.name))
    return seen


def test_progress_and_previews_stream_over_http(served: TritonServer, pipe: Pipeline) -> None:
    body = {"prompt": PROMPT, "seed": 9, "output": "base64", "previews": 3}
    status, content = post(served, f"{STREAM}/generate_stream", body)
    assert status == 200, content
    messages = events(content)
    assert [one["event"] for one in messages] == ["progress", "progress", "progress", "result"]
    previews = [picture(base64.b64decode(one["preview"])) for one in messages[:3]]
    seen: list[Image.Image] = []
    wanted = pipe(PROMPT, seed=9, callback=lambda step: seen.append(step.preview()))
    assert all(same(one, other) for one, other in zip(previews, seen, strict=True))
    assert same(picture(base64.b64decode(messages[-1]["image"])), wanted)


@pytest.mark.parametrize("with_mask", [False, True], ids=["image", "mask"])
def test_runs_start_from_pictures(served: TritonServer, pipe: Pipeline, drawn: Image.Image, with_mask: bool) -> None:
    given: dict[str, Any] = {"strength": 0.7, "seed": 2}
    pictures = {"image": drawn, **({"mask": painted()} if with_mask else {})}
    sent = {name: png(one) for name, one in pictures.items()}
    with http(served) as client:
        answer = client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT, **given, **sent))
    found = picture(answer.as_numpy("image")[0, 0])
    assert same(found, pipe(PROMPT, **given, **pictures))
    assert not same(found, pipe(PROMPT, seed=2))


def test_pictures_of_another_size_are_fitted_where_that_is_asked(served: TritonServer, pipe: Pipeline) -> None:
    large = Image.fromarray(np.random.RandomState(1).randint(0, 256, (90, 200, 3)).astype(np.uint8))
    url = "data:image/png;base64," + base64.b64encode(png(large)).decode()
    body = {"prompt": PROMPT, "image": url, "strength": 1.0, "resize": True, "output": "base64"}
    status, content = post(served, f"{MODEL}/generate", body)
    assert status == 200, content
    found = picture(base64.b64decode(json.loads(content)["image"]))
    assert same(found, pipe(PROMPT, image=large, strength=1.0, resize=True))
    status, content = post(served, f"{MODEL}/generate", {**body, "resize": False})
    assert status == 400
    assert b"200x90" in content


def test_an_empty_text_stands_for_one_that_is_left_out(
    served: TritonServer, pipe: Pipeline, drawn: Image.Image
) -> None:
    sent = inputs(tritonclient.http, 2, prompt=PROMPT, seed=1, image=[b"", png(drawn)], sampler=["", "euler_ancestral"])
    with http(served) as client:
        answer = client.infer(MODEL, sent)
    found = [picture(content) for content in answer.as_numpy("image")[:, 0]]
    assert same(found[0], pipe(PROMPT, seed=1))
    assert same(found[1], pipe(PROMPT, seed=1, image=drawn, sampler="euler_ancestral"))


def test_a_refused_request_is_told_why_by_either_model(served: TritonServer) -> None:
    for module, connect in ((tritonclient.http, http), (tritonclient.grpc, grpc)):
        with connect(served) as client, pytest.raises(InferenceServerException) as caught:
            client.infer(MODEL, inputs(module, 2, prompt=PROMPT, steps=[3, 4]))
        assert str(caught.value.status()) in ("400", "StatusCode.INVALID_ARGUMENT")
        assert "Given: 4." in caught.value.message()
    with grpc(served) as client, pytest.raises(InferenceServerException, match=r"Given: 4\."):
        stream(client, prompt=PROMPT, steps=4)
    assert post(served, f"{MODEL}/generate", {"prompt": PROMPT, "steps": 3, "output": "base64"})[0] == 200


def test_a_run_ends_at_its_deadline(served: TritonServer) -> None:
    with http(served) as client:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(MODEL, inputs(tritonclient.http, 8, prompt=PROMPT), timeout=20_000)
        assert caught.value.status() == "503"
        client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT), timeout=60_000_000)
    given = {"prompt": PROMPT, "timeout": 1000}
    for path in (f"{MODEL}/generate", f"{STREAM}/generate_stream"):
        said = post(served, path, given)[1]
        assert b"The deadline passed" in said or b"Request timeout expired" in said  # Triton's words, of its queue


def test_metrics_tell_what_was_made(served: TritonServer, pipe: Pipeline) -> None:
    before = served.measured("hidiff_")
    with http(served) as client:
        client.infer(MODEL, inputs(tritonclient.http, 2, prompt=PROMPT))
        with pytest.raises(InferenceServerException):
            client.infer(MODEL, inputs(tritonclient.http, prompt=" "))
    after = served.measured("hidiff_")

    def risen(start: str, *labels: str) -> float:
        names = [name for name in after if name.startswith(start) and all(label in name for label in labels)]
        assert names, (start, labels)
        return sum(after[name] - before.get(name, 0.0) for name in names)

    size = f'size="{pipe.bundle.manifest.width}x{pipe.bundle.manifest.height}"'
    assert risen("hidiff_pictures_total", size) == 2
    assert risen("hidiff_request_seconds_count", size) == 2
    for phase in set(phases(pipe)):
        assert risen("hidiff_step_seconds_count", f'phase="{phase}"', size) == 2 * phases(pipe).count(phase)
    assert risen("hidiff_failures_total", 'kind="input"') == 1
    proof = next(name for name in after if name.startswith("hidiff_parity_info"))
    assert after[proof] == 1
    assert f'bundle="{pipe.bundle.manifest.digest}"' in proof
    assert 'backend="onnxruntime"' in proof
    assert f'model="{STREAM}"' in proof


def examples(language: str) -> list[str]:
    """The examples of this language in what is written for clients."""
    text = (Path(__file__).parents[2] / "docs/triton.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_documented_client_gets_its_pictures(
    served: TritonServer, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = examples("python")
    monkeypatch.chdir(tmp_path)
    exec(example.replace("localhost:8000", served.http), {})
    for number, (prompt, seed) in enumerate((("a lighthouse at dusk", 1), ("a heron in the fog", 2))):
        assert same(picture((tmp_path / f"{number}.png").read_bytes()), pipe(prompt, seed=seed))


def test_the_documented_requests_are_answered(served: TritonServer, pipe: Pipeline) -> None:
    wanted = pipe("a lighthouse at dusk", seed=1)
    found = []
    for example in examples("sh"):
        path, body = re.search(r"localhost:8000/v2/models/(\S+).*-d '(.*?)'", example, re.DOTALL).groups()
        status, content = post(served, path, json.loads(body))
        assert status == 200, content
        last = json.loads(content) if path.endswith("generate") else events(content)[-1]
        found.append(same(picture(base64.b64decode(last["image"])), wanted))
    assert found == [True, True]
