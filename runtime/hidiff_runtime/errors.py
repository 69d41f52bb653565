"""Errors that say what is wrong, what was given and what to do next; each owns its exit code."""

from __future__ import annotations

from typing import ClassVar


class HidiffError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        summary: what is wrong, one sentence.
        given: what was found, shown as it is.
        advice: the next step to take.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, summary: str, *, given: object = None, advice: str = "") -> None:
        self.summary = summary
        self.given = given
        self.advice = advice
        super().__init__(summary)

    def __str__(self) -> str:
        lines = [self.summary]
        if self.given is not None:
            lines.append(f"  given: {self.given}")
        if self.advice:
            lines.append(f"  next:  {self.advice}")
        return "\n".join(lines)


class ParityError(HidiffError):
    """A measured error is beyond its bound."""

    exit_code = 1


class InputError(HidiffError):
    """A value handed to a command or to the denoiser is not one it takes."""

    exit_code = 2


class BundleError(HidiffError):
    """A bundle is broken, foreign, incomplete or of a newer format."""

    exit_code = 4


class EngineError(HidiffError):
    """A backend is missing, or its engine does not load or run."""

    exit_code = 5


class StorageError(HidiffError):
    """Writing failed: the disk is full, the folder is read-only, or another build holds it."""

    exit_code = 6


class RowsFailed(HidiffError):  # noqa: N818 - names the outcome
    """A job with many rows is done, and some of them failed."""

    exit_code = 7


class Cancelled(HidiffError):  # noqa: N818 - names the outcome, as asyncio and concurrent.futures do
    """A callback or Ctrl-C ended the run."""

    exit_code = 130


class Expired(Cancelled):
    """A server's deadline passed before the run ended."""

    def __init__(self, summary: str = "The deadline passed before the picture was made.", *, advice: str = "") -> None:
        super().__init__(summary, advice=advice)
