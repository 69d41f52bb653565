"""Plays many mutations of a bundle, and prints a table of what came of them.

    python -m tests.fuzz --mutations 3000                # of the toy that the tests have
    python -m tests.fuzz --bundle demo-bundle --mutations 300

Exit code 1 where one of them ended otherwise than refused, with the same pictures, or by failing its own check.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.campaign import BAD, run, table

TESTS = Path(__file__).parents[2] / "runtime/tests"
"""Where the toy is; pytest's settings say so to tests."""


def main() -> int:
    """Plays and prints; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--mutations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="a kind of mutations; may be given again")
    parser.add_argument("--bundle", type=Path, help="a bundle with pictures and samples (default: the tests' toy)")
    parser.add_argument("--faults", type=Path, help="a file for what was found")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from tests.fuzz.targets import make_toy

    with tempfile.TemporaryDirectory(dir=None if options.bundle is None else options.bundle.absolute().parent) as home:
        pristine = options.bundle or make_toy(Path(home, "toy"))
        target = "tests.fuzz.targets:" + ("real_target" if options.bundle else "toy_target")
        cases = run(
            target,
            pristine.absolute(),
            Path(home),
            count=options.mutations,
            number=options.seed,
            only=options.only,
            progress=lambda done: _tell(done, options.mutations),
        )
    faults = [case for case in cases if case.outcome in BAD]
    slowest, largest = max(case.played.seconds for case in cases), max(case.played.peak for case in cases)
    sys.stdout.write(f"{table(cases)}\n\nslowest {slowest:.1f} s, most memory {largest / 1e6:.0f} MB\n")
    if options.faults is not None:
        options.faults.write_text("\n\n".join(map(str, faults)))
    return 1 if faults else 0


def _tell(done: int, count: int) -> None:
    """Says from time to time how far it is."""
    if done % 100 == 0:
        sys.stderr.write(f"{done} of {count} mutations\n")


if __name__ == "__main__":
    sys.exit(main())
