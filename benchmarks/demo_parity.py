"""Measures parity on trained weights beside random ones: the demo recipe and the recipe `tiny`, in every precision.

    python benchmarks/demo_parity.py --work /tmp/parity > benchmarks/demo_parity.md

Each bundle is built at 256x256 and verified in a run of 20 steps; a cell is the worst of a boundary over its phases and
steps, in dB. fp8 runs on ONNX Runtime, which emulates it; bfloat16 has no engines here, and its graphs alone are
compared, as `verify --graphs-only` does.
Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from hidiff_export.cli.console import progress_display
from hidiff_export.compiler.compile import build
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Precision, Target
from hidiff_export.verification.verify import verify
from hidiff_runtime.format.manifest import MANIFEST

RECIPES = ("tiny", "demo")
STEPS = 20


def worst(work: Path, recipe: str, precision: Precision) -> Mapping[str, tuple[float, float, bool]]:
    """The worst signal-to-noise ratio of each boundary, its bound, and whether everything held."""
    folder = work / f"{recipe}-{precision.value}"
    changes = [f"precision={precision.value}", "sampler=ddim", f"steps={STEPS}"]
    engineless = precision is Precision.BFLOAT16
    if engineless:
        changes.append("targets=cuda")
    with progress_display(quiet=True) as display, mock.patch.object(Target, "computes_fp8", True):
        if not (folder / MANIFEST).is_file():
            build(Recipe.load(recipe, changes), folder, display)
        report = verify(folder, steps=STEPS, graphs_only=engineless)
    found: dict[str, tuple[float, float, bool]] = {}
    for verdict in report.verdicts:
        if verdict.metrics is None:
            continue
        value, bound, held = found.get(verdict.boundary, (float("inf"), verdict.bound.snr_db, True))
        found[verdict.boundary] = (min(value, verdict.metrics.snr_db), bound, held and verdict.ok)
    return found


def main() -> None:
    """Prints a table for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for bundles")
    names = [precision.value for precision in Precision]
    parser.add_argument("--precisions", nargs="+", default=names, choices=names)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    print("# Parity on trained and on random weights\n")
    print(
        f"256x256, ddim, {STEPS} steps; the worst of each boundary in dB. An exclamation mark: a bound does not hold.\n"
    )
    for name in given.precisions:
        tiny, demo = (worst(given.work, recipe, Precision(name)) for recipe in RECIPES)
        print(f"## {name}\n\n| boundary | bound | random (`tiny`) | trained (`demo`) |\n| --- | ---: | ---: | ---: |")
        for boundary in dict.fromkeys((*tiny, *demo)):
            cells = [_cell(side.get(boundary)) for side in (tiny, demo)]
            bound = (tiny.get(boundary) or demo[boundary])[1]
            print(f"| {boundary} | {bound:g} | {' | '.join(cells)} |")
        print(flush=True)


def _cell(found: tuple[float, float, bool] | None) -> str:
    if found is None:
        return ""
    value, _, held = found
    return f"{'equal' if value == float('inf') else f'{value:.1f}'}{'' if held else ' !'}"


if __name__ == "__main__":
    main()
