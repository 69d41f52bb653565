from __future__ import annotations

from pathlib import Path

import pytest

from hidiff_export.compiler.compile import build
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.costly_settings import costly_settings
from tests.conftest import NoDisplay


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("forecast=true", "guidance_until=0.6", "reuse=3"), ()),
        (("reuse=24",), ()),
        (("reuse=25",), ("reuse: features serve for up to 25 of 50 steps",)),
        (("reuse=3", "steps=4"), ("reuse: features serve for up to 3 of 4 steps",)),
        (("guidance_until=0.02",), ()),
        (("forecast={window: 4.0, growth: 1.0}",), ()),
        (("forecast={warm_up: 2, window: 20.0, last: 0}",), ("forecast: 4 of 50 steps are computed",)),
    ],
)
def test_what_changes_a_picture_as_another_seed_does_is_told(changes: tuple[str, ...], told: tuple[str, ...]) -> None:
    found = costly_settings(Recipe.load("tiny", ("steps=1-50", *changes)))
    assert len(found) == len(told)
    for line, beginning in zip(found, told, strict=True):
        assert line.startswith(beginning)
        assert "as much as another seed" in line


@pytest.mark.slow
def test_a_build_tells_it(tmp_path: Path) -> None:
    changes = ("reuse=3", "steps=4", "width=64", "height=64", "text=false", "vae=false")
    result = build(Recipe.load("tiny", changes), tmp_path / "bundle", NoDisplay())
    assert any(notice.startswith("reuse: features serve") for notice in result.notices)
