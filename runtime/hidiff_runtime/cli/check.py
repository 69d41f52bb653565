"""`hidiff-run check`: the bundle's reference samples, replayed here, and its sampler tables, compared."""

from __future__ import annotations

import argparse
import itertools
import json
import sys

from hidiff_runtime.cli.shared_options import add_opening, open_bundle, picture_size
from hidiff_runtime.console.printing import progress, write

SUMMARY = "replay the bundle's reference samples on this machine's engines, and compare its sampler tables"
EXAMPLE = "check bundle --json > check.json"


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    command.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    command.add_argument("--calls-only", action="store_true", help="leave out the whole runs")
    told = "of the bundle's sizes, the one to check; may be given again (default: all of them)"
    command.add_argument(
        "--size", metavar="WxH", type=picture_size, action="append", default=[], help=told, dest="sizes"
    )
    add_opening(command)


def run(options: argparse.Namespace) -> int:
    """Replays the samples; returns 0 if every verdict is good, else 1."""
    from hidiff_runtime.verification.replay import buckets_of, check, read_samples
    from hidiff_runtime.verification.replay_components import comparisons

    count = itertools.count(1)
    with open_bundle(options) as bundle:
        runs = not options.calls_only
        buckets = buckets_of(bundle, options.sizes)
        total = sum(comparisons(read_samples(bucket), runs=runs) for bucket in buckets)
        progress(f"0 of {total} compared")
        report = check(
            bundle,
            runs=runs,
            sizes=options.sizes,
            progress=lambda _: progress(f"{next(count)} of {total} compared"),
        )
    progress("", end="\n" if sys.stderr.isatty() else "")
    write((json.dumps(report.to_dict(), indent=2) if options.json else report.render()) + "\n", sys.stdout)
    return report.exit_code
