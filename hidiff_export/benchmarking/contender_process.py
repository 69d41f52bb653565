"""A contender, and its process as the measuring one sees it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_export.child_process import Conversation, conversation
from hidiff_runtime.format.forecast_record import Forecast

_PACKAGE = Path(__file__).parents[1]

_BY_FOLDER = """
import sys, types
package = types.ModuleType("hidiff_export")
package.__path__ = [sys.argv[1]]
sys.modules["hidiff_export"] = package
from hidiff_export.benchmarking.evaluation_worker import main
main()
"""
"""Imports this package by its folder alone, in an interpreter that must not see what else is installed beside it."""


@dataclass(frozen=True)
class Competitor:
    """What is measured, and what its row is called.

    Args:
        name: of its row, the only one of this name.
        kind: of evaluator, one of `evaluation_worker.EVALUATORS`.
        origin: what it is, for people.
        precision: that it computes in: ``float32``, ``bfloat16``, ``int8``, …
        hidiffusion: whether it computes phases; else the UNet as it was published.
        settings: of the evaluator, JSON types.
        python: the interpreter that it runs in.
        bundle: whether it is a bundle and not one of its peers.
        forecast: which evaluations of a run it computes; None for all.
    """

    name: str
    kind: str
    origin: str
    precision: str
    hidiffusion: bool
    settings: Mapping[str, Any]
    python: str = sys.executable
    bundle: bool = False
    forecast: Forecast | None = None


class ContenderFailed(Exception):  # noqa: N818 - a contender's end, which is a row and no error of the command
    """A contender is out of the running; the text says why."""


class ContenderProcess:
    """A started contender; whatever it is asked may raise `ContenderFailed`.

    Attributes:
        memory: the most bytes that its process held so far.
    """

    def __init__(self, talk: Conversation) -> None:
        self.memory = 0
        self._talk = talk

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer."""
        try:
            answer = self._talk.ask(request)
        except ValueError as error:  # something else than this project's loop answers
            raise ContenderFailed(str(error)) from error
        if answer.get("event") == "done":
            self.memory = answer["memory"]
            return answer
        if answer:
            raise ContenderFailed(answer["reason"])
        ended = self._talk.ended()
        killed = ended.code == -signal.SIGKILL
        how = "it was killed, as systems do when memory is short" if killed else f"it ended with code {ended.code}"
        raise ContenderFailed(": ".join(filter(None, (how, " ".join(ended.words.split())[-300:]))))


@contextmanager
def contender_process(one: Competitor, environment: Mapping[str, str]) -> Iterator[ContenderProcess]:
    """Yields a contender's process, which waits for what is asked first: to ``start``; killed at the end."""
    command = ["-m", "hidiff_export.benchmarking.evaluation_worker"]
    if one.python != sys.executable:
        command = ["-E", "-c", _BY_FOLDER, str(_PACKAGE)]  # -E: PYTHONPATH is this interpreter's
    with conversation(command, environment=environment, python=one.python) as talk:
        yield ContenderProcess(talk)
