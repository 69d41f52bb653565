"""`hidiff-export bench`: how fast bundles evaluate beside their peers, evaluation by evaluation in turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hidiff_export.cli.options import allow_links_option
from hidiff_export.cli.sizes import read_size

if TYPE_CHECKING:
    from hidiff_export.benchmarking.bench_report import BenchReport


def _sizes(_context: click.Context, _parameter: click.Parameter, texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Reads each ``WIDTHxHEIGHT``. Raises click's error for another text."""
    return tuple(map(read_size, texts))


@click.command(
    short_help="Time bundles beside diffusers, PyTorch and others.",
    epilog="""\b
Examples:
  hidiff-export bench bundle
  hidiff-export bench float32-bundle bfloat16-bundle int8-bundle --peers all
  hidiff-export bench bundle --peers diffusers,eager:bfloat16,compile --rounds 9 --operators
  hidiff-export bench bundle --peers diffusers,optimum-intel --peer-python optimum-intel=venv/bin/python
  hidiff-export bench sd15-1024 --size 1024x1024 --json
""",
)
@click.argument("targets", nargs=-1, required=True, metavar="BUNDLE...|RECIPE")
@click.option(
    "--peers",
    default="default",
    metavar="NAMES",
    help="all, none, or names with commas: diffusers, optimum-intel, stable-diffusion.cpp, hidiffusion, eager, "
    "compile; NAME:bfloat16 for one of them in bfloat16. [default: diffusers,hidiffusion,eager]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["float32", "bfloat16"]),
    default=("float32",),
    show_default=True,
    help="Of the peers. Repeatable, for both.",
)
@click.option(
    "--peer-python",
    multiple=True,
    metavar="PEER=PYTHON",
    help="Interpreter of optimum-intel or stable-diffusion.cpp, where it is in an environment of its own. Repeatable.",
)
@click.option("--backend", help="Measure the bundles' engines of this one. [default: all that run here]")
@click.option(
    "--size", "sizes", multiple=True, metavar="WIDTHxHEIGHT", callback=_sizes, help="Repeatable. [default: all]"
)
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True, help="Of the run that is told.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Evaluations of each phase.")
@click.option("--threads", type=click.IntRange(1), help="Of an evaluation. [default: the cores of this process]")
@click.option("--base", metavar="ROW", help="The row that others are compared with. [default: the first]")
@click.option("--operators", is_flag=True, help="Also tell which operators take the time.")
@click.option("--peaks/--no-peaks", default=True, help="Time matrix products, for the least that a phase can take.")
@allow_links_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench"),
    show_default=True,
    help="Folder for the report and the plots.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and show no progress.")
def bench(
    targets: tuple[str, ...],
    peers: str,
    precisions: tuple[str, ...],
    peer_python: tuple[str, ...],
    backend: str | None,
    sizes: tuple[tuple[int, int], ...],
    steps: int,
    rounds: int,
    threads: int | None,
    base: str | None,
    operators: bool,
    peaks: bool,
    allow_links: tuple[Path, ...],
    output: Path,
    as_json: bool,
) -> None:
    """Evaluate every phase of each BUNDLE and of its peers in turn, and tell time, memory and what they gave.

    Every round evaluates each contender once, one at a time, on the same inputs; each is a process of its own. Peers
    compute with the first bundle's weights, which are best float32. Of a RECIPE in the place of bundles the peers alone
    are measured, with its checkpoint; nothing is built. Writes bench.json, bench.md and plots.
    """
    from hidiff_export.benchmarking.bench_report import FILES
    from hidiff_export.benchmarking.bench_run import BenchSettings, run
    from hidiff_export.benchmarking.peers import interpreters, wanted_peers
    from hidiff_export.benchmarking.targets import BenchScope, lineup_of
    from hidiff_export.cli.console import progress_display
    from hidiff_export.quality.report_folder import report_folder
    from hidiff_runtime.backends.processor_cores import usable_cores

    wanted, pythons = wanted_peers(peers, precisions), interpreters(peer_python)
    scope = BenchScope(wanted, pythons, backend, sizes, steps, threads or usable_cores(), allow_links)
    settings = BenchSettings(rounds, base, operators, peaks)
    with (
        report_folder(output, FILES) as folder,
        progress_display(quiet=as_json) as display,
        lineup_of(targets, scope, display) as lineup,
    ):
        report = run(lineup, settings, folder, display)
        report.save(folder)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        _show(report, output)


def _show(report: BenchReport, output: Path) -> None:
    """Prints the table of each size and where the rest is."""
    from hidiff_export.benchmarking.bench_report import MARKDOWN, REPORT
    from hidiff_export.benchmarking.bench_tables import remarks, savings_tables, table
    from hidiff_export.cli.console import console

    for size in report.sizes:
        console().print(table(size), *savings_tables(size), sep="\n")
        for line in remarks(size):
            click.echo(f"note: {line}")
    click.echo(f"read {output / MARKDOWN}; every figure is in {output / REPORT}")
