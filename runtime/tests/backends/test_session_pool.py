"""The order in which engines open and close: one phase at a time, plans of several phases, the next one ahead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from toy_sessions import Session, Sessions, until

from hidiff_runtime import Cancelled, EngineError, StepInfo
from hidiff_runtime import open as open_bundle
from hidiff_runtime.backends import session_pool
from hidiff_runtime.backends.session_pool import SessionPool

STRIDED, POOLED, WINDOWED, CONTROLLED = "strided", "pooled", "windowed", "strided-control"
STEP, CONTROLNET = "step", "controlnet"


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


def pool(sessions: Callable[[str], Session], resident: str = "current") -> SessionPool:
    """A pool that prefetches."""
    return SessionPool(sessions, resident, prefetch=True)


def test_the_step_graph_stays_beside_every_phase(sessions: Sessions) -> None:
    engines = pool(sessions)
    engines.add(STEP)
    engines.get(STRIDED, [STEP])
    engines.get(WINDOWED, [STEP])
    assert engines.add(STEP) is engines.add(STEP)
    assert sessions.events == ["open step", "open strided", "close strided", "open windowed"]
    assert engines.names == (STEP, WINDOWED)
    engines.close()
    assert sessions.events[4:] == ["close step", "close windowed"]


def test_the_next_engine_opens_in_a_thread_while_the_current_one_runs(sessions: Sessions) -> None:
    sessions.hold[WINDOWED] = threading.Event()
    engines = pool(sessions)
    current = engines.get(STRIDED)
    engines.prefetch(WINDOWED)
    engines.prefetch(WINDOWED)
    assert engines.get(STRIDED) is current
    assert sessions.events == ["open strided"]
    assert engines.names == (STRIDED,)
    sessions.hold[WINDOWED].set()
    engines.get(WINDOWED)
    assert sessions.events == ["open strided", "open windowed", "close strided"]
    assert sessions.threads["windowed"].startswith("hidiff-prefetch")
    assert sessions.threads["strided"] == threading.current_thread().name
    engines.prefetch(WINDOWED)
    engines.close()
    assert sessions.events[3:] == ["close windowed"]


def test_an_expected_phase_that_does_not_come_is_closed(sessions: Sessions) -> None:
    engines = pool(sessions)
    engines.get(STRIDED)
    engines.prefetch(POOLED)
    until(sessions.events, "open pooled")
    engines.get(WINDOWED)
    assert sessions.events == ["open strided", "open pooled", "close pooled", "close strided", "open windowed"]


def test_what_went_wrong_in_the_thread_is_raised_when_the_phase_is_asked_for(sessions: Sessions) -> None:
    sessions.broken[WINDOWED] = EngineError("It does not load.")
    engines = pool(sessions)
    engines.get(STRIDED)
    engines.prefetch(WINDOWED)
    engines.get(STRIDED)
    with pytest.raises(EngineError, match="does not load"):
        engines.get(WINDOWED)
    engines.get(WINDOWED)
    assert sessions.events == ["open strided", "close strided", "open windowed"]
    sessions.broken[POOLED] = EngineError("It does not load.")
    engines.prefetch(POOLED)
    engines.close()  # nobody asked for it


def test_closing_waits_for_an_engine_on_its_way(sessions: Sessions) -> None:
    gate = sessions.hold[WINDOWED] = threading.Event()
    engines = pool(sessions)
    engines.get(STRIDED)
    engines.prefetch(WINDOWED)
    threading.Timer(0.05, gate.set).start()
    engines.close()
    assert sorted(sessions.events) == ["close strided", "close windowed", "open strided", "open windowed"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hidiff-prefetch")]
    engines.get(STRIDED)
    assert engines.names == (STRIDED,)


def test_nothing_opens_ahead_unless_asked(sessions: Sessions) -> None:
    engines = SessionPool(sessions)  # type: ignore[arg-type]  # a double
    engines.get(STRIDED)
    engines.prefetch(WINDOWED)
    engines.close()
    assert sessions.events == ["open strided", "close strided"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "bundle", toy.Toy(reference=False))


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_run_opens_each_phase_once_ahead_or_not(folder: Path, prefetch: bool) -> None:
    backend = toy.ToyBackend()
    given: dict[str, Any] = {**toy.Toy().given(), "steps": 8, "seed": 1, "guidance_scale": 3.0}

    def cancel(info: StepInfo) -> bool:
        """In the second phase, with the third on its way."""
        if info.step == 2 and prefetch:
            until(backend.events, "open windowed", first)
        return info.step < 2

    with open_bundle(folder, backend=backend, verify="size", prefetch=prefetch) as bundle:
        bundle.denoiser().denoise(**given)
        first = len(backend.events)
        with pytest.raises(Cancelled):
            bundle.denoiser().denoise(**given, callback=cancel)
    opened = ["strided_pooled", "strided", "windowed", "strided_pooled", "strided"]
    found = [event.removeprefix("open ") for event in backend.events if event.startswith("open")]
    closed = [event.removeprefix("close ") for event in backend.events if event.startswith("close")]
    assert found == ([*opened, "windowed"] if prefetch else opened)
    assert sorted(closed) == sorted(found)
    ahead = backend.events.index("open strided") < backend.events.index("close strided_pooled")
    assert ahead == prefetch


def test_what_the_next_run_does_not_begin_with_is_closed_before_a_network_opens() -> None:
    sessions = Sessions()
    pool = SessionPool(sessions)
    pool.get(CONTROLLED, [STEP, CONTROLNET])
    pool.add(CONTROLNET)
    pool.add(STEP)
    pool.get(WINDOWED, [STEP])
    assert pool.names == (STEP, WINDOWED)
    del sessions.events[:]
    with pool.borrow("vae_decoder", [STRIDED, STEP]) as decoder:
        assert decoder.key == "vae_decoder"
    assert sessions.events == ["close windowed", "open vae_decoder", "close vae_decoder"]


def test_what_the_next_run_begins_with_stays_while_a_network_is_lent() -> None:
    sessions = Sessions()
    pool = SessionPool(sessions)
    pool.get(STRIDED)
    with pool.borrow("vae_decoder", [STRIDED]):
        assert pool.names == (STRIDED, "vae_decoder")
        pool.get(WINDOWED)
        assert "close vae_decoder" not in sessions.events  # what is lent is not the pool's to close
    assert sessions.events[-1] == "close vae_decoder"


def test_a_network_is_closed_after_a_failure_and_stays_where_all_may() -> None:
    sessions = Sessions()
    with pytest.raises(ZeroDivisionError), SessionPool(sessions).borrow("text_encoder", [STRIDED]):
        raise ZeroDivisionError
    assert sessions.events == ["open text_encoder", "close text_encoder"]
    pool = SessionPool(sessions, "all")
    pool.get(WINDOWED)
    with pool.borrow("text_encoder", [STRIDED]) as first:
        assert pool.names == (WINDOWED, "text_encoder")
    with pool.borrow("text_encoder", [STRIDED]) as second:
        assert second is first
    pool.close()
    assert sessions.events[2:] == ["open windowed", "open text_encoder", "close windowed", "close text_encoder"]


def test_memory_of_an_engine_that_is_closed_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[tuple[str, ...]] = []
    sessions: dict[str, Any] = {name: contextlib.nullcontext() for name in ("a", "b")}
    engines = SessionPool(sessions.__getitem__)
    monkeypatch.setattr(session_pool, "trim_heap", lambda: given_back.append(engines.names))
    engines.get("a")
    assert given_back == []
    engines.get("b")
    assert given_back == [()]
    engines.close()
    assert given_back == [(), ()]
