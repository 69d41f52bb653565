"""Documented names of the last release still work, and say what to write instead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import metadata

import pytest
from packaging.requirements import Requirement

import hidiff_export
from hidiff_runtime.bulk import ray_pool, storage


@pytest.mark.parametrize(
    ("old", "name", "now", "said"),
    [
        ("hidiff_export.integrations.diffusers", "BundleUNet", lambda: hidiff_export.BundleUNet, "from hidiff_export"),
        ("hidiff_runtime.bulk.cluster", "Pool", lambda: ray_pool.Pool, "hidiff_runtime.bulk.ray_pool"),
    ],
    ids=["BundleUNet", "Pool"],
)
def test_a_module_that_moved_is_still_there(old: str, name: str, now: Callable[[], object], said: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=said):
        module = import_module(old)
    assert getattr(module, name) is now()


def test_a_location_is_still_called_a_place() -> None:
    assert storage.Place is storage.Location


def test_an_extra_that_is_spelled_anew_is_still_there() -> None:
    def wanted(extra: str) -> set[str]:
        lines = map(Requirement, metadata("hidiff-export").get_all("Requires-Dist") or [])
        return {
            f"{line.name}{line.specifier}" for line in lines if line.marker and line.marker.evaluate({"extra": extra})
        }

    assert wanted("quantisation") == wanted("quantization") > wanted("cpu")
