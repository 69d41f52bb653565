"""Many clients at once: no picture is lost, none is another's, and each has the very bytes that it has alone."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from hidiff_runtime import Pipeline
from tests.deploy.clients import MODEL, STREAM, events, grpc, http, inputs, picture, post, same, stream
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

CLIENTS = 16
TURNS = 13
"""Requests of each client, one after the other."""

Asked = tuple[str, int]
"""Prompt and seed."""

ASKED: Sequence[Asked] = [
    (f"{what} {where}", seed)
    for what, seed in (("a lighthouse", 1), ("a lighthouse", 2**40), ("a harbour", 1), ("a harbour", 7))
    for where in ("at dusk", "at dawn", "in fog", "in snow", "from above", "far away")
]


def plain(server: TritonServer, batches: Sequence[Sequence[Asked]]) -> list[list[bytes]]:
    """HTTP inference, all rows of a batch in one request."""
    with http(server) as client:
        return [_rows(client, tritonclient.http, batch) for batch in batches]


def remote(server: TritonServer, batches: Sequence[Sequence[Asked]]) -> list[list[bytes]]:
    """gRPC inference, all rows of a batch in one request."""
    with grpc(server) as client:
        return [_rows(client, tritonclient.grpc, batch) for batch in batches]


def _rows(client: Any, module: Any, batch: Sequence[Asked]) -> list[bytes]:
    prompts, seeds = zip(*batch, strict=True)
    answer = client.infer(MODEL, inputs(module, prompt=list(prompts), seed=list(seeds)))
    return list(answer.as_numpy("image")[:, 0])


def streamed(server: TritonServer, batches: Sequence[Sequence[Asked]]) -> list[list[bytes]]:
    """Streams over gRPC with previews, all rows of a batch in one request."""
    found = []
    with grpc(server) as client:
        for batch in batches:
            prompts, seeds = zip(*batch, strict=True)
            messages = stream(client, prompt=list(prompts), seed=list(seeds), previews=[1] * len(batch))
            found.append([message["image"][0, 0] for message in messages if message["event"][0, 0] == b"result"])
    return found


def evented(server: TritonServer, batches: Sequence[Sequence[Asked]]) -> list[list[bytes]]:
    """Server-sent events, a request for each row."""
    found = []
    for batch in batches:
        contents = []
        for prompt, seed in batch:
            body = {"prompt": prompt, "seed": seed, "output": "base64"}
            status, content = post(server, f"{STREAM}/generate_stream", body)
            assert status == 200, content
            contents.append(b64decode(events(content)[-1]["image"]))
        found.append(contents)
    return found


WAYS: tuple[Callable[[TritonServer, Sequence[Sequence[Asked]]], list[list[bytes]]], ...] = (
    plain,
    remote,
    streamed,
    evented,
)


@pytest.fixture(scope="module")
def drawn(sd15_bundle: Path) -> dict[Asked, Image.Image]:
    """What the pipeline draws in this process."""
    with Pipeline.open(sd15_bundle, resident="all", threads=1) as pipe:
        return {asked: pipe(asked[0], seed=asked[1]) for asked in ASKED}


def misplaced(answers: Sequence[tuple[Asked, bytes]], drawn: dict[Asked, Image.Image]) -> list[Asked]:
    """Those whose picture is not their own."""
    return [asked for asked, content in answers if not same(picture(content), drawn[asked])]


def test_every_client_gets_its_own_pictures(served: TritonServer, drawn: dict[Asked, Image.Image]) -> None:
    alone = dict(zip(ASKED, (row for (row,) in plain(served, [[asked] for asked in ASKED])), strict=True))
    assert misplaced(list(alone.items()), drawn) == []

    def batches(client: int) -> list[list[Asked]]:
        """Every third request has two rows."""
        picks = [ASKED[(client * 5 + turn * 7) % len(ASKED)] for turn in range(TURNS + 1)]
        return [picks[turn : turn + 1 + (turn % 3 == 2)] for turn in range(TURNS)]

    def ask(client: int) -> list[tuple[Asked, bytes]]:
        asked = batches(client)
        found = WAYS[client % len(WAYS)](served, asked)
        assert [len(rows) for rows in found] == [len(batch) for batch in asked]
        return list(zip(chain(*asked), chain(*found), strict=True))

    before = _made(served)
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for found in pool.map(ask, range(CLIENTS)) for answer in found]
    assert CLIENTS * TURNS >= 200
    assert len(answers) == sum(len(batch) for client in range(CLIENTS) for batch in batches(client))
    assert _made(served) - before == len(answers)
    assert misplaced(answers, drawn) == []
    assert [asked for asked, content in answers if content != alone[asked]] == []
    assert len(set(answers)) == len(ASKED)  # every one was asked for


def test_the_comparison_sees_another_s_picture(drawn: dict[Asked, Image.Image], served: TritonServer) -> None:
    first, second = ASKED[:2]
    ((one, other),) = plain(served, [[first, second]])
    assert misplaced([(first, one), (second, other)], drawn) == []
    assert misplaced([(first, other), (second, one)], drawn) == [first, second]
    assert len({image.tobytes() for image in drawn.values()}) == len(ASKED)


def test_the_same_request_has_the_same_bytes_each_time(served: TritonServer) -> None:
    found = {content for way in WAYS for ((content,),) in (way(served, [[ASKED[0]]]) for _ in range(2))}
    assert len(found) == 1
    ((other,),) = plain(served, [[ASKED[1]]])
    assert other not in found
    assert json.loads(picture(other).info["hidiff"])["prompt"] == ASKED[1][0]


def _made(server: TritonServer) -> float:
    return sum(server.measured("hidiff_pictures_total").values())
