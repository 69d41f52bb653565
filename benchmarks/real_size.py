"""Builds a recipe at real size with fabricated weights, verifies it and runs it, and prints what each command took.

    python benchmarks/real_size.py sd15-1024 /tmp/bundle --out benchmarks/real_size_sd15-1024.md

Peak memory is the process's largest resident set, the pages of the mapped weight store included. Nothing here is
asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Measured:
    """A command, how long it took, its largest resident set and how it ended."""

    command: str
    seconds: float
    peak_gb: float
    code: int
    output: str


def measure(*words: str) -> Measured:
    """Runs a command of this project to its end; its progress goes to the terminal."""
    started = time.monotonic()
    process = subprocess.Popen([str(BIN / words[0]), *words[1:]], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    measured = Measured(
        " ".join(words), seconds, usage.ru_maxrss * 1024 / 1e9, os.waitstatus_to_exitcode(status), output
    )
    print(f"{measured.command}: {seconds:.0f} s, {measured.peak_gb:.2f} GB, exit code {measured.code}", file=sys.stderr)
    return measured


def machine() -> str:
    """Processor, cores and system."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {len(os.sched_getaffinity(0))} cores, {platform.system()}, Python {platform.python_version()}"


def report(recipe: str, build: Measured, others: list[Measured]) -> str:
    """The figures as Markdown."""
    summary = json.loads(build.output)
    weights = summary["weights"]["unet"]
    lines = [
        f"# {recipe} at real size, fabricated weights",
        "",
        f"Machine: {machine()}. Tools: {', '.join(f'{name} {version}' for name, version in summary['tools'].items())}.",
        "",
        "| command | seconds | peak memory, GB | exit code |",
        "| --- | ---: | ---: | ---: |",
        *(f"| `{m.command}` | {m.seconds:.0f} | {m.peak_gb:.2f} | {m.code} |" for m in (build, *others)),
        "",
        "| stage of the build | seconds |",
        "| --- | ---: |",
        *(f"| {title} | {stage['seconds']:.1f} |" for title, stage in summary["stages"].items()),
        "",
        f"Weights {weights / 1e6:,.1f} MB; the whole bundle {summary['bytes'] / 1e6:,.1f} MB, "
        f"{(summary['bytes'] - weights) / 1e6:.1f} MB beside the weights.",
        "",
        *(f"```\n{m.output.rstrip()}\n```\n" for m in others if m.output.strip()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("folder", help="where the bundle goes; it must not exist")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed to the build")
    parser.add_argument("--skip-verify", action="store_true", help="only build and check")
    parser.add_argument("--out", type=Path, help="the Markdown file; standard output if left out")
    given = parser.parse_args()
    overrides = [word for assignment in given.set for word in ("--set", assignment)]
    source = ("--source", "random:0", *overrides)
    build = measure("hidiff-export", "build", given.recipe, "-o", given.folder, *source, "--json")
    if build.code:
        sys.exit(build.code)
    others = [] if given.skip_verify else [measure("hidiff-export", "verify", given.folder)]
    others.append(measure("hidiff-run", "check", given.folder))
    text = report(given.recipe, build, others)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
