"""Measures on the demo model what precisions, samplers, step counts and HiDiffusion cost in pictures.

    python benchmarks/demo_quality.py --work /tmp/quality > benchmarks/demo_quality.md

Everything is drawn from the demo model's own prompts, which pair each subject with a background that it was never
trained on, and seen by its classifier. bfloat16 is PyTorch's, since ONNX Runtime has no kernels for it on a CPU; fp8 is
the bundle's graphs on ONNX Runtime, which emulates it. Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch

from hidiff_export.cli.console import progress_display
from hidiff_export.cli.shots import features_for, read_prompts, shots_of
from hidiff_export.compiler.compile import build
from hidiff_export.demo_model import DEMO_SOURCE
from hidiff_export.quality import contenders
from hidiff_export.quality.contenders import BundleContender, Contender, DiffusersContender, OtherSeeds, Shot, Stepped
from hidiff_export.quality.distances import Interval, set_distance
from hidiff_export.quality.features import FeatureModel
from hidiff_export.quality.quality_report import QualityReport
from hidiff_export.quality.scoring import compare, features_of, subject_of
from hidiff_export.quality.showcase_report import contenders_of, draw_showcase, training_size
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import SamplerName, Target
from hidiff_runtime.format.manifest import MANIFEST, Manifest

SAMPLERS = tuple(name.value for name in SamplerName if name is not SamplerName.TCD)
STEPS = (10, 20, 50)
GUIDANCE = 4.0
"""What the model's card scores it with; the default of 7.5 overdraws."""
REFERENCE = ("ddim", 50)
"""What other samplers and step counts are compared with: the sampler of the published model, in many steps."""


@dataclass(frozen=True)
class BrainFloat:
    """Diffusers with HiDiffusion in bfloat16, every network of it."""

    drawn_by: DiffusersContender
    name: str = "bfloat16"

    @property
    def origin(self) -> str:
        """What it is, for people."""
        return f"{self.drawn_by.origin}, in bfloat16"

    def draw(self, shots: Sequence[Shot], stepped: Stepped) -> Iterator[Any]:
        """Yields its pictures."""
        load = contenders._load
        with mock.patch.object(contenders, "_load", lambda *given: load(*given).to(torch.bfloat16)):
            yield from self.drawn_by.draw(shots, stepped)


def bundle(work: Path, name: str, *changes: str) -> Path:
    """A bundle of the demo recipe, built where there is none yet."""
    folder = work / name
    if (folder / MANIFEST).is_file():
        return folder
    with progress_display(quiet=True) as display, mock.patch.object(Target, "computes_fp8", True):
        build(Recipe.load("demo", changes), folder, display)
    return folder


def shots(folder: Path, count: int, **settings: Any) -> list[Shot]:
    """The demo model's prompts, evenly spread over its subjects."""
    return shots_of(read_prompts(None, Manifest.read(folder)), count, 1, {"guidance_scale": GUIDANCE, **settings})


def said(interval: Interval | None) -> str:
    """An estimate with its bounds; nothing where there are too few pictures for one."""
    if interval is None:
        return ""
    return f"{interval.value:.0f} ({interval.low:.0f} to {interval.high:.0f})"


def told(_done: float, _total: float, _note: str) -> None:
    """Shows no progress within a table; its rows are progress enough."""


def precisions(work: Path, model: FeatureModel, count: int) -> None:
    """Prints the table of precisions, at twice the training size."""
    reference = bundle(work, "float32", "sampler=ddim", "steps=20")
    eager = DiffusersContender("PyTorch float32", DEMO_SOURCE, reference, True)
    asked = shots(reference, count, steps=20)
    drawing: list[Contender] = [eager, BundleContender("float32", reference)]
    for precision in ("float16", "int8", "fp8"):
        made = bundle(work, precision, "sampler=ddim", "steps=20", f"precision={precision}")
        drawing.append(BundleContender(precision, made))
    every: list[Contender] = [*drawing, BrainFloat(eager), OtherSeeds("other seeds", eager)]
    scores = compare(every, asked, [20] * count, model, work / "precisions", told)
    size = Manifest.read(reference)
    settings = {"size": f"{size.width}x{size.height}", "steps": 20, "sampler": "ddim", "guidance scale": GUIDANCE}
    print(QualityReport(model.name, settings, scores).markdown().replace("# ", "## Precisions: ", 1), flush=True)


def samplers(work: Path, model: FeatureModel, count: int) -> None:
    """Prints the table of samplers and step counts."""
    folder = bundle(work, "samplers", f"sampler=[{', '.join(SAMPLERS)}]", f"steps=[{', '.join(map(str, STEPS))}]")
    name, most = REFERENCE

    def seen(sampler: str, steps: int) -> tuple[torch.Tensor, float]:
        asked = shots(folder, count, sampler=sampler, steps=steps)
        features = features_of(list(BundleContender(sampler, folder).draw(asked, lambda: None)), model)
        wanted = [subject_of(shot.prompt, model.labels) for shot in asked]
        return features, fmean(one == other for one, other in zip(model.named(features), wanted, strict=True))

    reference, _ = seen(name, most)
    print(
        f"## Samplers: {count} pictures, guidance {GUIDANCE:g}; "
        f"set distance x 1000 to {name} in {most} steps, right subject\n"
    )
    print(f"| sampler |{''.join(f' {steps} steps |' for steps in STEPS)}\n| --- |{' --- |' * len(STEPS)}")
    for sampler in SAMPLERS:
        cells = []
        for steps in STEPS:
            features, right = seen(sampler, steps)
            cells.append(f"{said(set_distance(features, reference))}, {right:.0%}")
        print(f"| `{sampler}` | {' | '.join(cells)} |", flush=True)
    print()


def larger(work: Path, model: FeatureModel, count: int) -> None:
    """Prints the table of sizes, without and with HiDiffusion."""
    print(f"## HiDiffusion: {count} pictures, 20 steps of ddim, guidance {GUIDANCE:g}\n")
    print("| size | contender | right subject | set distance x 1000 to the training size |\n| --- | --- | --- | --- |")
    for width, height in ((192, 192), (256, 192), (256, 256), (384, 384)):
        made = bundle(work, f"{width}x{height}", f"width={width}", f"height={height}", "sampler=ddim", "steps=20")
        manifest = Manifest.read(made)
        trained = training_size(Recipe.load("demo"))
        drawing = contenders_of(made, manifest, DEMO_SOURCE, trained)[:3]
        rows = draw_showcase(drawing, shots(made, count, steps=20), [20] * count, model, work / "larger", told)
        for row in rows:
            size = f"{row.size[0]}x{row.size[1]}"
            print(f"| {size} | {row.name} | {row.retrieval:.1%} | {said(row.distance)} |", flush=True)
    print()


def main() -> None:
    """Prints the tables that are asked for."""
    tables = {"precisions": precisions, "samplers": samplers, "larger": larger}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for bundles and pictures")
    parser.add_argument("--count", type=int, default=100, help="pictures of each row")
    parser.add_argument("--tables", nargs="+", default=list(tables), choices=list(tables))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    some = bundle(given.work, "float32", "sampler=ddim", "steps=20")
    model = features_for(None, Manifest.read(some))
    if model is None:
        sys.exit("The demo model has no classifier.")
    print("# What settings cost in pictures of the demo model\n")
    for name in given.tables:
        tables[name](given.work, model, given.count)


if __name__ == "__main__":
    main()
