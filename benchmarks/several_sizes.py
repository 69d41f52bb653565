"""Builds a recipe at real size with fabricated weights, adds sizes to it, and measures what each of them costs.

    python benchmarks/several_sizes.py sd15-1024 /tmp/bundle > benchmarks/several_sizes_sd15.md

Disk after 1, 3 and 8 sizes and the seconds that each took; the memory of a process that checks and draws three of them;
and how long engines take to open when the size changes, beside when the phase does. Peak memory is the process's
largest resident set, the pages of the mapped weight stores included. Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import median

from real_size import Measured, machine, measure

import hidiff_runtime
from hidiff_runtime.format.manifest import Manifest

SIZES = ("832x1216", "1216x832", "768x768", "512x512", "512x768", "768x512", "640x960")
"""What is added to the recipe's own."""

DRAWN = 3
"""Sizes that are checked and drawn."""

TABLED = (1, 3, 8)
ROUNDS = 3


def megabytes(folder: Path) -> tuple[float, float]:
    """Returns the megabytes of the weights, and of everything else."""
    manifest = Manifest.read(folder)
    weights = sum(manifest.files[path].size for path in manifest.weights.values())
    every = sum(record.size for record in manifest.files.values())
    return weights / 1e6, (every - weights) / 1e6


def peak_weights(folder: Path) -> float:
    """Returns the gigabytes of the largest weight store, which is what one target computes with."""
    manifest = Manifest.read(folder)
    return max(manifest.files[path].size for path in manifest.weights.values()) / 1e9


def switches(folder: Path) -> None:
    """Prints the seconds that engines take to open, as JSON: by size changed and by phase changed."""
    found: dict[str, list[float]] = {"phase": [], "size": []}
    with hidiff_runtime.open(folder, verify="size") as bundle:
        buckets = bundle.buckets[:DRAWN]
        order = [(bucket, record.phase) for bucket in buckets for record in bucket.manifest.phases]
        last = None
        for bucket, phase in [*itertools.chain.from_iterable([order] * ROUNDS)]:
            started = time.monotonic()
            bundle.sized(bucket.manifest.width, bucket.manifest.height).engine(phase)
            seconds = time.monotonic() - started
            if last is not None:
                found["phase" if last is bucket else "size"].append(seconds)
            last = bucket
    print(json.dumps(found))


def row(measured: Measured) -> str:
    """A row of the table of commands."""
    return f"| `{measured.command}` | {measured.seconds:.0f} | {measured.peak_gb:.2f} | {measured.code} |"


def build(recipe: str, folder: Path) -> tuple[list[Measured], list[str]]:
    """Builds and adds; returns the commands, and the rows of the table of disk."""
    done = [measure("hidiff-export", "build", recipe, "-o", str(folder), "--source", "random:0", "--json")]
    rows = []
    for size in (None, *SIZES):
        if size is not None:
            done.append(measure("hidiff-export", "add", str(folder), "--size", size, "--json"))
        if len(done) in TABLED:
            weights, others = megabytes(folder)
            rows.append(f"| {len(done)} | {weights:,.1f} | {others:.1f} | {others / len(done):.1f} |")
    return done, rows


def use(folder: Path) -> list[Measured]:
    """Checks and draws the first sizes, each in one process."""
    sizes = [f"{one.width}x{one.height}" for one in Manifest.read(folder).whole.manifests[:DRAWN]]
    check = measure("hidiff-run", "check", str(folder), *(word for size in sizes for word in ("--size", size)))
    prompts = folder.with_name("prompts.jsonl")
    lines = [
        {"prompt": "a lighthouse", "seed": seed, "steps": 3, "width": int(width), "height": int(height)}
        for seed, (width, height) in enumerate(size.split("x") for size in sizes)
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder.with_name("pictures")
    drawn = measure("hidiff-run", "generate", str(folder), "--prompts", str(prompts), "-o", f"{out}/", "--force")
    return [check, drawn]


def switching(folder: Path) -> str:
    """Says how long engines take to open."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    code += f"from pathlib import Path; import several_sizes; several_sizes.switches(Path({str(folder)!r}))"
    python = Path(sys.executable).name
    found = json.loads(measure(python, "-c", code).output)
    phase, size = (found[name] for name in ("phase", "size"))
    return (
        f"An engine opens in {median(size):.2f} s ({min(size):.2f} to {max(size):.2f}, {len(size)} times) where the "
        f"size changes, in {median(phase):.2f} s ({min(phase):.2f} to {max(phase):.2f}, {len(phase)} times) where the "
        "phase does, its weights in the page cache."
    )


def main() -> None:
    """Measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path, help="where the bundle goes; it must not exist")
    given = parser.parse_args()
    built, disk = build(given.recipe, given.folder)
    print(f"# {given.recipe} with several sizes, fabricated weights\n\nMachine: {machine()}.\n", flush=True)
    print("| sizes | weights, MB | all else, MB | a size, MB |\n| ---: | ---: | ---: | ---: |")
    print("\n".join(disk) + "\n", flush=True)
    print("| command | seconds | peak memory, GB | exit code |\n| --- | ---: | ---: | ---: |")
    print("\n".join(map(row, built)), flush=True)
    used = use(given.folder)
    print("\n".join(map(row, used)) + "\n", flush=True)
    most = max(one.peak_gb for one in used)
    print(f"The weights of one target are {peak_weights(given.folder):.2f} GB, the larger peak {most:.2f} GB.\n")
    print(switching(given.folder), flush=True)


if __name__ == "__main__":
    main()
