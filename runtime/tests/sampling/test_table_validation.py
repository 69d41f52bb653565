"""A bundle's sampler tables are those that its manifest names, when it is opened and whenever one is read."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import toy
import toy_pictures

from hidiff_runtime import BundleError, Pipeline, Settings
from hidiff_runtime.backend_choice import BackendChoice
from hidiff_runtime.bundle import open as open_bundle
from hidiff_runtime.cli import main
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.table_rows import Rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toy.make(tmp_path / "bundle")


def opened(folder: Path, **options: str) -> None:
    with open_bundle(folder, backend=toy.ToyBackend(), **options):
        pass


@pytest.mark.parametrize("verify", ["hash", "size"])
def test_two_tables_in_each_others_place_are_refused(folder: Path, verify: str) -> None:
    plain, noisy = (folder / f"samplers/{name}.safetensors" for name in ("plain", "noisy"))
    swapped = plain.read_bytes(), noisy.read_bytes()
    noisy.write_bytes(swapped[0])
    plain.write_bytes(swapped[1])
    toy.seal(folder)
    with pytest.raises(BundleError, match="table of the sampler plain is another sampler's") as caught:
        opened(folder, verify=verify)
    assert caught.value.given == "samplers/plain.safetensors: expected plain, got noisy"
    assert caught.value.exit_code == 4


def test_a_table_that_cannot_be_read_is_refused_though_nobody_asks_for_it(folder: Path) -> None:
    (folder / "samplers/second.safetensors").write_text("no table")
    toy.seal(folder)
    with pytest.raises(BundleError, match="safetensors file is damaged"):
        opened(folder)


@pytest.mark.parametrize("steps", [(1, 2, 3), (*range(1, 13), 50)])
def test_the_manifests_steps_are_those_of_every_table(folder: Path, steps: tuple[int, ...]) -> None:
    toy.seal(folder, dataclasses.replace(Manifest.read(folder), steps=steps))
    with pytest.raises(BundleError, match="not the step counts that every sampler table holds") as caught:
        opened(folder)
    assert "expected 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12" in str(caught.value)


def test_a_table_that_the_step_graph_has_no_room_for_is_refused(folder: Path) -> None:
    path = folder / "samplers/plain.safetensors"
    table = SamplerTable.read(path)
    total = len(table.timesteps)
    dataclasses.replace(table, rows=Rows.of(np.zeros((total, 3, 5)))).write(path)
    toy.seal(folder)
    with pytest.raises(BundleError, match="step graph has fewer states than the sampler") as caught:
        opened(folder)
    assert caught.value.given == "1, where plain keeps 2"


@pytest.mark.parametrize("verify", ["hash", "size"])
def test_a_table_that_is_put_in_place_later_is_noticed_in_an_open_pipeline(tmp_path: Path, verify: str) -> None:
    folder = toy_pictures.make(tmp_path / "bundle")
    with Pipeline.open(folder, backend=toy_pictures.Backend(), verify=verify) as pipeline:
        settings = Settings(steps=2, sampler="plain", guidance_scale=3.0)
        next(pipeline.run([pipeline.request("a boat", settings)]))
        path = folder / "samplers/noisy.safetensors"
        dataclasses.replace(toy.table("noisy", noise=0.3), input_scale=SamplerTable.read(path).input_scale * 2).write(
            path
        )
        with pytest.raises(BundleError, match=r"samplers/noisy.safetensors has changed"):
            pipeline.request("a boat", dataclasses.replace(settings, sampler="noisy"))
        tokenizer = folder / "text_encoder/tokenizer.json"
        kept = tokenizer.stat()
        tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace("a", "b", 1), encoding="utf-8")
        os.utime(tokenizer, ns=(kept.st_atime_ns, kept.st_mtime_ns + 1))
        with pytest.raises(BundleError, match=r"text_encoder/tokenizer.json has changed"):
            next(pipeline.run([pipeline.request("a boat", settings)]))


def test_the_command_says_it_with_the_code_of_a_broken_bundle(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hidiff_runtime.bundle.choose", lambda *_: BackendChoice(toy.ToyBackend(), ""))
    shutil.copyfile(folder / "samplers/noisy.safetensors", folder / "samplers/plain.safetensors")
    toy.seal(folder)
    assert main(["check", str(folder)]) == 4
    assert "expected plain, got noisy" in capsys.readouterr().err
