"""The parameters of a model's configuration."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from hidiff_runtime import InputError
from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.serving.triton.model_parameters import AT_ONCE, Parameters, at_once

GIVEN = Parameters(
    "bundle", "abc", Limits(1, 2, 3, 4, 5), {"threads": 2, "prefetch": True, "memory_limit": 2**33}, ("/a", "/b c")
)


def config(parameters: dict[str, str]) -> dict[str, Any]:
    """As Triton hands it to a model."""
    return {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}


def test_they_are_read_as_they_were_written() -> None:
    assert Parameters.read(config(GIVEN.to_config())) == GIVEN
    assert {f"max_{field.name}" for field in fields(Limits)} < GIVEN.to_config().keys()


def test_limits_and_options_may_be_left_out() -> None:
    assert Parameters.read(config({"bundle": "b", "bundle_hash": "h"})) == Parameters("b", "h")


def test_requests_are_drawn_together_only_where_that_is_written() -> None:
    together = replace(GIVEN, dynamic_batching=True)
    assert Parameters.read(config(together.to_config())) == together
    assert together.to_config().keys() - GIVEN.to_config().keys() == {"dynamic_batching"}


@pytest.mark.parametrize(("given", "count"), [({}, 1), ({AT_ONCE: "8"}, 8), ({AT_ONCE: "0"}, 1)], ids=str)
def test_the_front_has_one_request_at_a_time_unless_told(given: dict[str, str], count: int) -> None:
    assert at_once(config(given)) == count


def test_a_front_that_is_told_no_number_says_so() -> None:
    with pytest.raises(InputError, match="at_once must be a whole number"):
        at_once(config({AT_ONCE: "many"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bundle": ""}, "no parameter bundle"),
        ({"bundle_hash": ""}, "no parameter bundle_hash"),
        ({"max_steps": "many"}, "max_steps must be a whole number"),
        ({"max_steps": "0"}, "positive"),
        ({"options": "{"}, "not JSON"),
        ({"options": "[]"}, "JSON object"),
        ({"options": '{"threads": [1]}'}, "JSON object"),
        ({"allow_links": "/mnt/store"}, "allow_links is not JSON"),
        ({"allow_links": '"/mnt/store"'}, "JSON array of paths"),
        ({"allow_links": "[1]"}, "JSON array of paths"),
        ({"dynamic_batching": "1"}, "dynamic_batching must be true or false"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Parameters.read(config({**GIVEN.to_config(), **change}))


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="no parameter bundle"):
        Parameters.read({})
