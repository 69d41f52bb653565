"""`hidiff-export inspect`: what a bundle's manifest says, for people and machines."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import linked
import pytest
import toy
from click.testing import CliRunner, Result

from hidiff_export.cli import main
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest


def _inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_it_shows_phases_sizes_and_samplers(sd15_bundle: Path) -> None:
    done = _inspect(sd15_bundle, "--json")
    assert done.exit_code == 0
    summary = json.loads(done.stdout)
    assert [phase["phase"] for phase in summary["phases"]] == ["strided", "windowed"]
    assert list(summary["graphs"]) == ["step", "text_encoder", "vae_decoder", "vae_encoder"]
    (encoder,) = summary["text_encoders"]
    assert encoder["outputs"] == {"prompt_embeds": [1, 77, 32]}
    assert summary["vae"] == {"tile": [128, 128], "overlap": 0, "scaling_factor": 0.18215}
    assert "noise_pred float32[2, 4, 16, 16]" in summary["graphs"]["step"]["inputs"]
    assert summary["weights"]["unet"] > 1_000_000
    assert summary["parity"] == []
    assert summary["steps"] == [3, 3]
    assert summary["steps_left_out"] == []
    table = _inspect(sd15_bundle).stdout
    assert "strided" in table
    assert "step " in table
    assert "hidiff-export verify" in table
    assert "3 steps" in table
    assert "left out" not in table
    assert "text encoders: text_encoder, 32 wide, clip skip up to 2" in table
    assert "VAE: 128x128 pixels, one tile, scaling factor 0.18215" in table


def test_it_shows_what_passes_declined_and_nothing_for_a_bundle_that_does_not_say(
    sd15_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))
    manifest = Manifest.read(folder)
    kept = {name: record for name, record in manifest.files.items() if not name.endswith(".declined.json")}
    counts = {"strided.onnx": {"NearestToGather": {"a shape is not known": 2}}}
    (folder / "unet/graphs.declined.json").write_text(json.dumps(counts), encoding="utf-8")
    for names, expected in (({}, {}), ({"unet/graphs.declined.json"}, counts)):
        added = {name: FileDigest.of(folder / name) for name in names}
        written = replace(manifest, files={**kept, **added})
        (folder / MANIFEST).write_text(json.dumps(written.to_json()), encoding="utf-8")
        assert json.loads(_inspect(folder, "--json").stdout)["declined"] == expected
        line = "strided.onnx: NearestToGather left 2 nodes as they were: a shape is not known"
        assert (line in _inspect(folder).stdout) == bool(names)


def test_a_build_keeps_what_its_passes_declined(sd15_bundle: Path) -> None:
    kept = [name for name in Manifest.read(sd15_bundle).files if name.endswith(".declined.json")]
    read: dict[str, object] = {}
    for name in kept:
        read |= json.loads((sd15_bundle / name).read_text(encoding="utf-8"))
    assert json.loads(_inspect(sd15_bundle, "--json").stdout)["declined"] == read


def test_it_says_which_steps_a_scheduler_refused(sd15_bundle: Path, tmp_path: Path) -> None:
    asked = Manifest.read(sd15_bundle)
    folder = Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))
    manifest = replace(asked, recipe={**asked.recipe, "steps": [1, "3-5", 9]})
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")

    assert json.loads(_inspect(folder, "--json").stdout)["steps_left_out"] == [1, "4-5", 9]
    assert "left out: 1, 4-5, 9 steps, which a sampler" in " ".join(_inspect(folder).stdout.split())


def test_rescaled_guidance_is_shown(sd15_bundle: Path, tmp_path: Path) -> None:
    assert json.loads(_inspect(sd15_bundle, "--json").stdout)["guidance_rescale"] == 0
    assert "rescaled" not in _inspect(sd15_bundle).stdout
    folder = Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))
    manifest = replace(Manifest.read(sd15_bundle), guidance_rescale=0.7)
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    assert json.loads(_inspect(folder, "--json").stdout)["guidance_rescale"] == 0.7
    assert "with guidance rescaled by 0.7" in " ".join(_inspect(folder).stdout.split())


@pytest.mark.parametrize("layout", linked.KNOWN)
def test_a_bundle_of_links_is_shown_as_the_bundle_it_is(sd15_bundle: Path, tmp_path: Path, layout: str) -> None:
    folder = linked.KNOWN[layout](sd15_bundle, tmp_path / "home")
    shown, own = (json.loads(_inspect(path, "--json").stdout) for path in (folder, sd15_bundle))
    assert shown | {"folder": ""} == own | {"folder": ""}


def test_links_out_of_the_bundle_are_refused_unless_they_are_allowed(sd15_bundle: Path, tmp_path: Path) -> None:
    folder = linked.elsewhere(sd15_bundle, tmp_path)
    done = _inspect(folder)
    assert done.exit_code == 4
    assert "consists of symbolic links that lead out" in done.stderr
    assert _inspect(folder, "--allow-links", tmp_path / "store").exit_code == 0


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    done = _inspect(tmp_path)
    assert done.exit_code == 4
    assert "next:" in done.stderr


@pytest.mark.parametrize(
    ("recipe", "message"),
    [({}, "recipe"), ({"lora": 3}, "recipe"), ({"family": "[/bold]"}, "recipe")],
    ids=["none", "a LoRA that is none", "a family that is none"],
)
def test_a_bundle_with_a_foreign_recipe_is_refused(
    sd15_bundle: Path, tmp_path: Path, recipe: dict[str, object], message: str
) -> None:
    folder = Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))
    manifest = Manifest.read(sd15_bundle)
    manifest = replace(manifest, recipe={**manifest.recipe, **recipe} if recipe else {})
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    done = _inspect(folder)
    assert done.exit_code == 4
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("[]", "parity/report.json does not hold a JSON object"),
        ("{}", "parity/report.json: verdicts is missing"),
        ('{"verdicts": [{}]}', "verdict: ok is missing"),
        ('{"verdicts": ' + "[" * 40 + "]" * 40 + "}", "nested more than 32 deep"),
    ],
    ids=range(4),
)
def test_a_broken_report_is_refused(sd15_bundle: Path, tmp_path: Path, report: str, message: str) -> None:
    folder = Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))
    (folder / "parity").mkdir()
    (folder / "parity/report.json").write_text(report)
    toy.seal(folder, replace(Manifest.read(sd15_bundle), report="parity/report.json"))
    done = _inspect(folder)
    assert (done.exit_code, message in done.stderr) == (4, True), done.output


def test_words_of_a_bundle_are_shown_as_they_are(sd15_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))
    manifest = replace(Manifest.read(sd15_bundle), task="[/bold] and [red]", precision="[link=x]")
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    done = _inspect(folder)
    assert done.exit_code == 0
    assert "[/bold] and [red]" in done.stdout
    assert "[link=x]" in done.stdout
