from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

import pytest

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import Fields
from hidiff_runtime.format.record_codec import (
    FLAT,
    LATER,
    OMITTED,
    UNWRITTEN,
    AnyText,
    BundlePath,
    Float,
    FloatOrInf,
    Shape,
    decode,
    encode,
    key,
    whole,
)


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Part:
    name: str
    path: BundlePath | None = None


@dataclass(frozen=True)
class Place:
    row: int
    color: Color


@dataclass(frozen=True)
class Whole:
    place: Place = field(metadata=FLAT)
    share: Float
    ratio: FloatOrInf
    few: Annotated[int, whole(1, 3)]
    shape: Shape
    flag: bool
    note: AnyText
    parts: tuple[Part, ...]
    counts: Mapping[str, tuple[int, ...]]
    anything: Mapping[str, Any]
    kept: tuple[str, ...] = field(repr=False, metadata=UNWRITTEN)
    called: str = field(default="x", metadata=key("name"))
    later: int | None = field(default=None, metadata=LATER)
    omitted: Mapping[str, str] = field(default_factory=dict, metadata=OMITTED)


WHOLE = Whole(
    place=Place(2, Color.BLUE),
    share=0,
    ratio=-math.inf,
    few=3,
    shape=(1, 2),
    flag=False,
    note="",
    parts=(Part("a", "b/c"), Part("d")),
    counts={"one": (1, 2), "none": ()},
    anything={"x": [None, {"y": 0}]},
    kept=("kept",),
)
WRITTEN = (
    '{"row": 2, "color": "blue", "share": 0.0, "ratio": "-inf", "few": 3, "shape": [1, 2], "flag": false, "note": "", '
    '"parts": [{"name": "a", "path": "b/c"}, {"name": "d", "path": null}], "counts": {"one": [1, 2], "none": []}, '
    '"anything": {"x": [null, {"y": 0}]}, "name": "x", "later": null}'
)


def read(data: Any) -> Whole:
    return decode(Whole, Fields(data, "it.json"), kept=("kept",))


def test_a_dataclass_is_written_in_the_order_of_its_fields_and_read_back() -> None:
    assert json.dumps(encode(WHOLE)) == WRITTEN
    assert read(json.loads(WRITTEN)) == WHOLE


def test_a_field_that_older_files_lack_is_at_its_default() -> None:
    data = json.loads(WRITTEN)
    del data["later"]
    assert read(data) == WHOLE
    assert read({**data, "later": 1, "omitted": {"a": "b"}}).omitted == {"a": "b"}


def test_a_field_is_left_out_only_as_long_as_it_is_at_its_default() -> None:
    other = read({**json.loads(WRITTEN), "omitted": {"a": "b"}})
    assert encode(other)["omitted"] == {"a": "b"}
    assert "omitted" not in encode(WHOLE)


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        (("row",), ..., "row is missing"),
        (("name",), ..., "name is missing"),
        (("more",), 1, "more is not a field of this format"),
        (("kept",), [], "kept is not a field of this format"),
        (("row",), -1, "row must be a whole number of 0 or more"),
        (("row",), True, "row must be a whole number"),
        (("row",), 1.0, "row must be a whole number"),
        (("row",), 2**31, "row must be a whole number of 2147483647 at most"),
        (("color",), "green", "color must be one of red, blue"),
        (("color",), None, "color must be a text"),
        (("share",), "0", "share must be a number"),
        (("share",), 1e39, "share must be a number that float32 can hold"),
        (("ratio",), "nan", "ratio must be a number, 'inf' or '-inf'"),
        (("few",), 4, "few must be a whole number of 3 at most"),
        (("shape",), [], "shape must have 1 to 8 axes"),
        (("shape", 1), 0, r"shape\[1\] must be a whole number of 1 or more"),
        (("flag",), 0, "flag must be true or false"),
        (("note",), None, "note must be a text"),
        (("parts",), {}, "parts must be a list"),
        (("parts", 1), [], r"parts\[1\] must be an object"),
        (("parts", 0, "name"), "", r"parts\[0\].name must be a text"),
        (("parts", 0, "more"), 1, r"parts\[0\].more is not a field"),
        (("parts", 0, "path"), "../c", r"parts\[0\].path must not have"),
        (("counts",), [], "counts must be an object"),
        (("counts", "one", 1), "2", r"counts.one\[1\] must be a whole number"),
        (("anything",), [], "anything must be an object"),
        (("later",), "1", "later must be a whole number"),
    ],
    ids=str,
)
def test_what_is_not_as_its_type_says_is_named_by_its_path(way: tuple[Any, ...], value: object, message: str) -> None:
    data = json.loads(WRITTEN)
    *above, last = way
    place = data
    for part in above:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(BundleError, match=rf"it\.json: {message}") as caught:
        read(data)
    assert caught.value.exit_code == 4
