"""Which engines stay open below a memory limit, and in which order they leave."""

from __future__ import annotations

import math
from typing import Any

import pytest
from toy_sessions import Sessions, until

from hidiff_runtime import InputError
from hidiff_runtime.backends.memory_limit import EngineSize, MemoryLimit
from hidiff_runtime.backends.session_pool import SessionPool

SIZES = {"a": 4, "b": 3, "c": 2, "d": 5, "step": 1, "vae": 4, "text": 2}


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


def pool(sessions: Sessions, limit: int, *, prefetch: bool = False) -> SessionPool:
    allowed = MemoryLimit(limit, lambda name: EngineSize(SIZES[name]))
    return SessionPool(sessions, prefetch=prefetch, limit=allowed)  # type: ignore[arg-type]  # a double


def taken(events: list[str], start: str) -> list[str]:
    return [event.removeprefix(f"{start} ") for event in events if event.startswith(start)]


def test_a_file_that_all_sessions_map_counts_once() -> None:
    sizes = {name: EngineSize(1, {"store": 10}) for name in "ab"} | {"c": EngineSize(1, {"other": 5})}
    asked: list[str] = []

    def size_of(name: str) -> EngineSize:
        asked.append(name)
        return sizes[name]

    assert MemoryLimit(12, size_of).allows("ab")
    assert not MemoryLimit(11, size_of).allows("ab")
    del asked[:]
    limit = MemoryLimit(18, size_of)
    assert limit.allows("abc")
    assert limit.allows("abcabc")
    assert asked == ["a", "b", "c"]
    own = MemoryLimit(12, lambda _name: EngineSize(11))
    assert own.allows("a")
    assert not own.allows("ab")


@pytest.mark.parametrize("value", [0, -1, True, False, "6GiB", 1.5, 2e9, math.nan, math.inf, [1]], ids=repr)
def test_what_is_no_number_of_bytes_is_refused_with_what_to_give(value: Any) -> None:
    with pytest.raises(InputError, match="memory_limit must be a whole number of bytes") as caught:
        MemoryLimit(value, lambda _name: EngineSize(1))
    assert caught.value.given == repr(value)
    assert "--memory-limit 6GiB" in caught.value.advice


def test_it_does_not_go_with_all(sessions: Sessions) -> None:
    limit = MemoryLimit(1, lambda _name: EngineSize(1))
    with pytest.raises(InputError, match="memory_limit does not go with resident='all'"):
        SessionPool(sessions, "all", limit=limit)  # type: ignore[arg-type]  # a double


def test_those_used_longest_ago_leave_first_and_before_the_new_one_opens(sessions: Sessions) -> None:
    engines = pool(sessions, 9)
    for name in ("a", "b", "c", "a"):
        engines.get(name)
    assert sessions.events == ["open a", "open b", "open c"]
    engines.get("d")  # 5 beside 4 of the last one used
    assert sessions.events[3:] == ["close b", "close c", "open d"]
    assert engines.names == ("a", "d")
    engines.get("a")
    engines.get("c")
    assert sessions.events[6:] == ["close d", "open c"]
    engines.close()
    assert sorted(taken(sessions.events, "open")) == sorted(taken(sessions.events, "close"))


def test_no_more_leave_than_have_to(sessions: Sessions) -> None:
    engines = pool(sessions, 10)
    for name in ("a", "c", "b"):
        engines.get(name)
    engines.add("step")
    assert taken(sessions.events, "close") == []  # 10 of 10
    engines.get("text")
    assert taken(sessions.events, "close") == ["a"]


def test_what_runs_beside_a_phase_stays_though_it_was_used_longest_ago(sessions: Sessions) -> None:
    engines = pool(sessions, 7)
    engines.add("step")
    engines.get("b", ["step"])
    engines.get("c", ["step"])
    engines.get("a", ["step"])
    assert engines.names == ("step", "c", "a")
    engines.get("d", ["step"])
    assert engines.names == ("step", "d")
    engines.get("a")  # a phase without it
    assert engines.names == ("a",)


def test_what_runs_beside_a_phase_has_room_made_for_it_too(sessions: Sessions) -> None:
    engines = pool(sessions, 9)
    engines.get("b")
    engines.get("c")
    engines.get("a", ["d"])  # 9 of 9
    engines.add("d")
    assert sessions.events == ["open b", "open c", "open a", "close b", "close c", "open d"]


def test_a_limit_that_is_too_small_is_as_none() -> None:
    ways = []
    for limit in (1, None):
        noted = Sessions()
        allowed = None if limit is None else MemoryLimit(limit, lambda name: EngineSize(SIZES[name]))
        engines = SessionPool(noted, limit=allowed)  # type: ignore[arg-type]  # a double
        for phase in ("a", "b", "a", "c"):
            engines.get(phase, ["step"])
            engines.add("step")
        with engines.borrow("vae", ["a", "step"]):
            pass
        with engines.borrow("text", ["a", "step"]):
            engines.get("a", ["step"])
        engines.get("b", ["step"])
        ways.append(noted.events)
    assert ways[0] == ways[1]
    assert ways[0].count("open a") == 3


def test_a_network_stays_where_it_fits_and_is_never_closed_while_it_is_lent(sessions: Sessions) -> None:
    engines = pool(sessions, 9)
    with engines.borrow("text", ["a"]):
        engines.get("a")
        engines.get("b")
        assert taken(sessions.events, "close") == []  # 9 of 9
        engines.get("d")
        assert engines.names == ("text", "d")
    assert engines.names == ("text", "d")
    with engines.borrow("vae", ["d"]) as vae:
        assert vae.key == "vae"  # type: ignore[attr-defined]  # of the double
        assert engines.names == ("d", "vae")
    assert engines.names == ("d", "vae")
    with pytest.raises(ZeroDivisionError), engines.borrow("text", ["vae"]):
        raise ZeroDivisionError
    assert engines.names == ("vae", "text")


def test_a_network_that_took_too_much_is_closed_at_the_end(sessions: Sessions) -> None:
    engines = pool(sessions, 8)
    engines.get("d")
    with engines.borrow("vae", ["d"]):
        assert engines.names == ("d", "vae")  # 9: the next run begins with the one, and the other is needed
    assert engines.names == ("d",)


def test_an_engine_opens_ahead_where_there_is_room_beside_what_runs(sessions: Sessions) -> None:
    engines = pool(sessions, 10, prefetch=True)
    engines.get("b", ["step"])
    engines.add("step")
    engines.get("a", ["step"])  # 8
    engines.prefetch("d")  # 10 of 10, once the oldest has left
    assert engines.get("a", ["step"]) is engines.get("a", ["step"])
    engines.get("d", ["step"])
    assert sessions.threads["d"].startswith("hidiff-prefetch")
    assert sessions.events == ["open b", "open step", "open a", "close b", "open d"]
    engines.close()


def test_none_opens_ahead_without_room_and_what_is_open_stays(sessions: Sessions) -> None:
    engines = pool(sessions, 9, prefetch=True)
    engines.get("c")
    engines.get("a", ["step"])
    engines.prefetch("d")  # with the step engine that is still to come it would be 10
    engines.add("step")
    assert sessions.events == ["open c", "open a", "open step"]
    engines.get("d", ["step"])
    assert sessions.events[3:] == ["close c", "close a", "open d"]


def test_one_that_was_opened_ahead_counts_stays_where_it_can_and_leaves_first(sessions: Sessions) -> None:
    engines = pool(sessions, 9, prefetch=True)
    engines.get("a")
    engines.prefetch("b")
    engines.get("c")  # another phase than the one expected: 9 of 9
    assert taken(sessions.events, "close") == []
    engines.get("b")
    assert taken(sessions.events, "open").count("b") == 1
    engines.get("c")
    assert engines.names == ("a", "b", "c")
    engines.prefetch("d")
    until(sessions.events, "open d")
    engines.get("text")
    engines.get("a")  # nobody came for d
    assert taken(sessions.events, "close") == ["a", "b", "d"]
    engines.close()


def test_those_ahead_are_the_first_that_fit_and_the_first_of_all_leaves_last(sessions: Sessions) -> None:
    engines = pool(sessions, 10)
    engines.preload([("a", "step"), ("b", "step"), ("c", "step"), ("d", "step"), ("text",)])
    assert set(engines.names) == {"a", "step", "b", "c"}
    engines.get("text")
    assert set(engines.names) == {"a", "step", "b", "text"}
    engines.get("c")
    assert set(engines.names) == {"a", "step", "text", "c"}
    small = Sessions()
    pool(small, 1).preload([("a", "step"), ("b", "step")])
    assert small.events == ["open a", "open step"]
