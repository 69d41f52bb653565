"""One request and its events between two processes, and every way in which a child ends."""

from __future__ import annotations

import signal
import subprocess
import textwrap
from typing import Any

import pytest

from hidiff_export.child_process import SHOWN_LETTERS, Ended, conversation, run_child

OPEN = """
import os, signal, sys, time
from hidiff_export.child_process import Channel
channel = Channel()
request = channel.request()
"""


def run(text: str, request: dict[str, Any] | None = None, **options: Any) -> Ended:
    """Runs a child with a text of one's own."""
    return run_child(["-c", textwrap.dedent(text)], request or {}, environment={"GREETING": "hello"}, **options)


def test_request_progress_and_answer_cross_and_what_is_printed_is_kept_apart() -> None:
    long, seen = "x" * 300_000, []
    ended = run(
        OPEN + 'channel.send("progress", fraction=0.5, note="half")\n'
        'print("a library speaks", flush=True)\n'
        'channel.send("done", text=request["text"], greeting=os.environ["GREETING"], cancelled=channel.cancelled())',
        {"text": long},
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(0.5, "half")]
    assert ended == Ended(
        {"event": "done", "text": long, "greeting": "hello", "cancelled": False}, 0, "a library speaks"
    )


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("raise SystemExit('no such thing')", 1, "no such thing"),
        ("raise SystemExit(3)", 3, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os; os.close(0)", 0, ""),
        ("import sys; print('y' * 5000, file=sys.stderr)", 0, "y" * SHOWN_LETTERS),
    ],
)
def test_a_child_that_ends_before_it_reads_has_no_answer(text: str, code: int, words: str) -> None:
    """Its request is larger than a pipe holds, so that the parent is still writing."""
    assert run(text, {"text": "x" * 300_000}) == Ended({}, code, words)


def test_half_an_answer_is_none() -> None:
    last = 'channel.send("progress", fraction=0.1, note="n")\nos.write(channel._events, b\'{"event": "do\')'
    assert run(OPEN + last).answer["event"] == "progress"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started."""
    found: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return found


def interrupt(_fraction: float, _note: str) -> None:
    raise KeyboardInterrupt


WORKING = OPEN + 'channel.send("progress", fraction=0.0, note="working")\n'


def test_a_cancelled_child_may_stop_by_itself(started: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(
            WORKING + "while not channel.cancelled(): time.sleep(0.01)\nraise SystemExit(7)",
            progress=interrupt,
            patience=300,
        )
    assert started[0].returncode == 7


def test_a_child_that_does_not_stop_is_killed(started: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(WORKING + "time.sleep(600)", progress=interrupt)
    assert started[0].returncode == -signal.SIGKILL


def test_a_conversation_has_an_answer_to_each_request() -> None:
    text = OPEN + 'while True: channel.send("done", twice=2 * request["one"]); request = channel.request()'
    with conversation(["-c", text], environment={}) as talk:
        assert [talk.ask({"one": one})["twice"] for one in (1, 2, 3)] == [2, 4, 6]


def test_a_conversation_ends_with_the_child() -> None:
    text = OPEN + 'channel.send("done")\nprint("goodbye", flush=True)\nraise SystemExit(4)'
    with conversation(["-c", text], environment={}) as talk:
        assert talk.ask({}) == {"event": "done"}
        assert talk.ask({}) == {}
        assert talk.ended() == Ended({}, 4, "goodbye")
        assert talk.ask({"text": "x" * 300_000}) == {}


def test_a_conversation_with_something_else_is_told() -> None:
    with (
        conversation(["-c", "print('hello', flush=True); input()"], environment={}) as talk,
        pytest.raises(ValueError, match="no JSON: b'hello"),
    ):
        talk.ask({})


def test_the_child_of_a_conversation_is_killed_at_the_end(started: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(KeyboardInterrupt), conversation(["-c", OPEN + "time.sleep(600)"], environment={}):
        raise KeyboardInterrupt
    assert started[0].returncode == -signal.SIGKILL
