"""`hidiff-export add` and `remove`: the sizes of a finished bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hidiff_export.cli.options import Decorated, allow_links_option

if TYPE_CHECKING:
    from hidiff_export.compiler.compile import BuildResult


def read_size(text: str) -> tuple[int, int]:
    """Reads ``WIDTHxHEIGHT``. Raises click's error for another text."""
    width, found, height = text.partition("x")
    if not (found and width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"{text!r} is not WIDTHxHEIGHT, such as 832x1216.")
    return int(width), int(height)


def _size(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, int]:
    return read_size(text)


def _options(command: Decorated) -> Decorated:
    """Adds what both commands take."""
    for option in reversed(
        (
            click.argument("directory", type=click.Path(path_type=Path)),
            click.option("--size", metavar="WIDTHxHEIGHT", callback=_size, required=True, help="In pixels."),
            click.option("--batch", type=click.IntRange(1, 64), help="Pictures of a run."),
            allow_links_option,
            click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON and show no progress."),
        )
    ):
        command = option(command)
    return command


@click.command(
    short_help="Add a size to a bundle.",
    epilog="""\b
Examples:
  hidiff-export add bundle --size 832x1216
  hidiff-export add bundle --size 1024x1024 --batch 4
""",
)
@_options
def add(directory: Path, **options: Any) -> None:
    """Add a size to the finished bundle in DIRECTORY: its graphs, its engines and a recorded evaluation of each phase.

    Weights and everything else stay as they are. The batch is the first size's, unless --batch gives another. The new
    bundle takes the old one's place in one step, at the end; interrupted, the old one is as it was.
    """
    from hidiff_export.compiler.buckets import add_bucket

    _change(add_bucket, directory, **options)


@click.command(
    short_help="Take a size out of a bundle.",
    epilog="""\b
Examples:
  hidiff-export remove bundle --size 832x1216
  hidiff-export remove bundle --size 1024x1024 --batch 4
""",
)
@_options
def remove(directory: Path, **options: Any) -> None:
    """Take a size out of the bundle in DIRECTORY, every batch of it or that of --batch, with files of its own.

    The first size stays: what all sizes share was recorded with it. The new bundle takes the old one's place in one
    step, at the end.
    """
    from hidiff_export.compiler.buckets import remove_bucket

    _change(remove_bucket, directory, **options)


def _change(
    change: Callable[..., BuildResult],
    directory: Path,
    *,
    size: tuple[int, int],
    batch: int | None,
    allow_links: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Changes a bundle under a progress display, and prints what that came to."""
    from hidiff_export.cli.build import print_result
    from hidiff_export.cli.console import progress_display

    with progress_display(quiet=as_json) as display:
        result = change(directory, size, batch, display, allow_links=allow_links)
    print_result(result, as_json=as_json)
