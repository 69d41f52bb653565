"""`hidiff-export generate` is `hidiff-run generate`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_runtime import cli


def test_help_is_the_runtimes_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    expected = capsys.readouterr().out.replace("hidiff-run", "hidiff-export")
    for ask in ("--help", "-h"):
        found = CliRunner().invoke(main, ["generate", ask])
        assert found.exit_code == 0
        assert "".join(found.output.split()) == "".join(expected.split())
    assert 'hidiff-export generate bundle -p "a lighthouse' in expected
    assert "generate" in CliRunner().invoke(main, ["--help"]).output


def test_arguments_and_exit_codes_are_handed_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", str(tmp_path), "-p", "-5 degrees, 100%", "--seed", "-1", "-o", "out.png"]
    missing = CliRunner().invoke(main, command)
    assert missing.exit_code == 4
    assert "not a finished bundle" in missing.output
    seen: list[list[str]] = []

    def record(arguments: list[str], *, program: str) -> int:
        seen.append([program, *arguments])
        return 130

    monkeypatch.setattr(cli, "main", record)
    assert CliRunner().invoke(main, command).exit_code == 130
    assert seen == [["hidiff-export", *command]]


def test_usage_errors_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "80")
    found = CliRunner().invoke(main, ["generate", "bundle", "-o", "out.png"])
    assert found.exit_code == 2
    assert "--prompt" in found.output
