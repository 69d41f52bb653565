"""No mutation of a bundle costs more than an error; and the fuzzer would tell if one did."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.campaign import BAD, FAILS, REFUSED, SAME, Case, judge, run, table
from tests.fuzz.faulty import MARK
from tests.fuzz.mutations import Mutation
from tests.fuzz.pool import ROOT, Pool
from tests.fuzz.strategies import kinds
from tests.fuzz.targets import make_toy

MUTATIONS = 120

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc"
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.mark.slow
def test_mutations_are_refused_or_change_nothing(pristine: Path, tmp_path: Path) -> None:
    cases = run("tests.fuzz.targets:toy_target", pristine, tmp_path, count=MUTATIONS)
    faults = [case for case in cases if case.outcome in BAD]
    assert not faults, "\n\n".join(map(str, faults))
    assert len(cases) == MUTATIONS
    counts = Counter(case.outcome for case in cases)
    assert counts[REFUSED] > counts[SAME] > 0
    assert {case.mutation.kind for case in cases} == {
        name for name, kind in kinds(pristine).items() if kind is not None
    }
    assert f"| **all** | {MUTATIONS} | {counts[REFUSED]} | {counts[SAME]} |" in table(cases)


PLANTED = {
    "refused": REFUSED,
    "near picture": SAME,
    "unproven": FAILS,
    "other picture": "other picture",
    "another code": "another code",
    "traceback": "traceback",
    "panic": "traceback",
    "abort": "abort",
    "memory": "too much memory",
}


def mutation(engine: bool = False) -> Mutation:
    return Mutation("planted", "a mark", lambda _: None, engine)


def test_what_no_bundle_may_bring_about_is_told(tmp_path: Path) -> None:
    (tmp_path / "pristine").mkdir()
    with Pool("tests.fuzz.faulty:target", tmp_path / "pristine") as pool:
        for mark, outcome in PLANTED.items():
            folder = tmp_path / mark
            folder.mkdir()
            (folder / MARK).write_text(mark)
            played = pool.play(folder)
            case = Case(mutation(), played, judge(mutation(), played))
            assert case.outcome == outcome, str(case)


def test_a_hang_is_told_and_the_next_bundle_played(tmp_path: Path) -> None:
    for mark in ("hang", "other picture"):
        (tmp_path / mark).mkdir()
        (tmp_path / mark / MARK).write_text(mark)
    (tmp_path / "pristine").mkdir()
    with Pool("tests.fuzz.faulty:target", tmp_path / "pristine", patience=2) as pool:
        assert pool.play(tmp_path / "hang").outcome == "hang"
    with Pool("tests.fuzz.faulty:target", tmp_path / "pristine") as pool:
        assert pool.play(tmp_path / "other picture").outcome == "other picture"


def test_engines_may_be_refused_by_whoever_runs_them(tmp_path: Path) -> None:
    (tmp_path / "pristine").mkdir()
    with Pool("tests.fuzz.faulty:target", tmp_path / "pristine") as pool:
        played = pool.play(tmp_path / "pristine")
    refused = type(played)("code 5", "")
    assert judge(mutation(engine=True), refused) == REFUSED
    assert judge(mutation(), refused) == "another code"
    assert judge(mutation(), played) == SAME
    assert judge(mutation(), type(played)("same pictures", "", peak=301 * 10**6)) == "too much memory"
    assert judge(mutation(), type(played)("same pictures", "", peak=301 * 10**6), weights=10**7) == SAME


@pytest.mark.slow
def test_the_command_runs_as_it_is_shown() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--mutations", "9"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| **all** | 9 |" in done.stdout
