"""Measures parity on trained weights beside random ones: the demo recipe and the recipe `tiny`, in every precision.

    python benchmarks/demo_parity.py --work /tmp/parity > benchmarks/demo_parity.md

Each bundle is built at 256x256 and verified in a run of 20 steps; a cell is the worst of a boundary over its phases and
steps, in dB. Behind them stands what the bounds have to tell from rounding: other phases, and single wrong shifts. fp8
runs on ONNX Runtime, which emulates it and has nothing for bfloat16: of that the graphs alone are compared, as
`verify --graphs-only` does.
Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import hidiff_runtime
from hidiff_export.cli.console import progress_display
from hidiff_export.compiler.compile import build
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Precision, Target
from hidiff_export.verification.verify import verify
from hidiff_runtime.denoising.denoiser import OUTPUT
from hidiff_runtime.format.manifest import MANIFEST
from hidiff_runtime.phases import Phase
from hidiff_runtime.verification.comparison import Bound, compare
from hidiff_runtime.verification.reference_samples import Stored
from hidiff_runtime.verification.replay import read_samples

RECIPES = ("tiny", "demo")
STEPS = 20
UNBOUNDED = Bound(0, "measured alone")


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


def controls(work: Path, recipe: str) -> Iterator[str]:
    """Yields rows of what a bound has to tell from rounding: calls by another phase, and with one wrong shift."""
    with hidiff_runtime.open(work / f"{recipe}-float32", resident="all") as bundle:
        samples = read_samples(bundle)
        for call in samples.calls:
            shifts = np.array(call.window_shifts, np.int32)
            inputs = {name: samples.array(source) for name, source in call.inputs.items()}
            inputs["window_shifts"] = shifts
            expected = bundle.engine(call.phase).run(inputs)[OUTPUT]

            def off(phase: Phase, given: Mapping[str, Any], expected: Any = expected) -> float:
                found = bundle.engine(phase).run(given)[OUTPUT]
                return compare("", expected, found, UNBOUNDED).metrics.snr_db  # type: ignore[union-attr]

            others = [record.phase for record in bundle.manifest.phases if record.phase != call.phase]
            wrong = [(shifts + np.eye(len(shifts), dtype=np.int32)[index]) % 4 for index in range(len(shifts))]
            phase = max(off(other, inputs) for other in others)
            turned = [off(call.phase, {**inputs, "window_shifts": one}) for one in wrong]
            at = f"{call.phase.name} at {float(inputs['timestep'][0]):g}"
            given = "in a run" if isinstance(call.inputs["latents"], Stored) else "random"
            yield f"| `{recipe}` | {at} | {given} | {phase:.1f} | {min(turned):.1f} to {max(turned):.1f} |"


def main() -> None:
    """Prints a table for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for bundles")
    names = [precision.value for precision in Precision]
    parser.add_argument("--precisions", nargs="*", default=names, choices=names)
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
    print("## What a bound has to tell from rounding, float32\n")
    print("| recipe | call | inputs | another phase's graph | one wrong shift |\n| --- | --- | --- | ---: | ---: |")
    for recipe in RECIPES:
        print("\n".join(controls(given.work, recipe)), flush=True)


def _cell(found: tuple[float, float, bool] | None) -> str:
    if found is None:
        return ""
    value, _, held = found
    return f"{'equal' if value == float('inf') else f'{value:.1f}'}{'' if held else ' !'}"


if __name__ == "__main__":
    main()
