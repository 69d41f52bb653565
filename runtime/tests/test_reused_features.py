from __future__ import annotations

import pytest

from hidiff_runtime.reused_features import Reuse


def told(reuse: Reuse, phases: str, computed: str | None = None) -> str:
    """F for full evaluations, s for shallow ones, - for those that are not computed."""
    due = [mark != "-" for mark in computed or phases]
    shallow = reuse.shallow(list(phases), due)
    return "".join("-" if not one else "s" if taken else "F" for one, taken in zip(due, shallow, strict=True))


@pytest.mark.parametrize(
    ("every", "phases", "expected"),
    [
        (2, "aaaaaaa", "FsFsFsF"),
        (3, "aaaaaaa", "FssFssF"),
        (3, "aaaabbbb", "FssFFssF"),
        (50, "aaabbbccc", "FssFssFss"),
        (3, "a", "F"),
    ],
)
def test_features_serve_for_so_many_evaluations_of_one_phase(every: int, phases: str, expected: str) -> None:
    assert told(Reuse(every), phases) == expected


def test_forecast_evaluations_age_features_too() -> None:
    assert told(Reuse(3), "aaaaaaaaaaa", "xxxx-x-x--x") == "FssF-s-F--F"
    assert told(Reuse(3), "aaaaaabbbbb", "xxxxx-x--xx") == "FssFs-F--Fs"
    assert told(Reuse(3), "aaabb", "xx--x") == "Fs--F"
