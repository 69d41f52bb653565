"""The ``hidiff-export`` command: one subcommand for each arrow of the data flow, imported when it is called."""

from __future__ import annotations

import importlib
import os

import click

from hidiff_export.errors import Cancelled, HidiffError
from hidiff_runtime.version import __version__

# Subcommand to "module:attribute", in the order a newcomer meets them.
COMMANDS = {
    "recipes": "hidiff_export.cli.recipes:recipes",
    "plan": "hidiff_export.cli.plan:plan",
    "build": "hidiff_export.cli.build:build",
    "add": "hidiff_export.cli.sizes:add",
    "remove": "hidiff_export.cli.sizes:remove",
    "rebase": "hidiff_export.cli.rebase:rebase",
    "verify": "hidiff_export.cli.verify:verify",
    "quality": "hidiff_export.cli.quality:quality",
    "showcase": "hidiff_export.cli.showcase:showcase",
    "bench": "hidiff_export.cli.bench:bench",
    "generate": "hidiff_export.cli.runtime_commands:generate",
    "bulk": "hidiff_export.cli.runtime_commands:bulk",
    "triton": "hidiff_export.cli.triton:triton",
    "inspect": "hidiff_export.cli.inspect:inspect",
    "doctor": "hidiff_export.cli.doctor:doctor",
}


class _Commands(click.Group):
    """Imports a subcommand when it is invoked or listed, and shows this project's errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except HidiffError as error:
            _show(error)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.secho("Interrupted.", fg="yellow", err=True)
            ctx.exit(Cancelled.exit_code)


def _show(error: HidiffError) -> None:
    click.echo(click.style("Error: ", fg="red", bold=True) + error.summary, err=True)
    if error.given is not None:
        click.echo(click.style("given: ", fg="yellow") + str(error.given), err=True)
    if error.advice:
        click.echo(click.style("next:  ", fg="green") + error.advice, err=True)


@click.group("hidiff-export", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Compiles Stable Diffusion with HiDiffusion into one static graph per phase of the run.

    \b
    Exit codes: 0 done, 1 parity failed, 2 bad recipe or option, 3 checkpoint, 4 bundle,
    5 backend or export, 6 disk or lock, 7 rows of a bulk job failed, 130 interrupted.

    \b
    Example:
      hidiff-export plan sdxl-2048
    """
    # transformers tells everybody without torchvision that it falls back to Pillow; nothing here reads pictures.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
