"""`quality` on the command line: a real bundle draws the pictures of real diffusers, and others are told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hidiff_export.cli import main
from hidiff_export.cli.quality import _contenders
from hidiff_export.cli.shots import shots_of
from hidiff_export.errors import InputError
from hidiff_export.quality.contenders import Shot, check_comparable, check_settings_of_diffusers, resolve
from hidiff_export.quality.quality_report import FILES
from hidiff_export.quality.report_folder import report_folder
from hidiff_export.quality.scoring import subject_of
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.manifest import Manifest
from tests.export.quality.feature_files import onnx_features
from tests.parity.pictures import diffusers_pipeline
from tests.parity.pipelines import scheduler_of

PROMPTS = ("a cat", "a red apple at night", "an owl", "a rocket", "a house")


@pytest.fixture(scope="module")
def checkpoint(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's checkpoint as diffusers itself writes it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    recipe = Recipe.from_dict(dict(Manifest.read(sd15_bundle).recipe))
    # A scheduler writes its defaults down when it is saved, and PNDM's are others than those of the bundle's sampler.
    scheduler = scheduler_of(recipe.family, "EulerAncestralDiscreteScheduler")
    diffusers_pipeline(recipe, "StableDiffusionPipeline", scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def asked(tmp_path: Path) -> tuple[str, ...]:
    """Prompts, features and an output folder, as options."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    model = onnx_features(tmp_path / "features.onnx")
    return ("--prompts", f"{tmp_path / 'prompts.txt'}", "--features", f"{model}", "-o", f"{tmp_path / 'report'}")


def _quality(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(main, ["quality", *map(str, arguments)])


def _mean(report: dict[str, Any], metric: str) -> dict[str, float]:
    return {one["name"]: one["mean"][metric] for one in report["contenders"]}


def test_a_bundle_draws_diffusers_pictures_and_others_are_told_apart(
    sd15_bundle: Path, checkpoint: Path, asked: Sequence[str], tmp_path: Path
) -> None:
    result = _quality(sd15_bundle, "--diffusers", checkpoint, "--stock", "--other-seeds", *asked, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    name = sd15_bundle.name
    assert [one["name"] for one in report["contenders"]] == ["diffusers", name, "stock", "diffusers-other-seeds"]
    decibels, seen = _mean(report, "psnr"), _mean(report, "feature_distance")
    assert decibels[name] > 45 > 25 > max(decibels["stock"], decibels["diffusers-other-seeds"])
    assert seen[name] < 0.01 * seen["diffusers-other-seeds"]
    assert report["settings"] == {
        **{"size": "128x128", "steps": 3, "sampler": "euler_ancestral"},
        **{"guidance scale": 7.5, "seeds from": 1},
    }
    folder = tmp_path / "report"
    assert json.loads((folder / "quality.json").read_text()) == report
    assert "| stock |" in (folder / "quality.md").read_text()
    for one in report["contenders"]:
        pictures = sorted((folder / "pictures" / one["name"]).iterdir())
        assert len(pictures) == len(one["pictures"]) == len(PROMPTS)
        with Image.open(pictures[0]) as picture:
            assert picture.size == (128, 128)
    with Image.open(folder / "quality.png") as sheet:
        assert sheet.width > 4 * 200


def test_the_same_bundle_twice_is_equal_and_an_older_report_makes_way(
    sd15_bundle: Path, asked: Sequence[str], tmp_path: Path
) -> None:
    for count in (5, 4):
        result = _quality(sd15_bundle, sd15_bundle, *asked, "--count", count)
        assert result.exit_code == 0, result.output
    assert "100.0" in result.stdout
    report = json.loads((tmp_path / "report/quality.json").read_text())
    assert [len(one["pictures"]) for one in report["contenders"]] == [4, 4]
    assert report["contenders"][1]["set_distance"] == {"value": 0, "low": 0, "high": 0}
    assert len(list((tmp_path / "report/pictures" / sd15_bundle.name).iterdir())) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.onnx", "prompts.txt", "report"]


def test_names_are_distinct_whatever_folders_are_called() -> None:
    folders = tuple(Path(name) for name in ("demo-int8", "demo", "a/demo", "stock", "demo-2"))
    found = _contenders(folders, "source", (), stock=True, other_seeds=True)
    names = [one.name for one in found]
    assert names == [
        *("diffusers", "demo-int8", "demo", "demo-2", "stock-2", "demo-2-2", "stock", "diffusers-other-seeds")
    ]


def test_settings_of_a_row_are_kept_and_a_drawn_seed_is_counted() -> None:
    rows = [("a cat", {"seed": -1, "eta": 0.5}), ("an owl", {"seed": 77}), ("a key", {})]
    assert shots_of(rows, 3, 5, {"steps": 3}) == [
        Shot("a cat", 5, {"seed": -1, "eta": 0.5, "steps": 3}),
        Shot("an owl", 77, {"seed": 77, "steps": 3}),
        Shot("a key", 7, {"steps": 3}),
    ]


def test_what_the_first_bundle_settles_is_settled_for_all(sd15_bundle: Path) -> None:
    shot = Shot("a cat", 1, {})
    (request,) = resolve(sd15_bundle, [shot])
    assert shot.with_settings_of(request).settings == {
        **{"steps": 3, "sampler": "euler_ancestral", "guidance_scale": 7.5},
        **{"guidance_rescale": request.settings.guidance_rescale},
    }


class TestRefusals:
    def test_a_folder_of_something_else_is_kept(self, sd15_bundle: Path, asked: Sequence[str], tmp_path: Path) -> None:
        (tmp_path / "report").mkdir()
        (tmp_path / "report/thesis.txt").write_text("years of work")
        result = _quality(sd15_bundle, *asked)
        assert (result.exit_code, (tmp_path / "report/thesis.txt").read_text()) == (2, "years of work")
        assert "something else than an older report" in result.output

    def test_a_report_with_something_beside_it_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "report").mkdir()
        for name in ("quality.json", "thesis.txt"):
            (tmp_path / "report" / name).write_text("{}")
        with pytest.raises(InputError, match="something else"), report_folder(tmp_path / "report", FILES):
            pass
        assert (tmp_path / "report/thesis.txt").exists()

    def test_an_interrupted_report_leaves_the_older_one_and_a_half_built_bundle(self, tmp_path: Path) -> None:
        (tmp_path / "report").mkdir()
        (tmp_path / "report/quality.json").write_text("older")
        (tmp_path / "report.partial").mkdir()
        with pytest.raises(ZeroDivisionError), report_folder(tmp_path / "report", FILES) as folder:
            (folder / "quality.json").write_text(f"{1 / 0}")
        assert (tmp_path / "report/quality.json").read_text() == "older"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "report.partial"]

    def test_a_setting_that_diffusers_would_be_drawn_without(self) -> None:
        check_settings_of_diffusers([Shot("a cat", 1, {"eta": 0.5})])
        with pytest.raises(InputError, match="not drawn with every setting") as caught:
            check_settings_of_diffusers([Shot("a cat", 1, {"long_prompt": "chunk"})])
        assert "long_prompt, for 'a cat'" in str(caught.value)

    def test_a_sampler_that_a_bundle_lacks_is_told_before_anything_is_drawn(
        self, sd15_bundle: Path, asked: Sequence[str], tmp_path: Path
    ) -> None:
        result = _quality(sd15_bundle, *asked, "--sampler", "ddim")
        assert result.exit_code == 2
        assert "no such sampler" in result.output
        assert not (tmp_path / "report").exists()

    def test_an_empty_list_of_prompts(self, sd15_bundle: Path, asked: Sequence[str], tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text("\n")
        result = _quality(sd15_bundle, *asked)
        assert result.exit_code == 2
        assert "no prompt" in result.output.lower()

    def test_stock_without_a_checkpoint(self, sd15_bundle: Path, asked: Sequence[str]) -> None:
        result = _quality(sd15_bundle, *asked, "--stock")
        assert (result.exit_code, "Add --diffusers" in result.output) == (2, True)

    def test_a_checkpoint_that_diffusers_does_not_load(
        self, sd15_bundle: Path, asked: Sequence[str], tmp_path: Path
    ) -> None:
        (tmp_path / "nothing").mkdir()
        result = _quality(sd15_bundle, *asked, "--diffusers", tmp_path / "nothing")
        assert result.exit_code == 3
        assert not (tmp_path / "report").exists()

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"width": 256}, "another size"),
            ({"family": "sdxl"}, "another family"),
            ({"vae": None}, "from prompts alone"),
        ],
    )
    def test_bundles_that_cannot_be_compared(self, sd15_bundle: Path, changed: dict[str, Any], told: str) -> None:
        manifest = Manifest.read(sd15_bundle)
        check_comparable({Path("one"): manifest, Path("two"): manifest})
        with pytest.raises(InputError, match=told):
            check_comparable({Path("one"): manifest, Path("two"): replace(manifest, **changed)})

    @pytest.mark.parametrize(
        "changed", [{"source": "random:1"}, {"lora": [{"path": "style.safetensors", "scale": 0.5}]}]
    )
    def test_other_models_unless_they_are_asked_for(self, sd15_bundle: Path, changed: dict[str, Any]) -> None:
        manifest = Manifest.read(sd15_bundle)
        other = replace(manifest, recipe={**manifest.recipe, **changed})
        with pytest.raises(InputError, match="another model") as caught:
            check_comparable({Path("one"): manifest, Path("two"): other})
        assert "--across-models" in caught.value.advice
        check_comparable({Path("one"): manifest, Path("two"): other}, across_models=True)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("a small cat, on the left", "cat"),
        ("a cat face on a red background", "cat face"),
        ("An owl", "owl"),
        ("a catalogue", None),
        ("a picture of a cat", None),
    ],
)
def test_the_subject_is_the_longest_label_that_a_prompt_begins_with(prompt: str, subject: str | None) -> None:
    assert subject_of(prompt, ("cat", "cat face", "owl")) == subject
