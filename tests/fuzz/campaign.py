"""Many mutations of one bundle, each played in a worker, and a table of what came of them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.mutations import Mutation, linked
from tests.fuzz.pool import Played, Pool
from tests.fuzz.strategies import kinds

MEMORY = 300 * 10**6
"""Bytes beyond the weights that playing a bundle may take."""

SECONDS = 10
"""That refusing a bundle may take on a machine that does nothing else."""

REFUSED, SAME, FAILS = "refused", "same pictures", "fails its check"
GOOD = (REFUSED, SAME, FAILS)
BAD = ("other picture", "another code", "traceback", "hang", "abort", "too much memory")


@dataclass(frozen=True)
class Case:
    """A mutation and what came of it.

    Args:
        mutation: that was made.
        played: what the worker told.
        outcome: one of `GOOD` or `BAD`.
    """

    mutation: Mutation
    played: Played
    outcome: str

    def __str__(self) -> str:
        return (
            f"{self.outcome}: {self.mutation.kind}, {self.mutation.what}\n{self.played.outcome}: {self.played.detail}"
        )


def judge(mutation: Mutation, played: Played, weights: int = 0) -> str:
    """What an outcome counts as.

    Args:
        weights: bytes that an engine may hold besides.
    """
    if played.peak > MEMORY + weights:
        return "too much memory"
    if played.outcome == "code 4" or (played.outcome == "code 5" and mutation.engine):
        return REFUSED
    return "another code" if played.outcome.startswith("code ") else played.outcome


def run(
    target: str,
    pristine: Path,
    scratch: Path,
    *,
    count: int,
    number: int = 0,
    only: Iterable[str] = (),
    progress: Callable[[int], object] = lambda _done: None,
) -> list[Case]:
    """Plays ``count`` mutations; the same ones for the same ``number``.

    Args:
        target: ``module:attribute`` of what plays bundles.
        pristine: the bundle that mutations are made of.
        scratch: a folder for copies of it, on the same disk.
        count: of mutations.
        number: of the random stream.
        only: kinds of mutations; all that the bundle has, if left out.
        progress: told how many were played, after each.
    """
    found = {name: kind for name, kind in kinds(pristine).items() if kind is not None}
    chosen = [kind for name, kind in found.items() if not only or name in only]
    weights = sum(path.stat().st_size for path in pristine.rglob("weights.safetensors"))
    cases: list[Case] = []
    with Pool(target, pristine) as pool:
        for place, kind in enumerate(chosen):
            share = count // len(chosen) + (place < count % len(chosen))

            @seed(number)
            @settings(
                max_examples=share,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(kind)
            def each(mutation: Mutation) -> None:
                folder = scratch / f"mutated-{len(cases)}"
                linked(pristine, folder)
                try:
                    mutation.apply(folder)
                    played = pool.play(folder)
                finally:
                    _remove(folder)
                outcome = judge(mutation, played, weights)
                cases.append(Case(replace(mutation, apply=_made), played, outcome))  # which may hold a whole file
                progress(len(cases))

            each()
    return cases


def table(cases: Iterable[Case]) -> str:
    """The outcomes of each kind, as Markdown."""
    listed = list(cases)
    counts = Counter((case.mutation.kind, case.outcome) for case in listed)
    columns = [*GOOD, *BAD]
    lines = ["| mutations of | tried | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for kind in dict.fromkeys(case.mutation.kind for case in listed):
        own = [counts[kind, column] for column in columns]
        lines.append(f"| {kind} | {sum(own)} | " + " | ".join(map(str, own)) + " |")
    total = [sum(case.outcome == column for case in listed) for column in columns]
    lines.append(f"| **all** | {len(listed)} | " + " | ".join(map(str, total)) + " |")
    return "\n".join(lines)


def _made(_folder: Path) -> None:
    """Nothing: the mutation was made."""


def _remove(folder: Path) -> None:
    for path in (folder, *folder.glob("*/")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)
