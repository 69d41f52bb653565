"""The page on bulk jobs names what there is, and the compiler's command is the runtime's."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_runtime.cli import EXIT_CODES, bulk
from hidiff_runtime.pipeline.request_fields import FIELDS

PAGE = (Path(__file__).parents[2] / "docs/bulk.md").read_text(encoding="utf-8")


def options() -> set[str]:
    parser = argparse.ArgumentParser()
    bulk.add_options(parser)
    return set(re.findall(r"--[a-z][a-z0-9-]*", parser.format_help()))


def test_every_option_and_column_is_there() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", PAGE))
    assert named <= options()
    columns = PAGE[PAGE.index("| column |") : PAGE.index("Empty values")]
    assert set(re.findall(r"`(\w+)`", columns)) == {"id", *(field.name for field in FIELDS)} | {"000000"}


def test_every_option_of_its_own_is_told() -> None:
    parser = argparse.ArgumentParser()
    bulk._add_rows(parser)
    bulk._add_workers(parser)
    bulk._add_results(parser)
    own = set(re.findall(r"--[a-z][a-z0-9-]*", parser.format_help())) - {"--help", "--object-store"}
    assert own <= set(re.findall(r"--[a-z][a-z0-9-]*", PAGE)) | {"--output"}


def test_exit_codes_are_told() -> None:
    section = PAGE[PAGE.index("## Progress, results, exit codes") :]
    for code in re.findall(r"\b(\d+) ", EXIT_CODES):
        assert re.search(rf"\b{code}\b", section), code


def test_the_compilers_command_is_the_runtimes(capfd: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(main, ["bulk", "--help"], standalone_mode=False)
    assert result.exit_code == 0
    assert "hidiff-export bulk" in result.output + capfd.readouterr().out
