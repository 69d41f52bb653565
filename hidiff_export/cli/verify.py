"""`hidiff-export verify`: a bundle is proven beside PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hidiff_export.cli.options import allow_links_option
from hidiff_export.errors import ParityError, StorageError

if TYPE_CHECKING:
    from hidiff_export.verification.report import Report


@click.command(
    short_help="Compare a bundle with PyTorch, boundary by boundary.",
    epilog="""\b
Examples:
  hidiff-export verify demo-bundle
  hidiff-export verify bundle --against ./my-sdxl --junit parity.xml
  hidiff-export verify bundle --steps 50 --json
  hidiff-export verify tensorrt-bundle --graphs-only
""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="SOURCE",
    help="Compare all weights with this checkpoint's, and take the UNet's for PyTorch from it.",
)
@click.option("--steps", type=int, metavar="N", help="Of the whole run; by default the fewest with every phase change.")
@click.option(
    "--graphs-only",
    is_flag=True,
    help="Run no engine: compare the graphs that engines are built from, and weights. For bundles of another machine.",
)
@allow_links_option
@click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Also write a JUnit XML report here.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and show no progress.")
@click.pass_context
def verify(
    context: click.Context,
    directory: Path,
    against: str | None,
    steps: int | None,
    graphs_only: bool,
    allow_links: tuple[Path, ...],
    junit: Path | None,
    as_json: bool,
) -> None:
    """Compare the bundle in DIRECTORY with PyTorch: engines, graphs, text encoders, VAE, a whole run and its picture.

    Half-precision graphs are computed with float16's or bfloat16's rounding and range, also on a CPU.

    Exits with 0 only if every comparison is within its bound and float16 holds what has to be computed in it, else with
    1. The report is kept in the bundle.
    """
    from hidiff_export.cli.console import progress_display
    from hidiff_export.files import storage_errors
    from hidiff_export.verification.verify import verify as verify_bundle
    from hidiff_runtime.format.bundle_folder import BundleFolder

    digest = BundleFolder(directory, allow_links).manifest().digest
    with (
        progress_display(quiet=as_json) as display,
        display.stage("verify", reused=False) as progress,
    ):
        report = verify_bundle(
            directory,
            against=against,
            steps=steps,
            allow_links=allow_links,
            graphs_only=graphs_only,
            progress=progress,
        )
    _show(report, as_json=as_json)
    if junit is not None:
        with storage_errors(junit):
            junit.write_text(report.to_junit(), encoding="utf-8")
    keep_report(report, directory, digest)
    if not report.ok:
        context.exit(ParityError.exit_code)


def _show(report: Report, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(report.table())
    for line in report.magnitudes.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    failed, total = len(report.failures), len(report.checks)
    outcome = f"[bold red]{failed} of {total} FAILED" if failed else f"[bold green]all {total} within bounds"
    if report.magnitudes.beyond:
        outcome += ", and [bold red]float16 does not hold what has to be computed in it[/]"
    console.print(f"{report.candidate} beside {report.reference}, weights of {report.against}: {outcome}[/]")
    for notice in report.magnitudes.notices:
        console.print(f"note: {notice}", style="yellow", markup=False, highlight=False)


def keep_report(report: Report, directory: Path, digest: str) -> None:
    """Stores the report in the bundle of this digest; a bundle on a read-only disk can be verified all the same."""
    from hidiff_export.verification.report import store

    try:
        store(report, directory, verified=digest)
    except StorageError as error:
        click.echo(f"The report was not kept in the bundle: {error.summary} {error.given}", err=True)
