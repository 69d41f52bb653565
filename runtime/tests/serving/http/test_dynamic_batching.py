"""Requests that wait and are alike are drawn in one run, and each gets the picture of its seed all the same."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
import toy_reference
import toy_sizes
from http_server import PROMPT, Server, data_url, events, eventually, png, proven, refused, rest, serving, until
from PIL import Image

from hidiff_runtime import Pipeline

SIZES = ((64, 48), (48, 64))
ASKED: dict[str, Any] = {"prompt": PROMPT, "steps": 4}
CANCELLED, FAILED = "hidiff_cancellations_total", "hidiff_failures_total"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draws 64x48 one by one, two or four at once, and 48x64 one by one."""
    found = toy_sizes.add_turned(proven(tmp_path_factory.mktemp("batching") / "bundle"))
    for batch in (2, 4):
        toy_sizes.add_batch(found, toy.Toy(), batch)
    toy_reference.record_others(found, toy.Toy())
    return found


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, waiting=40, dynamic_batching=True) as started:
        yield started


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Any]:
    """Draws a picture by itself."""
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as pipe:
        yield lambda seed, **given: np.asarray(pipe(PROMPT, seed=seed, steps=4, **given))


def runs(server: Server) -> list[int]:
    """How many pictures each run of four steps drew, after the warm-up's."""
    backend = server.host.worker.service.pipeline.bundle._engines.backend
    assert isinstance(backend, toy_pictures.Backend)
    calls = [inputs for _, inputs in backend.calls if "window_shifts" in inputs]
    return [len(inputs["latents"]) // 2 for inputs in calls]


def same(picture: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two pictures are one, but for rounding."""
    return picture.shape == expected.shape and int(np.abs(picture.astype(int) - expected.astype(int)).max()) <= 1


def waiting(server: Server, asked: Sequence[dict[str, Any]], pool: ThreadPoolExecutor) -> list[Any]:
    """Asks while a first request keeps the thread, one after the other; answers come when the gate opens."""
    server.gate.close()
    answers = [pool.submit(server.post, {**ASKED, "seed": 99})]
    server.gate.wait()
    worker = server.host.worker
    for number, values in enumerate(asked, start=1):
        answers.append(pool.submit(server.post, {**ASKED, **values}))
        eventually(lambda left=40 - number: worker._places._value == left)  # type: ignore[misc]  # it has its place
    return answers


def test_those_that_wait_are_drawn_together(server: Server, alone: Any) -> None:
    before = len(runs(server))
    asked = [{"seed": seed} for seed in (1, 2)] + [{"seed": 3, "steps": 5}] + [{"seed": seed} for seed in (4, 5)]
    with ThreadPoolExecutor(8) as pool:
        answers = waiting(server, asked, pool)
        server.gate.open()
        pictures = [answer.result().picture for answer in answers]
    for picture, seed in zip(pictures, (99, 1, 2, None, 4, 5), strict=True):
        assert seed is None or same(picture, alone(seed))
    drawn = runs(server)[before:]
    assert [key for key, _ in itertools.groupby(drawn)] == [1, 4, 1]
    assert drawn.count(4) == 4


def test_without_it_none_are(folder: Path, alone: Any) -> None:
    with serving(folder, waiting=40) as server, ThreadPoolExecutor(8) as pool:
        before = len(runs(server))
        _, *answers = waiting(server, [{"seed": seed} for seed in range(4)], pool)
        server.gate.open()
        for seed, answer in enumerate(answers):
            assert same(answer.result().picture, alone(seed))
        assert set(runs(server)[before:]) == {1}


@pytest.mark.parametrize("dynamic_batching", [False, True])
def test_pictures_of_one_request_fill_batches(folder: Path, dynamic_batching: bool) -> None:
    with serving(folder, dynamic_batching=dynamic_batching) as server:
        before = len(runs(server))
        answer = server.post({**ASKED, "seed": 5, "n": 3, "stream": True, "partial_images": 1})
        assert runs(server)[before:] == [2, 2, 2, 2, 1, 1, 1, 1]
        told = events(answer.body)
        steps = [values["run"] for name, values in told if name == ":progress"]
        assert steps == [0, 1] * 4 + [2] * 4
        partial = [values for name, values in told if name.endswith("partial_image")]
        assert [values["run"] for values in partial] == [0, 1, 2]
        assert len({values["b64_json"] for values in partial}) == 3
        seeds = [values["seed"] for name, values in told if name.endswith("completed")]
        assert seeds == [5, 6, 7]
        listed = server.post({**ASKED, "seed": 5, "n": 3}).json["data"]
        assert [one["parameters"]["seed"] for one in listed] == [5, 6, 7]


def test_a_client_that_goes_ends_its_picture_alone(server: Server, alone: Any) -> None:
    with ThreadPoolExecutor(8) as pool, ExitStack() as closing:
        answers = waiting(server, [{"seed": 1}], pool)
        going = closing.enter_context(server.begin({**ASKED, "seed": 2, "stream": True}))
        until(going, b": accepted")
        server.gate.let(4)  # the first request's steps
        for _ in range(4):
            server.gate.wait()  # at last in the first step of both
        server.gate.let(1)
        going.close()
        server.gate.open()
        assert same(answers[1].result().picture, alone(1))
        server.eventually(CANCELLED, 1)


def test_one_that_is_taken_back_is_not_drawn(server: Server, alone: Any) -> None:
    with ThreadPoolExecutor(8) as pool, ExitStack() as closing:
        before = len(runs(server))
        answers = waiting(server, [{"seed": 1}], pool)
        with server.begin({**ASKED, "seed": 2, "stream": True}) as going:
            until(going, b": accepted")
        server.eventually(CANCELLED, 1)
        server.gate.open()
        assert same(answers[1].result().picture, alone(1))
        assert set(runs(server)[before:]) == {1}
        again = closing.enter_context(server.begin({**ASKED, "seed": 2, "stream": True}))
        assert b"completed" in rest(again)


def test_an_engine_that_fails_fails_all_of_them(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def unet(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with ThreadPoolExecutor(8) as pool:
        answers = waiting(server, [{"seed": 1}, {"seed": 2}], pool)
        with monkeypatch.context() as patch:
            patch.setattr(toy, "unet", unet)
            server.gate.open()
            for answer in answers[1:]:
                refused(answer.result(), 500)
        assert server.count(FAILED, kind="internal") >= 2


def test_two_hundred_requests_of_mixed_sizes_get_each_their_own_picture(server: Server, alone: Any) -> None:
    image = png(90, SIZES[0])
    expected: dict[tuple[Any, ...], np.ndarray] = {}
    asked = []
    for number in range(200):
        (width, height), seed, start = SIZES[number % 3 == 0], number % 10, number % 7 == 0
        values: dict[str, Any] = {**ASKED, "seed": seed, "size": f"{width}x{height}"}
        given: dict[str, Any] = {"width": width, "height": height}
        if start and (width, height) == SIZES[0]:
            values |= {"image": data_url(image), "strength": 0.5}
            given |= {"image": _opened(image), "strength": 0.5}
        key = (seed, tuple(sorted(values)), width)
        if key not in expected:
            expected[key] = alone(seed, **given)
        asked.append((values, key))
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda one: server.post(one[0]), asked))
    for answer, (values, key) in zip(answers, asked, strict=True):
        assert answer.status == 200
        assert same(answer.picture, expected[key]), values
    pairs = itertools.combinations(expected.values(), 2)
    assert not any(same(one, other) for one, other in pairs)
    assert 4 in runs(server)


def _opened(content: bytes) -> Any:
    return Image.open(io.BytesIO(content))
