"""Arguments that several commands share."""

from __future__ import annotations

import click

recipe_argument = click.argument("recipe", metavar="RECIPE")
"""A recipe's path or the name of a shipped one."""

set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a value of the recipe, e.g. --set width=1536 or --set hidiffusion.windows=false. Repeatable.",
)
