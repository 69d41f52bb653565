"""``hidiff-run``: checks, describes and runs a bundle on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hidiff_runtime.cli import bulk, check, denoise, generate, info
from hidiff_runtime.console.notices import notices_shown
from hidiff_runtime.console.printing import tell_error, write
from hidiff_runtime.errors import Cancelled, HidiffError
from hidiff_runtime.version import __version__

EXIT_CODES = """exit codes:
  0 done        1 check failed       2 bad option or input   4 bundle broken
  5 backend missing or failing       6 disk                  7 some rows failed
  130 interrupted"""

COMMANDS = {"generate": generate, "bulk": bulk, "check": check, "info": info, "denoise": denoise}
"""A module for each: it has a summary, an example, options to add, and a function that runs them."""


def main(arguments: Sequence[str] | None = None, *, program: str = "hidiff-run") -> int:
    """Runs one command; returns its exit code. ``program`` is what the commands are said to be called."""
    options = _parser(program).parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        with notices_shown():
            return command(options)
    except HidiffError as error:
        tell_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        write("\ninterrupted\n", sys.stderr)
        return Cancelled.exit_code


def _parser(program: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        program, description=__doc__.replace("``", "'"), epilog=EXIT_CODES, formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        epilog = f"example:\n  {program} {module.EXAMPLE}\n\n{EXIT_CODES}"
        summary = module.SUMMARY
        command = commands.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=form)
        command.add_argument("folder", metavar="DIR", type=Path, help="the bundle's folder")
        module.add_options(command)
        command.set_defaults(command=module.run)
    return parser
