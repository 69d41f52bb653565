"""Work in a process of its own, for libraries that keep state, take memory that they do not give back, or get killed.

The parent writes a request as one line of JSON to the child's standard input and keeps it open: a further line, or its
end, cancels. Events come back as lines of JSON on standard output: any number of ``progress``, then the answer. In a
`Conversation` each further line is a further request, with one answer.

Needs the standard library alone: a child may be another interpreter, which has nothing of this project's.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

SHOWN_LETTERS = 600
"""Of what a child printed, for messages: the last that it said."""

Progress = Callable[[float, str], None]
"""Called with the part that is done, 0 to 1, and what is being done."""


class Channel:
    """The child's pipes to its parent. Whatever a library prints goes to standard error instead."""

    def __init__(self) -> None:
        self._events = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._requests = sys.stdin.fileno()

    def request(self) -> dict[str, Any]:
        """Waits for the parent's request, or the next of a conversation. Ends the process where the parent is gone."""
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(self._requests, 1 << 16)
            if not part:
                raise SystemExit(1)
            line += part
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, event: str, **values: Any) -> None:
        """Sends an event."""
        _write(self._events, {"event": event, **values})

    def cancelled(self) -> bool:
        """Tells whether the parent cancelled, or is gone."""
        ready, _, _ = select.select([self._requests], [], [], 0)
        return bool(ready)


@dataclass(frozen=True)
class Ended:
    """A child that has ended.

    Args:
        answer: its last event; empty where there is none.
        code: its exit code, of a signal less than 0.
        words: the end of what it printed.
    """

    answer: dict[str, Any]
    code: int
    words: str


def run_child(
    command: Sequence[str],
    request: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    progress: Progress = lambda _fraction, _note: None,
    patience: float = 0.0,
) -> Ended:
    """Runs Python with a command line, hands it a request, and waits for its end.

    Args:
        command: what follows ``python``, such as ``-m`` and a module.
        request: JSON types.
        environment: variables that it gets beside this process's own.
        progress: told how far the child is. If it raises, or this process is interrupted, the child is stopped.
        patience: seconds that a child has to stop by itself once it is cancelled, before it is killed.
    """
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, **environment},
        ) as process,
    ):
        try:
            answer = _converse(process, request, progress)
            process.wait()
        except BaseException:
            _stop(process, patience)
            raise
        said.seek(0)
        words = said.read().decode(errors="replace").strip()[-SHOWN_LETTERS:]
        return Ended(answer, process.returncode, words)


class Conversation:
    """A child that answers one request after another; see `conversation`.

    Args:
        process: with pipes at its standard input and output.
        said: what it prints.
    """

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        self._process = process
        self._said = said

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request; empty where the child has ended before it gave one.

        Raises:
            ValueError: what came is no JSON; the message has it.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _write(self._process.stdin.fileno(), request)
        except BrokenPipeError:
            return {}
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            return {}
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise ValueError(f"its answer is no JSON: {line[:SHOWN_LETTERS]!r}") from error
        return answer

    def ended(self) -> Ended:
        """Waits for the end of a child that gave no answer, and returns how it ended."""
        self._process.wait()
        self._said.seek(0)
        return Ended({}, self._process.returncode, self._said.read().decode(errors="replace").strip()[-SHOWN_LETTERS:])


@contextmanager
def conversation(
    command: Sequence[str], *, environment: Mapping[str, str], python: str = sys.executable
) -> Iterator[Conversation]:
    """Yields a child in a process group of its own, all of which is killed at the end.

    Args:
        command: what follows ``python``, such as ``-m`` and a module.
        environment: variables that it gets beside this process's own.
        python: the interpreter that it runs in.
    """
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [python, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, **environment},
            start_new_session=True,  # so that an interruption is this process's to handle, and ends what it started too
        ) as process,
    ):
        try:
            yield Conversation(process, said)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _converse(process: subprocess.Popen[bytes], request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Returns the last event of a child that closes its output."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _write(process.stdin.fileno(), request)
    except BrokenPipeError:
        return {}
    last: dict[str, Any] = {}
    for line in process.stdout:
        if not line.endswith(b"\n"):
            break  # half an event, of a child that was killed
        last = json.loads(line)
        if last["event"] == "progress":
            progress(last["fraction"], last["note"])
    return last


def _write(pipe: int, value: Mapping[str, Any]) -> None:
    """Writes a line of JSON; without a buffer, which would hold what a child that has ended did not take."""
    left = memoryview((json.dumps(value) + "\n").encode())
    while left:
        left = left[os.write(pipe, left) :]


def _stop(process: subprocess.Popen[bytes], patience: float) -> None:
    """Asks the child to stop by closing its input; kills it when it does not."""
    try:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(patience)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()  # nothing happens where it has ended
