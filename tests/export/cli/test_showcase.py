"""`showcase` on the command line: the demo model at its own size and larger, without and with HiDiffusion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hidiff_export.cli import main
from hidiff_export.compiler.compile import build
from hidiff_export.quality.distances import psnr
from hidiff_export.recipe import Recipe
from tests.conftest import NoDisplay

CHANGES = ("width=192", "height=256", "sampler=ddim", "steps=[5]")


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo recipe's bundle, of another size and few steps."""
    folder = tmp_path_factory.mktemp("demo") / "demo-bundle"
    build(Recipe.load("demo", CHANGES), folder, NoDisplay())
    return folder


def _run(command: str, *arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(main, [command, *map(str, arguments)])


def _pictures(output: Path, name: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((output / "pictures" / name).iterdir())]


def test_the_bundle_is_beside_pytorch_and_hidiffusion_is_not_the_stock_model(demo_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "showcase"
    result = _run("showcase", demo_bundle, "--count", 4, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads((output / "showcase.json").read_text()) == report
    rows = {row["name"]: row for row in report["contenders"]}
    assert list(rows) == ["training size", "stock", "hidiffusion", "bundle"]
    assert [tuple(row["size"]) for row in rows.values()] == [(128, 128), *[(192, 256)] * 3]
    assert min(rows["bundle"]["psnr"]) > 45
    assert {row["distance"] for row in rows.values()} == {None}  # four pictures tell nothing of a set
    assert rows["bundle"]["named"] == rows["hidiffusion"]["named"]
    assert all(0 <= row["retrieval"] <= 1 for row in rows.values())
    for row in rows.values():
        pictures = sorted((output / "pictures" / row["name"]).iterdir())
        assert len(pictures) == 4
        with Image.open(pictures[0]) as picture:
            assert picture.size == tuple(row["size"])
    stock, changed = (_pictures(output, name) for name in ("stock", "hidiffusion"))
    assert all(psnr(one, other) < 40 for one, other in zip(stock, changed, strict=True))
    with Image.open(output / "showcase.png") as sheet:
        assert sheet.width > 5 * 150
    assert report["prompts"][0]["prompt"] == Recipe.load("demo").example_prompts[0]


def test_quality_needs_neither_prompts_nor_features_of_the_demo_model(demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\nein grüner Apfel, сад 🍏\n")
    for words, count in (((), 3), (("--prompts", tmp_path / "prompts.txt"), 2)):
        result = _run("quality", demo_bundle, "--count", 3, *words, "-o", tmp_path / "report", "--json")
        assert result.exit_code == 0, result.output
        (scores,) = json.loads(result.stdout)["contenders"]
        assert len(scores["pictures"]) == count
    assert [picture["right"] is None for picture in scores["pictures"]] == [False, True]  # its words name no subject


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (("--training-size", 130), "multiple of 8"),
            (("--prompts", "nothing.txt"), "prompts cannot be read"),
            (("--features", "nothing"), "no feature model"),
            (("--source", "nothing/at/all.safetensors"), "Diffusers does not load"),
            (("--sampler", "euler"), "euler"),
        ],
    )
    def test_what_cannot_be_shown(
        self, demo_bundle: Path, tmp_path: Path, words: tuple[object, ...], told: str
    ) -> None:
        result = _run("showcase", demo_bundle, *words, "-o", tmp_path / "showcase")
        assert result.exit_code != 0
        assert told in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_fabricated_checkpoint(self, sd15_bundle: Path, tmp_path: Path) -> None:
        result = _run("showcase", sd15_bundle, "-o", tmp_path / "showcase")
        assert result.exit_code == 2
        assert "hidiff-export build demo" in result.stderr

    def test_quality_of_another_model_without_prompts_or_features(self, sd15_bundle: Path, tmp_path: Path) -> None:
        result = _run("quality", sd15_bundle, "-o", tmp_path / "report")
        assert result.exit_code == 2
        assert "--prompts FILE" in result.stderr
        (tmp_path / "prompts.txt").write_text("a cat")
        result = _run("quality", sd15_bundle, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "report")
        assert result.exit_code == 2
        assert "CLIPVisionModelWithProjection" in result.stderr
