"""Rows of a bulk job: seeds, ids, values, and what is refused without stopping the rest."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hidiff_runtime.bulk.rows import DeadLetter, Row, derived_seed, find_rows, picture_name
from hidiff_runtime.errors import InputError
from hidiff_runtime.prompt_files.field_values import parse_value
from hidiff_runtime.prompt_files.raw_rows import Raw
from hidiff_runtime.text_safety import json_text

HASH = "b" * 64


def raws(*values: Any, text: bool = False) -> list[Raw]:
    return [Raw(number, f"line {number + 1}", value, text) for number, value in enumerate(values)]


def rows(*values: Any, seed: int = 0, **defaults: Any) -> list[Row]:
    found, refused = find_rows(raws(*values), seed=seed, defaults=defaults)
    assert refused == []
    return found


def test_a_row_without_a_seed_has_one_that_its_id_and_the_base_alone_decide() -> None:
    first = rows({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"})
    turned = rows({"id": "b", "prompt": "y"}, {"id": "c", "prompt": "x"}, {"id": "a", "prompt": "x"})
    seeds = {row.id: row.values["seed"] for row in (*turned, *first)}
    assert len(set(seeds.values())) == 3
    assert [row.values["seed"] for row in first] == [seeds["a"], seeds["b"]]
    assert rows({"id": "a", "prompt": "x"}, seed=1)[0].values["seed"] != seeds["a"]
    assert rows({"id": "a", "prompt": "x", "seed": 5})[0].values["seed"] == 5
    assert rows({"id": "a", "prompt": "x", "seed": -1})[0].values["seed"] == seeds["a"]


SEEDS = [1397146690, 3850745400, 94549754]
"""The first eight digits that ``printf 0:000000 | sha256sum`` shows, and so on."""


def test_derived_seeds_stay_what_they_were_in_every_release() -> None:
    assert [derived_seed(0, "000000"), derived_seed(0, "000001"), derived_seed(1, "000000")] == SEEDS


def test_rows_without_an_id_are_called_by_their_number() -> None:
    assert [row.id for row in rows({"prompt": "x"}, {"prompt": "y", "id": 7}, {"prompt": "z", "id": 8.0})] == [
        "000000",
        "7",
        "8",
    ]


def test_defaults_hold_where_a_row_says_nothing() -> None:
    first, second = rows({"prompt": "x"}, {"prompt": "y", "steps": 3}, steps=8, negative_prompt="fog")
    assert (first.values["steps"], second.values["steps"]) == (8, 3)
    assert second.values["negative_prompt"] == "fog"


def test_values_come_as_tables_have_them() -> None:
    (row,) = rows({"prompt": "x", "steps": 3.0, "seed": 4.0, "image": b"png", "mask": None, "resize": True})
    assert row.values["steps"] == 3
    assert type(row.values["steps"]) is int
    assert row.values["image"] == "data:;base64,cG5n"
    assert "mask" not in row.values
    (row,) = rows({"prompt": "x", "image": {"bytes": None, "path": "a.png"}, "mask": {"bytes": b"png", "path": "a"}})
    assert (row.values["image"], row.values["mask"]) == ("a.png", "data:;base64,cG5n")


def test_a_row_travels_as_json() -> None:
    (row,) = rows({"prompt": "é", "id": "x/y", "strength": 0.5, "image": b"\x00\xff"})
    assert Row.from_json(row.to_json()) == row


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "x", "steps": "3"}, "steps must be a whole number"),
        ({"prompt": "x", "steps": 3.5}, "steps must be a whole number"),
        ({"prompt": "x", "steps": True}, "steps must be a whole number"),
        ({"prompt": "x", "resize": 1}, "resize must be true or false"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "x", "image": 3}, "image must be a path"),
        ({"prompt": "x", "sead": 3}, "no such field"),
        ({"prompt": "x", "id": ""}, "An id must be"),
        ({"prompt": "x", "id": ["a"]}, "An id must be"),
        ({"prompt": "x", "seed": float("nan")}, "seed must be a whole number"),
        ({"prompt": "x", "seed": 2.0**60}, "seed has lost its last digits"),
        ({"prompt": "x", "eta": float("inf")}, "eta must be a number"),
        ({"prompt": "x", "eta": 10**400}, "eta must be a number"),
        ({"prompt": "a \ud800 boat"}, "A prompt has a half of a surrogate pair"),
        ({"prompt": "x", "negative_prompt": "\udfff"}, "A negative prompt has a half of a surrogate pair"),
        ({"prompt": "x", "sampler": "\ud800"}, "A sampler has a half of a surrogate pair"),
        ({"prompt": "x", "image": "\ud800.png"}, "A path (image) has a half of a surrogate pair"),
        ({"prompt": "x", "image": "a\x00.png"}, "A path (image) has a control character"),
        ({"prompt": "x", "id": "\ud800"}, "The id has half of a surrogate pair"),
        ({"prompt": "x", "\ud800": 1}, "no such field"),
        ({"prompt": "x", "id": "A"}, "Another row has this id"),
        (InputError("It is not JSON."), "It is not JSON"),
    ],
)
def test_what_is_no_row_is_refused_and_the_rest_stands(values: Any, reason: str) -> None:
    found, refused = find_rows(
        raws({"prompt": "x", "id": "a"}, values, {"prompt": "z", "id": "b"}), seed=0, defaults={}
    )
    assert [row.id for row in found] == ["a", "b"]
    assert reason in refused[0].reason
    assert (refused[0].row, refused[0].where, refused[0].kind) == (1, "line 2", "input")
    assert DeadLetter(**json.loads(json_text(dataclasses.asdict(refused[0])).encode())) == refused[0]


def test_columns_may_be_left_out() -> None:
    found, _ = find_rows(raws({"prompt": "x", "note": 3}), seed=0, defaults={}, ignored=["note"])
    assert "note" not in found[0].values


def test_csv_has_text_alone() -> None:
    found, refused = find_rows(
        raws({"prompt": "x", "seed": "", "steps": "8", "resize": "True"}, {"prompt": "x", "steps": "many"}, text=True),
        seed=0,
        defaults={},
    )
    assert (found[0].values["steps"], found[0].values["resize"]) == (8, True)
    assert found[0].values["seed"] == derived_seed(0, "000000")
    assert "whole number" in refused[0].reason
    with pytest.raises(InputError, match="no such field"):
        parse_value("sead", "1")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", " 7 ", 7),
        ("seed", "-7", -7),
        ("seed", "3.0", 3),
        ("seed", "18446744073709551615", 2**64 - 1),
        ("eta", "1e-1", 0.1),
        ("eta", ".5", 0.5),
        ("resize", " FALSE", False),
    ],
)
def test_numbers_written_as_text(name: str, text: str, value: object) -> None:
    assert parse_value(name, text) == value
    assert type(parse_value(name, text)) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("seed", text) for text in ("1_0", "3.5", "٣", "true", "1" * 5000, "")),
        *(("eta", text) for text in ("nan", "inf", "1e999", "1_0.5")),
        ("resize", "yes"),
    ],
)
def test_what_is_no_number_is_refused(name: str, text: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be"):
        parse_value(name, text)


def test_names_are_file_names_and_all_different() -> None:
    ids = [
        "a",
        "a/b",
        "a%2Fb",
        "../x",
        "..",
        ".",
        "a b",
        "é",
        "x" * 500,
        "x" * 501,
        "x" * 180,
        "~",
        "a\\b",
        "a\x00",
        "con",
    ]
    names = [picture_name(row_id) for row_id in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert not set(name) & set("/\\\x00:")
        assert not name.startswith(".")
        assert 0 < len(name.encode()) <= 180
    assert picture_name("boat-7_b") == "boat-7_b"


def test_a_fingerprint_tells_rows_and_bundles_apart() -> None:
    first, second, third = rows(
        {"prompt": "x", "id": "a", "seed": 1}, {"prompt": "x", "id": "b", "seed": 1}, {"prompt": "y", "seed": 1}
    )
    prints = {first.fingerprint(HASH), second.fingerprint(HASH), third.fingerprint(HASH), first.fingerprint("c" * 64)}
    assert len(prints) == 4
    assert first.fingerprint(HASH) == rows({"id": "a", "seed": 1, "prompt": "x"})[0].fingerprint(HASH)
