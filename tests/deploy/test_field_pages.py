"""The pages' tables of a request's fields agree with the one that the code has: names, types, bounds and defaults."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from hidiff_runtime.cli import generate
from hidiff_runtime.pipeline.request_fields import BY_NAME, PICTURES, SETTINGS, STEPS
from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.serving.triton.schema import INPUTS, OUTPUT, OUTPUTS

ROOT = Path(__file__).parents[2]
TYPES = {"TYPE_STRING": "BYTES", "TYPE_INT64": "INT64", "TYPE_FP64": "FP64", "TYPE_BOOL": "BOOL"}
"""Triton's clients call types otherwise than its configuration."""


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table that begins with this cell."""
    table = (ROOT / page).read_text(encoding="utf-8").partition(f"| {head} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def said(page: str, head: str, name: str) -> str:
    """What a table says of a field."""
    (found,) = (" | ".join(cells) for cells in rows(page, head) if name in names(cells[0]))
    return found


def test_tritons_inputs_and_their_types() -> None:
    told = {}
    for name_cell, type_cell, *_ in rows("docs/triton.md", "input"):
        called, types = names(name_cell), names(type_cell)
        told |= dict(zip(called, types if len(types) == len(called) else types * len(called), strict=True))
    assert told == {tensor.name: TYPES[tensor.datatype] for tensor in INPUTS}


def test_tritons_bounds_and_defaults() -> None:
    def triton(name: str) -> str:
        return said("docs/triton.md", "input", name)

    assert f"{SETTINGS['seed'].default} if left out; {SETTINGS['seed'].bounds[0]} is a random one" in triton("seed")
    assert f"{STEPS}, or the nearest" in triton("steps")
    low, high = SETTINGS["guidance_rescale"].bounds
    assert f"`guidance_rescale` from {low} to {high}; the bundle's own if left out" in triton("guidance_rescale")
    assert f"`{OUTPUTS[0]}` (left out)" in triton(OUTPUT)


def test_the_servers_bounds() -> None:
    def serve(name: str) -> str:
        return said("docs/serve.md", "field", name)

    assert f"up to {Limits().prompt_characters} characters each" in serve("prompt")
    assert f"pictures, 1 to {Limits().pictures}" in serve("n")
    assert SETTINGS["seed"].bounds == (-1, 2**64 - 1)
    assert "0 to 2**64 - 1. Where it is left out or -1" in serve("seed")
    scales = [field for name, field in SETTINGS.items() if name in ("guidance_scale", "conditioning_scale")]
    assert {field.bounds for field in scales} == {(-1000, 1000)}
    assert "Scales from -1000 to 1000" in serve("guidance_scale")


@pytest.mark.parametrize(("page", "head"), [("docs/serve.md", "field"), ("docs/bulk.md", "column")])
def test_each_field_is_told_once(page: str, head: str) -> None:
    table = rows(page, head)
    told = [name for cells in table for name in names(cells[0]) if name in BY_NAME]
    assert len(told) == len(set(told))
    assert {name for cells in table for cell in cells for name in names(cell)} >= BY_NAME.keys()


def test_the_runtimes_page_names_pictures_and_options_that_there_are() -> None:
    given = {name for cells in rows("runtime/README.md", "what is given") for name in names(cells[0])}
    assert given == set(PICTURES)
    (told,) = (cells[1] for cells in rows("runtime/README.md", "what is given") if cells[0] == "`image`")
    assert re.findall(r"0\.\d", told) == re.findall(r"0\.\d", SETTINGS["strength"].help)[:2]
    parser = argparse.ArgumentParser()
    generate.add_options(parser)
    options = set(re.findall(r"--[a-z][a-z0-9-]*", parser.format_help()))
    page = (ROOT / "runtime/README.md").read_text(encoding="utf-8")
    assert f"{STEPS} steps or the nearest" in page
    commands = [line for line in page.splitlines() if line.startswith("hidiff-run generate")]
    assert commands
    assert {name for line in commands for name in re.findall(r"(?<= )--[a-z-]+", line)} <= options
