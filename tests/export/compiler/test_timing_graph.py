"""A bundle for several backends has a timing graph, once for all sizes, and keeps it through all that changes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from hidiff_export.cli import main
from hidiff_export.compiler.compile import build
from hidiff_export.compiler.stages.order import check_order, stages_of
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.compiler.stages.timing_graph import timing_record
from hidiff_export.recipe import Recipe
from hidiff_runtime import check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from hidiff_runtime.timing_worker import measure
from tests.conftest import NoDisplay

BOTH = "backend=[openvino, onnxruntime]"
TINY = ("width=128", "height=128", "sampler=ddim", "steps=[3]", "text=false", "vae=false")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The tiny recipe's UNet with engines of both."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "timed-bundle"
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            build(Recipe.load("tiny", [*TINY, BOTH]), folder, NoDisplay())
    return folder


def test_it_is_timed_with_each_backend(bundle: Path) -> None:
    timing = Manifest.read(bundle).timing
    assert timing is not None
    assert timing.graph == "unet/timing.onnx"
    assert set(timing.engines) == {"openvino", "onnxruntime"}
    seconds, failed = measure(bundle, [*timing.engines], {"threads": 1})
    assert set(seconds) == set(timing.engines)
    assert not failed
    with open_bundle(bundle) as opened:
        assert opened.backend_reason.startswith("the fastest here")
    assert check(bundle, runs=False).ok


def test_a_bundle_of_one_backend_has_none(sd15_bundle: Path) -> None:
    manifest = Manifest.read(sd15_bundle)
    assert manifest.timing is None
    assert "timing" not in manifest.to_json()
    assert not (sd15_bundle / "unet/timing.onnx").exists()


def test_one_that_a_build_for_several_left_is_none_of_a_build_for_one(bundle: Path) -> None:
    """A folder that a build goes on in may hold it, though nothing of this build wrote it."""
    several, one = (Recipe.load("tiny", [*TINY, *more]) for more in ([BOTH], []))
    assert timing_record(StageContext.of(several, bundle)) is not None
    assert timing_record(StageContext.of(one, bundle)) is None


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_it_is_made_before_the_engines_and_for_all_sizes_once(precision: str) -> None:
    changes = [f"precision={precision}", "also=[192x128x1]"]
    alone = Recipe.load("tiny", [*TINY, *changes])
    stages = stages_of(Recipe.load("tiny", [*TINY, *changes, BOTH]))
    check_order(stages)
    names = [stage.name for stage in stages]
    assert names.count("timing") == 1
    assert names.index("timing") + 1 == names.index("engines")
    assert [name for name in names if name != "timing"] == [stage.name for stage in stages_of(alone)]


@pytest.mark.slow
def test_sizes_come_and_go_and_weights_change_beside_it(bundle: Path, tmp_path: Path) -> None:
    before = Manifest.read(bundle)
    assert before.timing is not None
    other = tmp_path / "other"
    run = CliRunner().invoke
    result = run(main, ["rebase", str(bundle), "-o", str(other), "--set", "source=random:1", "--json"])
    assert result.exit_code == 0, result.output
    rebased = Manifest.read(other)
    assert rebased.timing == before.timing
    assert rebased.files["unet/timing.onnx"] == before.files["unet/timing.onnx"]
    result = run(main, ["add", str(other), "--size", "192x128", "--json"])
    assert result.exit_code == 0, result.output
    assert Manifest.read(other).timing == before.timing
    result = run(main, ["remove", str(other), "--size", "192x128", "--json"])
    assert result.exit_code == 0, result.output
    after = Manifest.read(other)
    assert after.timing == before.timing
    assert after.files["unet/timing.openvino.json"] == before.files["unet/timing.openvino.json"]
