"""Which contenders a size has, of bundles that share it or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hidiff_export.benchmarking.lineup import Lineup, benched_bundles, recipes_of
from hidiff_export.benchmarking.peers import wanted_peers
from hidiff_export.errors import EngineError, InputError
from hidiff_runtime import backends
from hidiff_runtime.backends.protocol import Availability


def lineup(*folders: Path, sizes: tuple[tuple[int, int], ...] = ()) -> Lineup:
    bundles = benched_bundles(folders, None, sizes, ())
    store = folders[0] / "unet/weights.safetensors"
    return Lineup(bundles, recipes_of(bundles), store, wanted_peers("diffusers,eager", ("float32",)))


def test_peers_come_before_bundles_and_no_two_rows_have_one_name(sd15_bundle: Path) -> None:
    found, left_out = lineup(sd15_bundle, sd15_bundle).competitors((128, 128))
    name = sd15_bundle.name
    assert [one.name for one in found] == ["diffusers", "eager", f"{name} onnxruntime", f"{name}-2 onnxruntime"]
    assert [one.bundle for one in found] == [False, False, True, True]
    assert left_out == {}
    assert found[2].settings["options"] == {"threads": 1, "profile": False}


def test_the_recipe_of_a_size_is_of_that_size_alone(sd15_bundle: Path) -> None:
    one = lineup(sd15_bundle)
    assert one.sizes == ((128, 128),)
    assert one.work((128, 128)).size == "128x128"
    assert one.recipes[128, 128].shapes == ((128, 128, 1),)


def test_a_size_that_no_bundle_has_is_refused(sd15_bundle: Path) -> None:
    with pytest.raises(InputError, match="No bundle has this size"):
        lineup(sd15_bundle, sizes=((128, 128), (256, 256)))


def test_engines_that_do_not_run_here_are_no_contenders(sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Availability(False, "it is missing", "Get it.")
    monkeypatch.setattr(backends.get("onnxruntime").__class__, "available", lambda _self: missing)
    with pytest.raises(EngineError, match="No engine of this bundle runs here") as caught:
        lineup(sd15_bundle)
    assert "onnxruntime" in str(caught.value.given)
