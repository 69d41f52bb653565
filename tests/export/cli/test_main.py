"""The command group: help, errors without a traceback, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import click
import pytest
from click.testing import CliRunner, Result

from hidiff_export import __version__, cli
from hidiff_export.errors import BundleError, CheckpointError, ExportError, HidiffError, ParityError, StorageError
from hidiff_runtime.cli import EXIT_CODES

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def test_help_lists_every_command_and_the_exit_codes() -> None:
    result = _invoke("--help")
    assert result.exit_code == 0
    listed = result.output.partition("Commands:")[2].split()
    assert set(cli.COMMANDS) <= set(listed)


def _exit_codes(base: type[HidiffError]) -> set[int]:
    return {base.exit_code}.union(*map(_exit_codes, base.__subclasses__()))


@pytest.mark.parametrize(
    ("text", "elsewhere"),
    [
        (str(cli.main.help).partition("Exit codes:")[2].partition("Example")[0], set()),
        (README.partition("## Exit codes")[2].partition("Every error")[0], set()),
        (EXIT_CODES, {CheckpointError.exit_code}),
    ],
    ids=["hidiff-export --help", "README", "hidiff-run --help"],
)
def test_what_is_said_of_exit_codes_is_what_the_errors_have(text: str, elsewhere: set[int]) -> None:
    said = [int(code) for code in re.findall(r"(?:^|[\s,·])(\d+) [a-z]", text)]
    assert sorted(said) == said == sorted({0, *_exit_codes(HidiffError)} - elsewhere)


@pytest.mark.parametrize("command", [*cli.COMMANDS, "recipes list", "recipes show", "recipes schema"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = _invoke(*command.split(), "--help")
    assert result.exit_code == 0
    if command != "recipes":
        assert f"hidiff-export {command}" in result.output.lower().partition("example")[2]


def test_version() -> None:
    assert _invoke("--version").output == f"hidiff-export, version {__version__}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    result = _invoke("biuld")
    assert result.exit_code == 2
    assert "No such command 'biuld'" in result.output


def _invoke_failing(error: BaseException) -> Result:
    @click.command()
    def command() -> None:
        raise error

    with mock.patch.object(type(cli.main), "get_command", return_value=command):
        return _invoke("plan")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ParityError, 1), (CheckpointError, 3), (BundleError, 4), (ExportError, 5), (StorageError, 6)],
)
def test_errors_are_shown_without_a_traceback_and_own_their_exit_code(error: type[HidiffError], code: int) -> None:
    result = _invoke_failing(error("It broke.", given=7, advice="Mend it."))
    assert result.exit_code == code
    assert result.stderr == "Error: It broke.\ngiven: 7\nnext:  Mend it.\n"
    assert result.stdout == ""


def test_an_error_with_nothing_to_show_is_one_line() -> None:
    assert _invoke_failing(StorageError("It broke.")).stderr == "Error: It broke.\n"


def test_an_interrupt_is_130() -> None:
    result = _invoke_failing(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


def test_a_programming_error_keeps_its_traceback() -> None:
    assert isinstance(_invoke_failing(ZeroDivisionError()).exception, ZeroDivisionError)


def test_the_module_is_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "hidiff_export", "--version"], capture_output=True, text=True, check=True, timeout=600
    )
    assert run.stdout == f"hidiff-export, version {__version__}\n"
