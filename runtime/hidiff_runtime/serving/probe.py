"""Says whether every model of a server still lives: ``python -m hidiff_runtime.serving.probe URL --older-than 30``.

Each model's process sets ``hidiff_heartbeat_seconds`` every few seconds. A server goes on to call itself ready when
such a process was killed, so a liveness probe has to look at the heartbeat. Some processes beat before the bundle is
proven, and ``hidiff_parity_info`` says that it is. The standard library is all it takes.
"""

from __future__ import annotations

import argparse
import http.client
import math
import re
import sys
import time
import urllib.request
from collections.abc import Sequence

from hidiff_runtime.serving.metrics import HEARTBEAT, PARITY

LIVES, LIVES_NOT = 0, 1
"""Exit codes: everything else a container platform takes for a failed probe too."""

_LARGEST = 16 * 2**20
_PROVEN = re.compile(rf"^{PARITY.name}\{{", re.MULTILINE)
_BEAT = re.compile(rf"^{HEARTBEAT.name}(?P<labels>\{{.*\}})?[ \t]+(?P<value>\S+)(?:[ \t]+-?\d+)?[ \t]*$", re.MULTILINE)


def beats(text: str) -> dict[str, float]:
    """Returns every heartbeat in a page of metrics: its labels as they are written, and its Unix time.

    Raises:
        ValueError: a value is not a number.
    """
    return {found["labels"] or "": float(found["value"]) for found in _BEAT.finditer(text)}


def probe_result(text: str, now: float, older_than: float) -> tuple[int, str]:
    """Returns whether all heartbeats in a page of metrics are young enough: the exit code, and a line that says why.

    Args:
        now: Unix time.
        older_than: seconds; the oldest heartbeat counts, so that one model does not hide another's end.
    """
    try:
        times = beats(text)
    except ValueError as error:
        return LIVES_NOT, f"not alive: a heartbeat is not a number ({error})"
    if not times:
        return LIVES_NOT, f"not alive: there is no {HEARTBEAT.name}; no model of hidiff was loaded yet, or ever"
    if not _PROVEN.search(text):
        return LIVES_NOT, f"not alive: there is no {PARITY.name}; the bundle is still being opened and proven"
    labels, oldest = min(times.items(), key=lambda beat: -math.inf if math.isnan(beat[1]) else beat[1])
    age = now - oldest
    if not age <= older_than:  # not a number is not alive either
        return LIVES_NOT, f"not alive: {HEARTBEAT.name}{labels} is {age:.0f} s old, more than {older_than:g} s"
    return LIVES, f"alive: the oldest of {len(times)} heartbeats is {max(age, 0):.0f} s old"


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the page and prints one line. Returns 0 where all models live, and 1 otherwise."""
    parser = argparse.ArgumentParser(
        "python -m hidiff_runtime.serving.probe",
        description="Exit code 0 where a bundle was proven and every model said of late that it lives, 1 otherwise.",
    )
    parser.add_argument("url", metavar="URL", help="of the metrics, such as http://127.0.0.1:8002/metrics")
    parser.add_argument("--older-than", metavar="SECONDS", type=float, default=30.0, help="too old (default: 30)")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=5.0, help="to wait for it (default: 5)")
    options = parser.parse_args(arguments)
    try:
        with urllib.request.urlopen(options.url, timeout=options.timeout) as answer:
            text = answer.read(_LARGEST).decode(errors="replace")
    except (OSError, ValueError, http.client.HTTPException) as error:
        code, line = LIVES_NOT, f"not alive: {options.url} does not answer ({error})"
    else:
        code, line = probe_result(text, time.time(), options.older_than)
    encoding = sys.stdout.encoding or "utf-8"  # which may be ASCII, and a label's name need not be
    sys.stdout.write(f"{line}\n".encode(encoding, "backslashreplace").decode(encoding))
    return code


if __name__ == "__main__":
    sys.exit(main())
