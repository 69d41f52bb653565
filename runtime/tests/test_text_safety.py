"""Text that no file takes as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hidiff_runtime.text_safety import encodable, json_text, printable


@pytest.mark.parametrize(
    ("text", "made"),
    [("a boat", "a boat"), ("é \U0001f600 \u2028", "é \U0001f600 \u2028"), ("a \ud800b\udcff", "a \\ud800b\\udcff")],
)
def test_halves_of_pairs_are_written_out_and_all_else_stays(text: str, made: str) -> None:
    assert encodable(text) == made
    made.encode()


def test_json_is_read_back_as_it_was_from_a_file(tmp_path: Path) -> None:
    value = {"id": "\ud800", "prompt": "a\u2028b\u0085c \U0001f600 é", "\udfff": [1, 2.5, None]}
    path = tmp_path / "a.json"
    path.write_bytes(json_text(value).encode())
    assert json.loads(path.read_bytes()) == value
    assert "é" in path.read_text(encoding="utf-8")  # readable, where it can be


def test_a_line_for_a_terminal_has_no_controls() -> None:
    assert printable("a é b") == "a é b"
    assert printable("a\x1b[31m\nb\u2028\ud800") == "a\\x1b[31m\\nb\\u2028\\ud800"
