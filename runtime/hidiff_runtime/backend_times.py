"""How long each backend takes for a bundle's timing graph on one machine: a file that is kept beside the bundle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hidiff_runtime.errors import HidiffError
from hidiff_runtime.format.atomic_write import atomic_write
from hidiff_runtime.format.codec import Fields, read_object
from hidiff_runtime.format.record_codec import decode, encode

_LOG = logging.getLogger(__name__)

FORMAT = 1
"""The format of the files; one of another is as none."""


@dataclass(frozen=True)
class BackendTimes:
    """What was measured.

    Args:
        measured_for: the bundle, the machine, the versions and the options, each as a text; of others it says nothing.
        seconds: of one evaluation of the timing graph, by backend.
        format: of the file.
    """

    measured_for: tuple[str, ...]
    seconds: Mapping[str, float]
    format: int = FORMAT


def read_times(bundle: Path, measured_for: Sequence[str]) -> BackendTimes | None:
    """Returns what was measured for a bundle under these circumstances, if it was; a broken file is as none."""
    for path in _places(bundle, measured_for):
        try:
            times = decode(BackendTimes, Fields(read_object(path, path.name, "A record of times"), path.name))
        except (HidiffError, OSError):
            continue
        if (times.format, times.measured_for) == (FORMAT, tuple(measured_for)):
            return times
    return None


def keep_times(bundle: Path, times: BackendTimes) -> Path | None:
    """Keeps what was measured where it can be written: beside the bundle, else in the user's cache.

    Returns:
        the file; None where neither can be written, so that the next process measures again.
    """
    for path in _places(bundle, times.measured_for):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write((json.dumps(encode(times), indent=1) + "\n").encode())
        except OSError as error:
            _LOG.debug("%s cannot be written: %s", path, error)
        else:
            return path
    return None


def _places(bundle: Path, measured_for: Sequence[str]) -> tuple[Path, ...]:
    """Returns where such a file may be, the best place first."""
    digest = hashlib.sha256(json.dumps([*measured_for]).encode()).hexdigest()[:16]
    name = f"fastest-{digest}.json"  # one for each machine that a bundle on a shared disk is opened on
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))  # noqa: PTH111 - never raises
    beside = bundle.with_name(f"{bundle.name}.cache") / name
    return (beside, cache / "hidiff-runtime" / name) if cache.is_absolute() else (beside,)
