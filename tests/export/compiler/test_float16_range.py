"""float16's range in a build, a rebase and a verification, by the commands."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from hidiff_export.cli import main
from hidiff_export.compiler.stages import order
from hidiff_export.compiler.stages.reference import ReferenceStage
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage
from hidiff_export.compiler.stages.weights import WeightsStage
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest
from hidiff_runtime.format.safetensors import SafetensorsFile
from tests.export.reference.test_magnitudes import BLOCK, PRODUCT, feed_forward, lora

CHANGES = ("width=64", "height=64", "steps=3", "vae=false", "sampler=ddim")

NEAR = re.escape(PRODUCT) + r" reaches 5[12],\d{3}"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def build(output: Path, lora_path: Path) -> Result:
    changes = [word for change in (*CHANGES, "precision=float16") for word in ("--set", change)]
    return run("build", "tiny", "-o", output, "--lora", lora_path, *changes)


@pytest.fixture(scope="module")
def near(half_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A float16 bundle with a tensor within the margin, and how it was rebased; copy it before changing it."""
    folder = tmp_path_factory.mktemp("near")
    path = lora(folder / "near.safetensors", feed_forward(72))
    done = run("rebase", half_bundle, "--lora", path, "-o", folder / "bundle", "--no-verify", "--json")
    assert done.exit_code == 0, done.output
    return folder / "bundle", done


def test_a_build_beyond_the_range_ends_with_the_tensors_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        order, "STAGES", (WeightsStage(), SchedulerTablesStage(), ReferenceStage())
    )  # graphs and engines have no part in it
    path = lora(tmp_path / "beyond.safetensors", feed_forward(200))
    done = build(tmp_path / "bundle", path)
    assert done.exit_code == 3
    words = " ".join(done.stderr.split())
    assert "beyond float16's largest number, 65,504" in words
    assert f"{PRODUCT} reaches 337," in words
    assert "next: Build with --set precision=float32, or give its LoRA a lower weight." in words
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_rebase_near_the_end_tells_it_and_keeps_the_record(near: tuple[Path, Result]) -> None:
    bundle, done = near
    summary = json.loads(done.stdout)
    (notice,) = [text for text in summary["notices"] if "float16" in text]
    assert re.search(NEAR, notice)
    assert "reference/magnitudes.json" in Manifest.read(bundle).files
    assert Manifest.read(bundle).reference == "reference/samples.json"
    assert summary["magnitudes"]["near"][0]["tensor"] == f"{BLOCK}.ff.net.0"
    shown = " ".join(run("inspect", bundle).stdout.split())
    assert re.search(f"float16 range: {NEAR}", shown)


@pytest.mark.slow
def test_a_rebase_looks_at_the_new_weights(near: tuple[Path, Result], tmp_path: Path) -> None:
    bundle, _ = near
    path = lora(tmp_path / "beyond.safetensors", feed_forward(200))
    done = run("rebase", bundle, "--lora", path, "-o", tmp_path / "beyond", "--no-verify")
    assert done.exit_code == 3
    assert PRODUCT in " ".join(done.stderr.split())
    assert not (tmp_path / "beyond").exists()
    plain = run("rebase", bundle, "--no-lora", "-o", tmp_path / "plain", "--no-verify", "--json")
    assert plain.exit_code == 0, plain.output
    summary = json.loads(plain.stdout)
    assert not [text for text in summary["notices"] if "float16" in text]
    assert summary["magnitudes"]["near"] == []


@pytest.mark.slow
def test_a_verification_tells_of_it_and_fails_beyond_it(near: tuple[Path, Result], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(near[0], tmp_path / "bundle"))
    done = run("verify", folder, "--json")
    report = json.loads(done.stdout)
    assert re.search(NEAR, report["notices"][0])
    assert {one["phase"] for one in report["magnitudes"]["largest"]} == {"strided", "windowed", None}

    scale(folder, f"{BLOCK}.ff.net.0.proj.weight", 1.5)
    done = run("verify", folder)
    assert done.exit_code == 1, done.output
    words = " ".join(done.stdout.split())
    assert "float16 does not hold what has to be computed in it" in words
    beyond = (
        re.escape(PRODUCT) + r" reaches 1\d\d,\d\d\d in (strided|windowed), step \d of 3.*, headroom 0\.\d+: FAILED"
    )
    assert re.search(beyond, words)
    report = json.loads((folder / "parity" / "report.json").read_text())
    assert not report["ok"]
    assert report["magnitudes"]["largest"][0]["headroom"] < 1
    assert re.search(beyond, " ".join(run("inspect", folder).stdout.split()))


def scale(folder: Path, name: str, factor: float) -> None:
    """Multiplies a weight in the UNet's store, as if the bundle had been built so."""
    store = folder / "unet" / "weights.safetensors"
    with SafetensorsFile.open(store) as file:
        info = file.info(name)
    values = np.memmap(store, np.float16, "r+", info.offset, info.shape)
    values *= np.float16(factor)
    values.flush()
    manifest = Manifest.read(folder)
    files = {**manifest.files, "unet/weights.safetensors": FileDigest.of(store)}
    (folder / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()), encoding="utf-8")


def test_a_bundle_that_does_not_say_is_shown_all_the_same(sd15_bundle: Path) -> None:
    """Those of float32, and those of before there was a record."""
    assert json.loads(run("inspect", sd15_bundle, "--json").stdout)["magnitudes"] is None
    assert "float16 range" not in run("inspect", sd15_bundle).stdout
