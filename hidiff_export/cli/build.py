"""`hidiff-export build`: recipe in, bundle out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from hidiff_export.compile import BuildResult
    from hidiff_export.stages import Report


class ProgressDisplay:
    """One bar a stage, with the time it has taken and the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def stage(self, title: str, *, reused: bool) -> Iterator[Report]:
        """Shows a stage's bar until it ends; a reused stage is shown as done."""
        task = self._progress.add_task(title, total=None, note="")

        def report(done: float, total: float, note: str) -> None:
            self._progress.update(task, completed=done, total=total, note=note)

        yield report
        note = "already there" if reused else "done"
        self._progress.update(task, completed=1, total=1, note=note)
        self._progress.stop_task(task)


@contextmanager
def progress_display(*, quiet: bool) -> Iterator[ProgressDisplay]:
    """A display on standard error, so that standard output stays for results."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=quiet)) as progress:
        yield ProgressDisplay(progress)


@click.command(
    epilog="""\b
Examples:
  hidiff-export build demo -o demo-bundle
  hidiff-export build recipes/sdxl-2048.yaml -o bundle --source ./my-sdxl
  hidiff-export build sd15-1024 -o bundle --source random:0 --set batch=2
"""
)
@click.argument("recipe")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder the bundle becomes.")
@click.option("--source", help="Checkpoint: hub id, diffusers folder, .safetensors file, or random:SEED.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe; repeatable."
)
@click.option("--force", is_flag=True, help="Start over, and replace a finished bundle at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON and show no progress.")
def build(
    recipe: str, output: Path, source: str | None, overrides: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Compile RECIPE (a file, or the name of a shipped one) into a bundle.

    An interrupted build goes on from its last finished stage when the same command is run again.
    """
    from hidiff_export.compile import build as build_bundle
    from hidiff_export.recipe import Recipe

    changes = (*overrides, *((f"source={source}",) if source is not None else ()))
    loaded = Recipe.load(recipe, changes)
    with progress_display(quiet=as_json) as display:
        result = build_bundle(loaded, output, display, force=force)
    _print_summary(result, as_json=as_json)


def _print_summary(result: BuildResult, *, as_json: bool) -> None:
    from hidiff_export.cli.inspect import bundle_summary, print_bundle

    summary = bundle_summary(result.folder)
    summary["stages"] = {
        stage.title: {"seconds": round(stage.seconds, 2), "reused": stage.reused} for stage in result.stages
    }
    print_bundle(summary, as_json=as_json)
