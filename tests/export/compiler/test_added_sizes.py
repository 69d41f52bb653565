"""Sizes that come to a finished bundle and go: what is drawn, what stays, and what an end in between leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_export.compiler.buckets import add_bucket, remove_bucket
from hidiff_export.compiler.compile import build
from hidiff_export.compiler.stages.reference import ReferenceStage
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.compiler.stages.weights import checkpoints
from hidiff_export.errors import BundleError, CheckpointError, InputError, RecipeError
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Precision
from hidiff_export.verification.report import Check, GraphResults, Report, store
from hidiff_runtime import Pipeline, check
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.manifest import Contents, Manifest
from hidiff_runtime.verification.comparison import Bound, compare
from tests.conftest import NoDisplay

WIDE = (192, 128)
GRAPHS = GraphResults(Precision.FLOAT32, engines_widen=True)
WEIGHTS = "unet/weights.safetensors"
SMALL = (
    *("width=64", "height=64", "text=false", "vae=false", "sampler=ddim", "steps=[3]"),
    "hidiffusion.thresholds.strided=1.0",  # one phase, for the time
)
ASKED = {"seed": 3, "steps": 3, "guidance_scale": 4.0}


def recipe_of(folder: Path, **changes: object) -> Recipe:
    kept = {key: value for key, value in Manifest.read(folder).recipe.items() if key not in ("width", "height")}
    return Recipe.from_dict({**kept, **changes})


@pytest.fixture(scope="module")
def wide(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the second size alone."""
    folder = tmp_path_factory.mktemp("wide") / "bundle"
    build(recipe_of(sd15_bundle, width=WIDE[0], height=WIDE[1]), folder, NoDisplay())
    return folder


@pytest.fixture(scope="module")
def both(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one size, to which another was added."""
    folder = tmp_path_factory.mktemp("both") / "bundle"
    shutil.copytree(sd15_bundle, folder)
    add_bucket(folder, WIDE, None, NoDisplay())
    return folder


@pytest.fixture
def folder(both: Path, tmp_path: Path) -> Path:
    shutil.copytree(both, tmp_path / "bundle")
    return tmp_path / "bundle"


def drawn(folder: Path, **settings: object) -> np.ndarray:
    with Pipeline.open(folder) as pipe:
        return np.asarray(pipe("a boat on a lake", **ASKED, **settings))  # type: ignore[arg-type]


def test_each_size_is_drawn_as_by_a_bundle_of_its_own(both: Path, wide: Path, sd15_bundle: Path) -> None:
    assert np.array_equal(drawn(both), drawn(sd15_bundle))
    found = drawn(both, width=192, height=128)
    assert found.shape == (128, 192, 3)
    assert np.array_equal(found, drawn(wide))
    assert not np.array_equal(found, drawn(wide, guidance_rescale=0.5))


def test_what_was_there_is_as_it_was(both: Path, sd15_bundle: Path) -> None:
    before, after = Contents.read(sd15_bundle), Contents.read(both)
    assert before.files.items() <= after.files.items()
    assert after.buckets[0] == before.buckets[0]
    graphs = [record.sha256 for path, record in after.files.items() if path.endswith(".onnx")]
    assert len(set(graphs)) == len(graphs)
    weights = {path for path in after.files if path.endswith("weights.safetensors")}
    assert weights == {path for path in before.files if path.endswith("weights.safetensors")}
    new = sum(record.size for path, record in after.files.items() if path not in before.files)
    assert 0 < new < 12e6


def test_it_is_proven_bucket_by_bucket(both: Path) -> None:
    report = check(both)
    assert report.ok, report.render()
    assert {verdict.bucket for verdict in report.verdicts} == {"128x128", "192x128"}
    phases = [verdict.phase for verdict in report.verdicts if verdict.bucket == "192x128" and verdict.step is not None]
    assert sorted(set(map(str, phases))) == ["strided", "windowed"]
    assert len(phases) == 2


@pytest.mark.parametrize(
    ("tile", "decoders"),
    [("64", [["decoder"], [], [], []]), ("null", [["decoder"], ["decoder-128x64"], [], []])],
)
def test_a_graph_that_several_sizes_have_is_there_once(tile: str, decoders: list[list[str]]) -> None:
    changes = ("sizes=[128x128, 128x64]", "batches=[1, 2]", f"vae_tile={tile}")
    buckets = StageContext.of(Recipe.load("tiny", changes), Path()).buckets
    found = [path for bucket in buckets for path in bucket.graphs]
    assert len(set(found)) == len(found)
    assert [[path.stem for path in one.graphs if path.stem.startswith("decoder")] for one in buckets] == decoders
    assert sum(path.parent.name == "text_encoder" for path in found) == 1
    for bucket in buckets:
        named = bucket.vae_graph("decoder")
        assert named in found
        sizes = {
            (one.recipe.tiles.width, one.recipe.tiles.height) for one in buckets if one.vae_graph("decoder") == named
        }
        assert sizes == {(bucket.recipe.tiles.width, bucket.recipe.tiles.height)}


def test_a_recipe_of_both_sizes_makes_the_same_files(both: Path, sd15_bundle: Path, tmp_path: Path) -> None:
    recipe = recipe_of(sd15_bundle, sizes=["128x128", "192x128"])
    build(recipe, tmp_path / "bundle", NoDisplay())
    assert Contents.read(tmp_path / "bundle").files == Contents.read(both).files
    assert Contents.read(tmp_path / "bundle").buckets == Contents.read(both).buckets


def test_what_came_goes(folder: Path, sd15_bundle: Path) -> None:
    remove_bucket(folder, WIDE, None, NoDisplay())
    assert Contents.read(folder).files == Contents.read(sd15_bundle).files
    assert Contents.read(folder).buckets == Contents.read(sd15_bundle).buckets
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bundle"]
    assert np.array_equal(drawn(folder), drawn(sd15_bundle))


def test_what_cannot_come_or_go_is_refused_and_nothing_is_changed(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="has this size already") as caught:
        add_bucket(folder, WIDE, 1, NoDisplay())
    assert caught.value.advice == "It has 128x128; 192x128."
    with pytest.raises(RecipeError, match="multiples of 8"):
        add_bucket(folder, (130, 128), None, NoDisplay())
    with pytest.raises(InputError, match="no such size") as caught:
        remove_bucket(folder, (192, 192), None, NoDisplay())
    assert caught.value.advice == "It has 128x128; 192x128."
    with pytest.raises(InputError, match="first size of a bundle stays"):
        remove_bucket(folder, (128, 128), None, NoDisplay())
    for words in (["--size", "wide"], ["--size", "192x128", "--batch", "0"], []):
        assert CliRunner().invoke(main, ["add", str(folder), *words]).exit_code == 2
    assert (folder / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bundle"]


def test_a_build_that_ends_in_between_leaves_the_old_bundle_and_succeeds_again(
    sd15_bundle: Path, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sd15_bundle, folder)
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceStage, "run", lambda *_: signal.raise_signal(signal.SIGINT))
        ended = CliRunner().invoke(main, ["add", str(folder), "--size", "192x128"])
    assert (ended.exit_code, "Run the same command again to go on" in ended.output) == (130, True)
    assert Contents.read(folder) == Contents.read(sd15_bundle)
    assert check(folder, runs=False).ok
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bundle", "bundle.partial"]
    assert (tmp_path / "bundle.partial" / WEIGHTS).samefile(folder / WEIGHTS)
    result = add_bucket(folder, WIDE, None, NoDisplay())
    assert (folder / WEIGHTS).stat().st_nlink == 1
    assert Contents.read(folder).files == Contents.read(both).files
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bundle"]
    assert {stage.title: stage.reused for stage in result.stages} == {
        "what stays": True,
        "graphs, 192x128": True,
        "engines, 192x128": True,
        "PyTorch reference, 192x128": False,
    }


def test_nothing_of_the_checkpoint_is_read(both: Path, sd15_bundle: Path, tmp_path: Path) -> None:
    """One that is another by now would give graphs over weights that the bundle does not have."""
    folder, checkpoint = tmp_path / "bundle", tmp_path / "checkpoint"
    shutil.copytree(sd15_bundle, folder)
    checkpoint.mkdir()
    (checkpoint / "model_index.json").write_text('{"_class_name": "StableDiffusionInstructPix2PixPipeline"}')
    before = Contents.read(folder)
    gone = [{"path": str(tmp_path / "gone.safetensors"), "scale": 0.5}]
    told = {**before.shared.recipe, "source": str(checkpoint), "unet_width": "demo", "lora": gone}
    changed = before.sharing(recipe=told, force_zeros_for_empty_prompt=False)
    (folder / "manifest.json").write_text(json.dumps(changed.to_json()))
    with pytest.raises(CheckpointError):
        checkpoints(Recipe.from_dict(told))
    add_bucket(folder, WIDE, None, NoDisplay())
    after, expected = Contents.read(folder), Contents.read(both)
    assert after.buckets == expected.buckets
    facts = "reference/192x128/samples.json"
    assert {path for path in expected.files if after.files[path] != expected.files[path]} == {facts}
    assert json.loads((folder / facts).read_text())["facts"]["force_zeros_for_empty_prompt"] is False


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        (("task=controlnet", "controlnet=random:1"), "graphs"),
        (("precision=int8",), "quantization"),
    ],
    ids=["controlnet", "int8"],
)
def test_other_kinds_of_bundles_take_sizes_too_from_linked_files(
    changes: tuple[str, ...], stage: str, tmp_path: Path
) -> None:
    folder, other = tmp_path / "bundle", tmp_path / "linked"
    build(Recipe.load("tiny", (*SMALL, *changes)), folder, NoDisplay())
    shutil.copytree(folder, other, copy_function=os.link)
    before = (folder / "manifest.json").read_bytes()
    result = add_bucket(other, (128, 64), None, NoDisplay())
    assert f"{stage}, 128x64" in {done.title for done in result.stages}
    new = Contents.read(other)
    assert new.files.items() > Contents.read(folder).files.items()
    assert (new.buckets[1].controlnet is None) == (stage == "quantization")
    report = check(other)
    assert report.ok, report.render()
    assert {verdict.bucket for verdict in report.verdicts} == {"64x64", "128x64"}
    remove_bucket(other, (128, 64), None, NoDisplay())
    assert Contents.read(other).files == Contents.read(folder).files
    assert (folder / "manifest.json").read_bytes() == before
    assert check(folder, runs=False).ok


def test_a_verified_bundle_keeps_its_sizes_and_takes_another_which_is_not_judged_yet(folder: Path) -> None:
    before = Contents.read(folder)
    checks = (Check(compare("one", np.ones(3), np.ones(3), Bound(60, "equal")), 1.0),)
    store(Report("bundle", "random:0", "PyTorch", "onnxruntime", checks, GRAPHS), folder, verified=before.digest)
    verified = Contents.read(folder)
    assert verified.buckets == before.buckets
    assert verified.shared.report in verified.files
    remove_bucket(folder, WIDE, None, NoDisplay())
    left = Contents.read(folder)
    assert (left.shared.report, left.buckets) == (None, before.buckets[:1])
    assert not (folder / "parity").exists()
    assert left.files.keys() < before.files.keys()


def test_a_bundle_that_is_changed_before_the_build_has_its_lock_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Contents.read(folder)
    changed = before.sharing(fingerprints={**before.shared.fingerprints, "recipe": "another"})
    (folder / "manifest.json").write_text(json.dumps(changed.to_json()))
    monkeypatch.setattr(BundleFolder, "manifest", _once(before.manifests[0], BundleFolder.manifest))
    with pytest.raises(BundleError, match="changed meanwhile"):
        remove_bucket(folder, WIDE, None, NoDisplay())
    assert Contents.read(folder) == changed


def _once(stale: Manifest, real: Callable[[BundleFolder], Manifest]) -> Callable[[BundleFolder], Manifest]:
    """Gives a manifest that is older than the disk's, and after that the disk's."""
    given = [stale]
    return lambda folder: given.pop() if given else real(folder)


def test_a_bundle_whose_files_are_others_takes_no_size(folder: Path) -> None:
    engine = folder / "unet/windowed.onnxruntime.onnx"
    engine.write_bytes(engine.read_bytes() + b"\0")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="broken"):
        add_bucket(folder, (128, 192), None, NoDisplay())
    assert (folder / "manifest.json").read_bytes() == before


@pytest.fixture
def commands(folder: Path) -> Iterator[CliRunner]:
    yield CliRunner()
    assert check(folder, runs=False).ok


def test_commands_add_and_remove(folder: Path, commands: CliRunner) -> None:
    result = commands.invoke(main, ["remove", str(folder), "--size", "192x128", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["width"] == 128
    assert len(Contents.read(folder).buckets) == 1
