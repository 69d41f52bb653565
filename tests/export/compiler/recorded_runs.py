"""Bundles that several processes of the tests share, and what `check` finds of their recorded runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from hidiff_export.compiler.compile import build
from hidiff_export.recipe import Recipe
from hidiff_runtime import check
from hidiff_runtime.format.manifest import MANIFEST
from hidiff_runtime.verification.comparison import Verdict
from tests.conftest import NoDisplay


def built_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str, name: str, changes: Sequence[str]) -> Path:
    """The tiny recipe's bundle with these changes; copy it before changing it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            build(Recipe.load("tiny", changes), folder, NoDisplay())
    return folder


def runs(bundle: Path) -> list[Verdict]:
    """The verdicts on whole runs: after each step, and at the end."""
    return [verdict for verdict in check(bundle).verdicts if verdict.boundary.startswith("latents")]
