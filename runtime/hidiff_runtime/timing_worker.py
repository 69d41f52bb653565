"""The process that times backends: evaluates a bundle's timing graph with each in turn, and prints the seconds."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.bundle import open as open_bundle
from hidiff_runtime.errors import HidiffError
from hidiff_runtime.format.specs import GraphRecord

ROUNDS = 5
"""The most evaluations that are timed of a backend, after the first, which takes memory."""

ENOUGH = 6.0
"""Seconds of evaluating after which no further round begins. Where the first evaluations took so long, they have to
do: what taking memory adds is then little, and about the same for all."""


def main() -> None:
    """Reads a request from standard input and answers it on standard output; libraries print to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.load(sys.stdin)
    seconds, failed = measure(
        Path(request["bundle"]), request["backends"], request["options"], allow_links=request["allow_links"]
    )
    json.dump({"seconds": seconds, "failed": failed}, answers)
    answers.close()


def measure(
    bundle: Path, names: Sequence[str], options: Mapping[str, Any], *, allow_links: Sequence[str] = ()
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns the seconds that each backend takes for the timing graph, and what each said that failed.

    Backends are timed in turn, so that whatever else the machine does falls on all of them.
    """
    failed: dict[str, str] = {}
    sessions: dict[str, tuple[Session, GraphRecord]] = {}
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for name in names:
            try:
                opened = stack.enter_context(
                    open_bundle(bundle, backend=name, verify="size", allow_links=allow_links, **options)
                )
                sessions[name] = opened.timing_engine()
                first[name], times[name] = _evaluate(*sessions[name]), []
            except HidiffError as error:
                failed[name] = error.summary
        left = ENOUGH - sum(first.values())
        for _ in range(ROUNDS):
            if left <= 0:
                break
            for name in [name for name in times if name not in failed]:
                try:
                    times[name].append(_evaluate(*sessions[name]))
                    left -= times[name][-1]
                except HidiffError as error:
                    failed[name] = error.summary
    found = {name: times[name] or [first[name]] for name in times if name not in failed}
    return {name: median(seconds) for name, seconds in found.items()}, failed


def _evaluate(session: Session, record: GraphRecord) -> float:
    """Returns the seconds of an evaluation."""
    inputs = _inputs(record)
    started = time.perf_counter()
    session.run(inputs)
    return time.perf_counter() - started


def _inputs(record: GraphRecord) -> dict[str, NDArray[Any]]:
    """Returns an array for each input; what they hold does not change what is computed: noise, and no shift."""
    random = np.random.default_rng(0)
    return {
        spec.name: np.zeros(spec.shape, np.int32)
        if spec.dtype == "int32"
        else random.standard_normal(spec.shape).astype(np.float32)
        for spec in record.inputs
    }
