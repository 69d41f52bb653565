"""What requests that wait keep in memory: pictures of the bundle's size, within one bound, decoded one by one."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import toy_pictures
from http_server import PATIENCE, PROMPT, Server, data_url, png, proven, serving, until
from PIL import Image, PngImagePlugin
from serving_sink import Counts

from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.serving.http import job_queue as worker_module
from hidiff_runtime.serving.http.errors import ApiError
from hidiff_runtime.serving.http.job_queue import JobWorker
from hidiff_runtime.serving.http.queued_job import QueuedJob
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.service import Service

SIZE = (toy_pictures.WIDTH, toy_pictures.HEIGHT)
LARGE = (1500, 1200)
PIXELS = LARGE[0] * LARGE[1]
FITTED = SIZE[0] * SIZE[1] * 3
ASKED = {"prompt": PROMPT, "steps": 4, "seed": 1}
CANCELLED = "hidiff_cancellations_total"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven(tmp_path_factory.mktemp("queue") / "bundle")


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as started:
        yield started


@pytest.fixture
def service(folder: Path) -> Iterator[Service]:
    with Service.open(folder, backend=toy_pictures.Backend()) as opened:
        yield opened


def with_text(size: tuple[int, int], mode: str = "RGB") -> bytes:
    """A small file of a large picture, and of a text that is larger still."""
    content, texts = io.BytesIO(), PngImagePlugin.PngInfo()
    texts.add_text("comment", "a" * 900_000, zip=True)
    Image.new(mode, size, 200 if mode == "L" else (200, 20, 30)).save(content, "PNG", pnginfo=texts)
    return content.getvalue()


def pictures(known: list[Image.Image] | None = None) -> list[Image.Image]:
    """Every picture that is alive in this process, but for those that are known."""
    gc.collect()
    others = {id(picture) for picture in known or ()}
    return [found for found in gc.get_objects() if isinstance(found, Image.Image) and id(found) not in others]


def asked_with_pictures(size: tuple[int, int]) -> dict[str, Any]:
    pictures = {"image": data_url(with_text(size)), "mask": data_url(with_text(size, "L"))}
    return {**ASKED, **pictures, "strength": 0.5, "resize": True, "stream": True}


def test_requests_that_wait_keep_pictures_of_the_bundles_size_alone(server: Server) -> None:
    server.gate.close()
    with ExitStack() as closing:
        known = pictures()
        for number in range(4):
            connection = closing.enter_context(server.begin(asked_with_pictures(LARGE)))
            until(connection, b": accepted")
            if number == 0:
                server.gate.wait()
        found = pictures(known)
        assert len(found) == 8  # an image and a mask of each
        assert {picture.size for picture in found} == {SIZE}
        assert not any(picture.info for picture in found)
        del found
        server.gate.open()
        assert server.post(ASKED).status == 200
    assert pictures(known) == []


def test_a_request_that_is_taken_back_lets_go_of_its_pictures_before_its_turn(server: Server) -> None:
    server.gate.close()
    with server.begin({**ASKED, "stream": True}) as running:
        until(running, b": accepted")
        server.gate.wait()
        known = pictures()
        for number in range(1, 12):  # more than there are places, one after the other
            with server.begin(asked_with_pictures(LARGE)) as connection:
                until(connection, b": accepted")
            server.eventually(CANCELLED, number)
        assert pictures(known) == []
        server.gate.open()


def test_pictures_that_wait_are_bounded_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "PICTURE_BYTES", 2 * FITTED + 1)
    given = {**ASKED, "image": data_url(png()), "strength": 0.5, "stream": True}
    with serving(folder) as server, ExitStack() as closing:
        server.gate.close()
        first = closing.enter_context(server.begin({**given, "n": 3}))  # whose runs share the picture
        until(first, b": accepted")
        server.gate.wait()
        second = closing.enter_context(server.begin(given))
        until(second, b": accepted")
        answer = server.post(given)
        assert (answer.status, answer.json["error"]["code"]) == (429, "queue_full")
        assert "hold as many pictures as there is room for" in answer.json["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
        text = closing.enter_context(server.begin({**ASKED, "stream": True}))  # which holds none
        until(text, b": accepted")
        second.close()
        server.eventually(CANCELLED, 1)
        third = closing.enter_context(server.begin(given))  # the room is free again
        until(third, b": accepted")
        server.gate.open()


def test_one_request_is_taken_however_large_its_pictures_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "PICTURE_BYTES", 1)
    with serving(folder) as server:
        for _ in range(2):
            assert server.post({**ASKED, "image": data_url(png()), "strength": 0.5}).status == 200


def test_pictures_are_decoded_one_request_at_a_time_and_others_pass(service: Service) -> None:
    worker = JobWorker(service, MetricsRecorder(Counts()), waiting=8)
    going, most, lock, go_on = 0, 0, threading.Lock(), threading.Semaphore(0)
    begun = threading.Semaphore(0)

    def decode(opened: Service) -> list[Request]:
        nonlocal going, most
        with lock:
            going += 1
            most = max(most, going)
        begun.release()
        assert go_on.acquire(timeout=PATIENCE)
        with lock:
            going -= 1
        return [opened.request(ASKED)]

    async def submit(read: Callable[[Service], list[Request]], pictures: bool) -> QueuedJob:
        return await worker.submit(
            read, pictures=pictures, previews=0, deadline=time.monotonic() + PATIENCE, encode=lambda _: b""
        )

    async def run() -> None:
        slow = [asyncio.create_task(submit(decode, True)) for _ in range(4)]
        quick = asyncio.create_task(submit(lambda opened: [opened.request(ASKED)], False))
        await quick  # which waits for none of them
        for _ in slow:
            assert await asyncio.to_thread(begun.acquire, timeout=PATIENCE)
            assert not begun.acquire(blocking=False)
            go_on.release()
        for job in [await quick, *(await asyncio.gather(*slow))]:
            async for _ in job.events():
                pass

    asyncio.run(run())
    assert (going, most) == (0, 1)
    worker.close()


def test_what_is_refused_gives_its_place_back(service: Service) -> None:
    worker = JobWorker(service, MetricsRecorder(Counts()), waiting=0)

    def refuse(_: Service) -> list[Request]:
        raise ApiError(400, "No.")

    async def run() -> None:
        for _ in range(3):
            with pytest.raises(ApiError, match="No"):
                await worker.submit(
                    refuse, pictures=True, previews=0, deadline=time.monotonic() + PATIENCE, encode=lambda _: b""
                )

    asyncio.run(run())
    worker.close()
