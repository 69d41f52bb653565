"""Builds that are killed: before one of the things that they do to the disk, or after a time; then they go on.

By hand, ``python -m tests.export.compiler.killing FOLDER --kills 20 --seed 0`` kills builds of a small recipe at random
moments and compares what they come to with a build that nobody disturbed.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from hidiff_runtime.format.manifest import MANIFEST, Manifest

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
_SMALL = (
    *("width=64", "height=64", "guidance=false", "sampler=[ddim, dpmpp_2m]", "steps=1-5", "text=false", "vae=false"),
    "hidiffusion.thresholds.strided=1.0",
)


def killed(work: Callable[[], None], *, event: int | None = None, seconds: float | None = None) -> bool:
    """Does ``work`` in a child process, which is killed; whether that was before it was done.

    Args:
        event: killed when about to make, rename or delete the file of this number, from 0.
        seconds: killed after this time.
    """
    child = os.fork()
    if child == 0:
        try:
            if event is not None:
                _kill_at(event)
            work()
        except BaseException as error:  # whatever happened is told by the exit code
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    ended, status = 0, 0
    if seconds is not None:
        until = time.monotonic() + seconds
        while not ended and time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.005)
        if not ended:
            os.kill(child, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the work ended with {code}")
    return code != 0


def _kill_at(number: int) -> None:
    left = number

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in _CHANGES and not (event == "open" and _writes(arguments)):
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(watch)


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, mode, flags = arguments
    return not isinstance(path, int) and (set(mode or "") & set("wax+") or flags & os.O_CREAT) != 0


def different(one: Path, other: Path) -> list[str]:
    """The files of two folders that are not in both, or not byte for byte the same."""
    names = {path.relative_to(folder).as_posix() for folder in (one, other) for path in folder.rglob("*")}
    return sorted(
        name
        for name in names
        if not ((one / name).exists() and (other / name).exists())
        or ((one / name).is_file() and not filecmp.cmp(one / name, other / name, shallow=False))
    )


class _NoDisplay:
    """Shows nothing but notices."""

    def stage(self, _title: str, *, reused: bool) -> AbstractContextManager[Any]:  # noqa: ARG002 - the protocol's
        return nullcontext(lambda _done, _total, _note: None)

    def notice(self, text: str) -> None:
        sys.stderr.write(f"note: {text}\n")


def kill_builds(
    folder: Path, kills: int, seed: int, *, events: int | None = None, like: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Kills builds in ``folder`` and lets them go on until they are done; a dictionary for each that came to its end.

    Args:
        kills: how many, of as many builds as it takes.
        seed: of the moments.
        events: killed within so many things done to the disk, not at a time.
        like: a bundle that nobody disturbed, whose recipe is built; None builds one of a small recipe first.
    """
    from hidiff_export.compiler.compile import build
    from hidiff_export.compiler.stages import order  # noqa: F401 - before the fork, for the time
    from hidiff_export.recipe import Recipe

    recipe = Recipe.load("tiny", _SMALL) if like is None else Recipe.from_dict(Manifest.read(like).recipe)
    output, whole = folder / "killed", like or folder / "undisturbed"
    chance = random.Random(seed)
    began = time.monotonic()
    if like is None:
        assert not killed(lambda: _done(build(recipe, whole, _NoDisplay())))
    duration, left, moments = time.monotonic() - began, kills, []
    while left:
        event = None if events is None else chance.randrange(events)
        seconds = None if events is not None else chance.uniform(0, duration)
        was = killed(lambda: _done(build(recipe, output, _NoDisplay())), event=event, seconds=seconds)
        left -= was
        if was:
            moments.append(event if seconds is None else round(seconds, 2))
        if not was or not left:
            if not (output / MANIFEST).exists():
                assert not killed(lambda: _done(build(recipe, output, _NoDisplay())))
            _bring_to_end(output)
            beside = sorted(path.name for path in folder.iterdir())
            yield {"killed_at": moments, "different": different(output, whole), "beside": beside}
            shutil.rmtree(output)
            moments = []


def _done(_result: object) -> None:
    """Takes what work gives, which a child process cannot hand over."""


def _bring_to_end(output: Path) -> None:
    """What the next command does with a build that was killed when its bundle had its name already."""
    from hidiff_export.compiler.workspace import Workspace
    from hidiff_export.errors import BundleError

    with suppress(BundleError), Workspace(output):
        raise AssertionError("there is no bundle")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", type=int, help="within so many things done to the disk, not at times")
    parser.add_argument("--like", type=Path, help="a bundle whose recipe is built, and that is to come out")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for found in kill_builds(**vars(options)):
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
