"""`hidiff-export generate`: the runtime's own command, so that there is one of it."""

from __future__ import annotations

import click


@click.command(
    short_help="Make pictures from prompts, with a bundle alone.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def generate(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Hands everything to `hidiff-run generate`, --help too."""
    from hidiff_runtime.cli import main

    context.exit(main(["generate", *arguments], program="hidiff-export"))
