"""`hidiff-export generate` and `hidiff-export bulk`: the runtime's own commands, so that there is one of each."""

from __future__ import annotations

import click


def _handed_on(name: str, short_help: str) -> click.Command:
    """Returns a command that hands everything to the runtime's of the same name, --help too."""

    @click.command(
        name, short_help=short_help, context_settings={"ignore_unknown_options": True, "help_option_names": []}
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def command(context: click.Context, arguments: tuple[str, ...]) -> None:
        from hidiff_runtime.cli import main

        context.exit(main([name, *arguments], program="hidiff-export"))

    return command


generate = _handed_on("generate", "Make pictures from prompts, with a bundle alone.")
bulk = _handed_on("bulk", "Make the pictures of a table of prompts, on a Ray cluster too.")
