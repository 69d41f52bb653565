"""Pages of mapped files, given back to the system while a library reads through them."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_DONTNEED = 4
"""Linux' ``MADV_DONTNEED``."""

_PERIOD = 0.05
"""Seconds between two times: a library that repacks weights reads a few hundred megabytes meanwhile."""

_MAPS = Path("/proc/self/maps")


@contextmanager
def released_pages(files: Sequence[Path]) -> Iterator[None]:
    """Keeps what this process maps of files out of its memory as far as can be, as long as the context lasts.

    A library that copies mapped weights otherwise holds them twice: as copies, and as pages of the file. The file's
    pages stay in the system's cache, so that one who reads them again finds them there. Does nothing except on Linux.
    """
    if sys.platform != "linux":
        yield
        return
    names = {str(path.resolve()) for path in files}
    ended = threading.Event()

    def release_all_the_while() -> None:
        while not ended.wait(_PERIOD):
            _release(names)

    thread = threading.Thread(target=release_all_the_while, name="released-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _release(names)


def _release(names: set[str]) -> None:
    """Lets go of all pages of these files that are mapped for reading and shared, which are the files' own."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        span, mode, _, _, _, *name = line.split(maxsplit=5)
        if mode == "r--s" and name and name[0] in names:
            first, last = (int(number, 16) for number in span.split("-"))
            advise(first, last - first, _DONTNEED)
