"""`hidiff-export bulk`: the runtime's own command, so that there is one of it."""

from __future__ import annotations

import click


@click.command(
    short_help="Make the pictures of a table of prompts, on a Ray cluster too.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def bulk(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Hands everything to `hidiff-run bulk`, --help too."""
    from hidiff_runtime.cli import main

    context.exit(main(["bulk", *arguments], program="hidiff-export"))
