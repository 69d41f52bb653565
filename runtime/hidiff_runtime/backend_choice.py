"""Which backend runs a bundle: the one that is named, or else the fastest that is here."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_runtime import backends
from hidiff_runtime.backend_times import BackendTimes, keep_times, read_times
from hidiff_runtime.backends.processor_cores import usable_cores
from hidiff_runtime.backends.processor_model import processor_model
from hidiff_runtime.backends.protocol import Availability, Backend
from hidiff_runtime.errors import InputError
from hidiff_runtime.format.manifest import Contents

_LOG = logging.getLogger(__name__)

CLOSE = 0.97
"""A backend takes the place of one that is preferred where its time is at most this part of the other's: two
measurements of one engine differ by so much."""

Measure = Callable[[Sequence[str]], "Measured"]


@dataclass(frozen=True)
class Measured:
    """What came of timing backends.

    Args:
        seconds: of one evaluation of the timing graph, by backend; without those that failed.
        failed: what each that failed said.
    """

    seconds: Mapping[str, float]
    failed: Mapping[str, str]


@dataclass(frozen=True)
class BackendChoice:
    """Which backend runs a bundle, and why.

    Args:
        backend: that was chosen.
        reason: a sentence without its end.
    """

    backend: Backend
    reason: str


def choose(
    bundle: Path,
    contents: Contents,
    wanted: str | Backend | None,
    options: Mapping[str, Any],
    measure: Measure | None = None,
) -> BackendChoice:
    """Returns the backend to use: it has an engine for every graph, and it can run here.

    Args:
        bundle: its folder.
        contents: of its manifest.
        wanted: a backend or its name; None for the fastest that is here and takes the options.
        options: of the backend.
        measure: times backends by name where that was not done yet; without it the first of them is chosen then.

    Raises:
        BundleError: the bundle has no engines of a backend that is known, or not one for each of its graphs.
        EngineError: the backend cannot run here.
        InputError: there is no such backend, or the bundle has no engines of it.
    """
    if wanted is not None:
        return BackendChoice(backends.named(contents, wanted), "it was named")
    known = backends.known(contents)
    if len(known) == 1:
        return BackendChoice(backends.named(contents, known[0]), "the bundle has engines of no other")
    found = [(backend, backend.available()) for backend in known]
    here = [(backend, availability) for backend, availability in found if availability.usable]
    if not here:
        backends.check_usable(*found[0])
    if len(here) == 1:
        return BackendChoice(here[0][0], "of those that the bundle has engines of, no other can run here")
    fitting = [(backend, availability) for backend, availability in here if _takes(backend, options)]
    if len(fitting) < 2:  # none: what the first one says of the options is an error as good as any
        backend, _ = fitting[0] if fitting else here[0]
        return BackendChoice(backend, f"no other that can run here takes {', '.join(sorted(options))}")
    return _fastest(bundle, contents, fitting, options, measure)


def _fastest(
    bundle: Path,
    contents: Contents,
    fitting: Sequence[tuple[Backend, Availability]],
    options: Mapping[str, Any],
    measure: Measure | None,
) -> BackendChoice:
    """Returns the backend that takes the least time for the timing graph, measured now or before."""
    first = fitting[0][0]
    timing = contents.shared.timing
    names = [backend.name for backend, _ in fitting]
    if timing is None or any(name not in timing.engines for name in names):
        return BackendChoice(first, "the first that can run here: the bundle is from before backends were timed")
    circumstances = _circumstances(contents, [availability for _, availability in fitting], options)
    times = read_times(bundle, circumstances)
    if times is None or set(times.seconds) != set(names):
        if measure is None:
            return BackendChoice(first, "the first that can run here, until opening the bundle has timed them")
        _LOG.info(
            "Timing %s on this machine, once. --backend NAME (backend= in Python) skips that.", " and ".join(names)
        )
        measured = measure(names)
        if not measured.seconds:
            return BackendChoice(first, f"the first that can run here: timing failed ({_told(measured.failed)})")
        times = BackendTimes(tuple(circumstances), measured.seconds)
        place = None if measured.failed else keep_times(bundle, times)
        chosen = _decided(fitting, times, measured.failed)
        kept = "not kept" if place is None else f"kept in {place}"
        _LOG.info("%s: %s; %s", chosen.backend.name, chosen.reason, kept)
        return chosen
    return _decided(fitting, times, {})


def _decided(
    fitting: Sequence[tuple[Backend, Availability]], times: BackendTimes, failed: Mapping[str, str]
) -> BackendChoice:
    timed = [backend for backend, _ in fitting if backend.name in times.seconds]
    best = timed[0]
    for backend in timed[1:]:
        if times.seconds[backend.name] < CLOSE * times.seconds[best.name]:
            best = backend
    told = ", ".join(f"{backend.name} {times.seconds[backend.name]:.3g} s" for backend in timed)
    more = f"; {_told(failed)}" if failed else ""
    return BackendChoice(best, f"the fastest here: the first layers of a phase take {told}{more}")


def _circumstances(contents: Contents, found: Sequence[Availability], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns all that times depend on."""
    given = json.dumps({name: str(value) for name, value in options.items()}, sort_keys=True)
    details = (availability.detail for availability in found)
    return contents.digest, processor_model(), f"{usable_cores()} cores", *details, given


def _takes(backend: Backend, options: Mapping[str, Any]) -> bool:
    try:
        backend.device(options)
    except InputError:
        return False
    return True


def _told(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {words}" for name, words in failed.items())
