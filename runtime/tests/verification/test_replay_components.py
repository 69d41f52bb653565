"""What a check says of tokens, text encoders, the VAE and the picture: sound ones pass, and each damage shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
import toy_pictures
from toy_reference import record

from hidiff_runtime import BundleError, CheckReport, check
from hidiff_runtime.cli import main
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.verification import replay_components as replay_networks
from hidiff_runtime.verification.reference_samples import INDEX, ReferenceSamples
from hidiff_runtime.verification.replay_components import PICTURE, TEXT, TOKENS, VAE, comparisons


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy_pictures.make(tmp_path_factory.mktemp("pictures") / "bundle", KIND)
    record(folder, KIND)
    return folder


KIND = toy.Toy(sdxl=True)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def checked(folder: Path, spoil: Callable[..., Any] = toy.unspoilt, **options: Any) -> CheckReport:
    return check(folder, backend=toy_pictures.Backend(spoil=spoil), **options)


def failed(report: CheckReport) -> set[tuple[str, str | None]]:
    return {(verdict.boundary, verdict.phase) for verdict in report.verdicts if not verdict.ok}


def test_sound_networks_pass_and_the_picture_is_judged_by_psnr_and_ssim(pristine: Path) -> None:
    report = checked(pristine)
    assert report.ok, report.render()
    assert {(verdict.boundary, verdict.phase) for verdict in report.verdicts} >= {
        *((TOKENS, "text_encoder"), (TOKENS, "text_encoder_2"), (TEXT, "text_encoder"), (TEXT, "text_encoder_2")),
        *((VAE, "vae_decoder"), (VAE, "vae_encoder"), (PICTURE, None)),
    }
    assert "PSNR" in report.render()
    assert "largest pixel difference" in report.render()
    samples = ReferenceSamples.read(pristine / "reference" / INDEX)
    for runs in (True, False):
        assert comparisons(samples, runs=runs) == len(checked(pristine, runs=runs).verdicts)
    assert PICTURE not in {verdict.boundary for verdict in checked(pristine, runs=False).verdicts}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("text_embeds", {(TEXT, "text_encoder_2")}),
        ("image", {(VAE, "vae_decoder"), (PICTURE, None)}),
        ("moments", {(VAE, "vae_encoder")}),
    ],
)
def test_an_engine_that_computes_something_else_fails(
    pristine: Path, output: str, expected: set[tuple[str, str | None]]
) -> None:
    report = checked(pristine, lambda out, _: {name: a * (1 + 0.01 * (name == output)) for name, a in out.items()})
    assert failed(report) == expected
    assert report.exit_code == 1


def test_an_output_that_is_missing_fails(pristine: Path) -> None:
    report = checked(pristine, lambda out, _: {name: a for name, a in out.items() if name != "text_embeds"})
    assert [verdict.fault for verdict in report.verdicts if not verdict.ok] == ["missing output"]


def test_another_tokenizer_fails(folder: Path) -> None:
    path = folder / "text_encoder/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"]["normalizers"] = [n for n in content["normalizer"]["normalizers"] if n["type"] != "Replace"]
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    path.write_text(json.dumps(content), encoding="utf-8")
    toy.seal(folder)
    assert failed(checked(folder)) == {(TOKENS, "text_encoder")}
    path.write_text("{}", encoding="utf-8")
    toy.seal(folder)
    assert failed(checked(folder)) == {(TOKENS, "text_encoder")}


def test_without_the_tokenizers_library_the_report_says_what_was_left_out(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_networks, "find_spec", lambda _name: None)
    report = checked(pristine)
    assert report.ok
    assert TOKENS not in {verdict.boundary for verdict in report.verdicts}
    assert "Tokens were not compared" in report.render()
    assert report.to_dict()["left_out"]


def test_a_network_without_a_sample_is_a_fault(folder: Path) -> None:
    index = folder / "reference" / INDEX
    content = json.loads(index.read_text(encoding="utf-8"))
    content["networks"] = [sample for sample in content["networks"] if sample["network"] != "vae_encoder"]
    index.write_text(json.dumps(content), encoding="utf-8")
    toy.seal(folder)
    assert failed(checked(folder, runs=False)) == {(VAE, "vae_encoder")}


def test_samples_from_before_there_were_networks_still_check(folder: Path) -> None:
    index = folder / "reference" / INDEX
    content = json.loads(index.read_text(encoding="utf-8"))
    del content["networks"], content["pictures"]
    index.write_text(json.dumps(content), encoding="utf-8")
    toy.seal(folder, replace(Manifest.read(folder), text_encoders=(), vae=None))
    assert checked(folder).ok


@pytest.mark.parametrize(("key", "value"), [("corner", [1]), ("tensor", "none"), ("run", -1)])
def test_a_broken_picture_sample_is_named(folder: Path, key: str, value: object) -> None:
    index = folder / "reference" / INDEX
    content = json.loads(index.read_text(encoding="utf-8"))
    content["pictures"][0][key] = value
    index.write_text(json.dumps(content), encoding="utf-8")
    toy.seal(folder)
    with pytest.raises(BundleError, match=r"pictures|lacks"):
        checked(folder)


def test_info_tells_of_text_encoders_and_vae(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(pristine)]) == 0
    told = capsys.readouterr().out
    assert "text_encoder_2 (clip skip up to 4)" in told
    assert f"{toy_pictures.WIDTH}x{toy_pictures.HEIGHT} pixels in one tile, scaling factor 0.5" in told
