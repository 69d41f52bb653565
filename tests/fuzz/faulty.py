"""Targets that do what no bundle may bring about, each where a mark lies in the folder: whether the fuzzer tells."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from hidiff_runtime.errors import BundleError, InputError
from tests.fuzz.targets import Unproven

MARK = "mark"


class Faulty:
    """Does what the mark says; draws one grey picture where there is none."""

    def play(self, folder: Path) -> dict[str, np.ndarray]:
        """A picture, or whatever goes wrong."""
        mark = folder / MARK
        grey = 128
        if mark.exists():
            grey += self._act(mark.read_text())
        return {"plain": np.full((1, 8, 8, 3), grey, np.uint8)}

    def _act(self, mark: str) -> int:
        if mark == "traceback":
            raise KeyError("planted")
        if mark == "panic":
            raise _Panic
        if mark == "hang":
            threading.Event().wait()
        if mark == "abort":
            os.abort()
        if mark == "memory":
            np.ones(400 * 10**6, np.uint8)
        if mark == "refused":
            raise BundleError("planted")
        if mark == "another code":
            raise InputError("planted")
        if mark == "unproven":
            raise Unproven("planted")
        return {"other picture": 2, "near picture": 1}.get(mark, 0)


class _Panic(BaseException):
    """No Exception."""


def target() -> Faulty:
    """The one."""
    return Faulty()
