"""A server that opens its bundle behind its back; the page; what Prometheus reads."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from http_server import PATIENCE, PROMPT, Answer, Server, proven, serving

from hidiff_runtime import BundleError
from hidiff_runtime.serving.http import service_trial
from hidiff_runtime.serving.metrics import METRICS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven(tmp_path_factory.mktemp("opening") / "bundle")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as started:
        yield started


def test_lives_before_it_is_ready_and_takes_nothing_until_then(folder: Path) -> None:
    go_on = threading.Event()
    with serving(folder, before=lambda: go_on.wait(PATIENCE), ready=False) as server:
        assert server.get("/health/live").status == 200
        assert server.get("/").status == 200
        for answer in (server.get("/health/ready"), server.get("/v1/models"), server.post({"prompt": PROMPT})):
            assert (answer.status, answer.json["error"]["code"]) == (503, "not_ready")
            assert "retry-after" in answer.headers
        assert server.count("hidiff_heartbeat_seconds") > 0
        go_on.set()
        while server.get("/health/ready").status != 200:
            pass
        assert server.post({"prompt": PROMPT, "steps": 4}).status == 200


def test_a_service_that_does_not_open_is_never_ready(folder: Path) -> None:
    def fails() -> None:
        raise BundleError("The bundle is broken.")

    with serving(folder, before=fails) as server:
        assert [str(error) for error in server.failures] == ["The bundle is broken."]
        assert server.get("/health/ready").status == 503


ASKED = {"prompt": PROMPT, "steps": 4, "seed": 1}


def becomes(server: Server, status: int) -> Answer:
    """What ready answers once it answers this status."""
    end = time.monotonic() + PATIENCE
    while (answer := server.get("/health/ready")).status != status:
        assert time.monotonic() < end, answer
        time.sleep(0.01)
    return answer


def moved(folder: Path) -> Path:
    return folder.rename(folder.with_name("away"))


def test_a_bundle_that_is_moved_away_is_not_ready_until_it_is_back(tmp_path: Path) -> None:
    with serving(proven(tmp_path / "bundle")) as server:
        away = moved(tmp_path / "bundle")
        answer = server.get("/health/ready")  # before any request failed
        assert (answer.status, answer.json["error"]["code"]) == (503, "not_ready")
        assert "files of its bundle are gone" in answer.json["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
        assert server.post(ASKED).status == 500
        away.rename(tmp_path / "bundle")
        with tried_again_at_once():
            becomes(server, 200)
        assert server.post(ASKED).status == 200


def test_what_stays_open_needs_no_bundle(tmp_path: Path) -> None:
    with serving(proven(tmp_path / "bundle"), resident="all") as server:
        expected = server.post(ASKED).picture
        moved(tmp_path / "bundle")
        assert np.array_equal(server.post(ASKED).picture, expected)
        assert server.get("/health/ready").status == 200


@contextmanager
def tried_again_at_once() -> Iterator[None]:
    """Tries out again at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_trial, "AGAIN", 0.0)
        yield


def test_an_engine_that_fails_for_good_is_not_ready_until_it_works_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(proven(tmp_path / "bundle")) as server, tried_again_at_once():
        backend = server.host.worker.service.pipeline.bundle._engines.backend
        backend.spoil = spoilt
        assert server.post(ASKED).status == 500
        assert "the picture that it is tried out with does too" in becomes(server, 503).json["error"]["message"]
        pictures, failures = server.count("hidiff_pictures_total"), server.count("hidiff_failures_total", kind="engine")
        for _ in range(3):
            assert server.get("/health/ready").status == 503
        assert server.get("/health/live").status == 200
        assert caplog.text.count("The server is not ready any more") == 1
        backend.spoil = server.gate
        becomes(server, 200)
        assert server.count("hidiff_pictures_total") == pictures
        assert server.count("hidiff_failures_total", kind="engine") == failures == 1


def test_a_picture_that_is_made_shows_that_a_server_is_ready(tmp_path: Path) -> None:
    with serving(proven(tmp_path / "bundle")) as server:
        backend = server.host.worker.service.pipeline.bundle._engines.backend
        backend.spoil = spoilt
        assert server.post(ASKED).status == 500
        becomes(server, 503)  # and is tried out in a while, but for a request
        backend.spoil = server.gate
        assert server.post(ASKED).status == 200
        becomes(server, 200)


def test_a_request_that_fails_alone_leaves_the_server_ready(tmp_path: Path) -> None:
    tried = threading.Event()
    with serving(proven(tmp_path / "bundle")) as server:
        service = server.host.worker.service
        backend, real = service.pipeline.bundle._engines.backend, service.try_out

        def once(outputs: dict[str, np.ndarray], call: int) -> dict[str, np.ndarray]:
            backend.spoil = server.gate
            return spoilt(outputs, call)

        def try_out() -> None:
            real()
            tried.set()

        service.try_out = try_out  # type: ignore[method-assign]
        backend.spoil = once
        assert server.post(ASKED).status == 500
        assert tried.wait(PATIENCE)
        assert server.get("/health/ready").status == 200


def spoilt(outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
    return {name: array * np.nan for name, array in outputs.items()}


def test_ready_tells_which_bundle(server: Server) -> None:
    service = server.host.worker.service
    assert server.get("/health/ready").json == {"status": "ready", "bundle": service.bundle_hash}


def test_metrics_are_all_there_from_the_start(server: Server) -> None:
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    shown = set(re.findall(r"^# TYPE (\S+) (\S+)$", answer.body.decode(), re.MULTILINE))
    assert {(metric.name, metric.kind) for metric in METRICS} <= shown
    service = server.host.worker.service
    labels = {"bundle": service.bundle_hash, "parity": service.parity_hash, "backend": "toy"}
    assert server.count("hidiff_parity_info", **labels) == 1
    assert server.count("hidiff_parity_info", **{**labels, "parity": "0"}) == 0
    assert 'hidiff_pictures_total{size="64x48"} ' in answer.body.decode()


def test_metrics_count_steps_by_their_phase(server: Server) -> None:
    before = server.count("hidiff_step_seconds_count", phase="windowed")
    server.post({"prompt": PROMPT, "steps": 4})
    assert server.count("hidiff_step_seconds_count", phase="windowed") == before + 2
    assert server.count("hidiff_step_seconds_count", phase="windowed", size="64x48") == before + 2
    assert server.count("hidiff_step_seconds_count", size="48x64") == 0
    assert server.count("hidiff_request_seconds_count", size="64x48") >= 1


def test_the_page_runs_its_own_script_and_style_alone(server: Server) -> None:
    answer = server.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    text = answer.body.decode()
    for tag in ("script", "style"):
        (part,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"https?:|<link (?!rel=\"icon\" href=\"data:,\")|\son\w+=| style=", text)


def test_every_field_of_the_page_has_a_label(server: Server) -> None:
    text = server.get("/").body.decode()
    fields = set(re.findall(r"<(?:input|textarea|select) id=\"([^\"]+)\"", text))
    labelled = set(re.findall(r"<label for=\"([^\"]+)\"", text))
    wrapped = set(re.findall(r"<label[^>]*><input id=\"([^\"]+)\"", text))
    assert len(fields) >= 10
    assert fields == labelled | wrapped
