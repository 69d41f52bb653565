"""A process of its own in which backends are timed.

Libraries keep threads, memory and a GPU's context that this process may never need, and with OpenVINO's threads it
could not fork any more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hidiff_runtime.backend_choice import Measured
from hidiff_runtime.format.bundle_folder import LinksOption

SECONDS = 300.0
"""The longest that timing may take before the process is stopped."""

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from hidiff_runtime.timing_worker import main; main()"
)
"""Imports what is imported here: with -m, the current folder's modules would come first."""

_SHOWN_LETTERS = 300
"""Of what a process printed that gave no answer."""


def measure_in_process(
    bundle: Path, allow_links: LinksOption, options: Mapping[str, Any], names: Sequence[str]
) -> Measured:
    """Times backends in a process that ends with it.

    Args:
        bundle: its folder, whose files were verified.
        allow_links: folders that symbolic links in the bundle may lead into.
        options: of the backends.
        names: of the backends, the one to be preferred first.

    Returns:
        what it measured; where the process cannot be started, crashes or takes too long, each backend failed.
    """
    if not _is_python():
        return _all_failed(names, "this program has no Python to time it with")
    links = [allow_links] if isinstance(allow_links, str | Path) else allow_links
    request = {"bundle": str(bundle), "allow_links": [*map(str, links)], "options": options, "backends": [*names]}
    paths = json.dumps([str(Path(__file__).parents[1]), *map(str, sys.path)])
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-B", "-c", _START, paths],
            input=json.dumps(request, default=str),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _all_failed(names, str(error))
    try:
        answer = json.loads(ended.stdout)
        return Measured(answer["seconds"], answer["failed"])
    except (ValueError, KeyError, TypeError):
        words = ended.stderr.strip()[-_SHOWN_LETTERS:]
        return _all_failed(names, f"the process ended with code {ended.returncode} {words}".rstrip())


def _is_python() -> bool:
    """Returns whether there is an interpreter to start: not in a frozen program, nor in one that embeds Python."""
    executable = Path(sys.executable or "").name.lower()
    return executable.startswith(("python", "pypy")) and not getattr(sys, "frozen", False)


def _all_failed(names: Sequence[str], words: str) -> Measured:
    return Measured({}, dict.fromkeys(names, words))
