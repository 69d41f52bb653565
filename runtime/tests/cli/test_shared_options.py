"""Options of several commands: how they are read."""

from __future__ import annotations

import argparse

import pytest

from hidiff_runtime.cli.shared_options import add_opening, byte_count, opening


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("6442450944", 6 * 2**30),
        ("6GiB", 6 * 2**30),
        ("6 gib", 6 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("500MB", 500_000_000),
        ("500MiB", 500 * 2**20),
        ("2kB", 2000),
        ("2TB", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_bytes_are_read_with_their_unit(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "0GiB", "0.1", "-1", "nan", "GiB", "6G", "6GiBs", "1e9", "6,5GiB", "٦GiB"])
def test_what_is_no_number_of_bytes_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write 6GiB, 500MB or 6442450944"):
        byte_count(text)


def test_a_memory_limit_is_how_a_bundle_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_opening(parser)
    assert opening(parser.parse_args(["--memory-limit", "2GiB"]))["memory_limit"] == 2**31
    assert opening(parser.parse_args([]))["memory_limit"] is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--memory-limit", "none"])
    assert "'none' is no number of bytes" in capsys.readouterr().err
