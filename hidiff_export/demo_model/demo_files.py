"""The demo model's files, each checked against the hash that it was published with before it is read."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from hidiff_export.errors import CheckpointError

DEMO_SOURCE = "demo"
"""What names the demo model as a recipe's source."""

_HOME = Path(__file__).parent
_HASHES = "files.json"
_MODEL, _CLASSIFIER, _PROMPTS = "model", "classifier", "prompts.txt"
_ADVICE = (
    "Install the package again: pip install --force-reinstall --no-deps hidiff-export, or in a clone "
    "git checkout hidiff_export/demo_model."
)


def demo_model() -> Path:
    """Returns the demo model's diffusers folder, which ``StableDiffusionPipeline.from_pretrained`` loads too.

    Raises:
        CheckpointError: a file is missing or is not what was published; the message tells both hashes.
    """
    return _checked(_HOME, _MODEL)


def demo_classifier() -> Path:
    """Returns the folder of the classifier that names the demo model's subjects.

    Raises what `demo_model` raises.
    """
    return _checked(_HOME, _CLASSIFIER)


def demo_prompts() -> Path:
    """Returns the file of a prompt for each subject, on a background that the model never saw it on.

    Raises what `demo_model` raises.
    """
    return _checked(_HOME, _PROMPTS)


@cache  # a build asks for it a dozen times
def _checked(home: Path, part: str) -> Path:
    """Returns a file or folder of ``home`` after reading all of it."""
    found = home / part
    for name, expected in _hashes(home).items():
        if name == part or name.startswith(f"{part}/"):
            _check(home / name, expected)
    return found


def _hashes(home: Path) -> dict[str, str]:
    path = home / _HASHES
    try:
        hashes: dict[str, str] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("The demo model is damaged.", given=f"{path}: {error}", advice=_ADVICE) from error
    return hashes


def _check(path: Path, expected: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            "The demo model is damaged: a file of it cannot be read.",
            given=f"{path}: {error.strerror}; expected SHA-256 {expected}",
            advice=_ADVICE,
        ) from error
    if found != expected:
        raise CheckpointError(
            "The demo model is damaged: a file of it is not the one that was published.",
            given=f"{path}: SHA-256 {found}, expected {expected}",
            advice=_ADVICE,
        )


def write_hashes(home: Path) -> None:
    """Writes the hashes of all that lies in ``home/model``, ``home/classifier`` and ``home/prompts.txt``."""
    parts = [home / _PROMPTS, *(path for part in (_MODEL, _CLASSIFIER) for path in (home / part).rglob("*"))]
    hashes = {
        path.relative_to(home).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(parts)
        if path.is_file()
    }
    (home / _HASHES).write_text(json.dumps(hashes, indent=1) + "\n", "utf-8")
