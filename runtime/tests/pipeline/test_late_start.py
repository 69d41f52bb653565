"""Runs that begin where the UNet expects a picture are told of, and no others."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
from PIL import Image

from hidiff_runtime import bundle as bundle_module
from hidiff_runtime import cli
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.pipeline import Pipeline
from hidiff_runtime.pipeline.request import LateStartWarning

TOLD = "1 step of late begin at timestep 1, where the UNet expects a picture, and give noise"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle with a sampler whose runs of 1 and 2 steps begin as Euler's do with leading timesteps."""
    made = toy_pictures.make(tmp_path / "bundle")
    manifest, table = Manifest.read(made), toy.table("late")
    table.timesteps[0], table.noising[0] = 1, (1, 0.04)  # sigma 0.04
    table.noising[1] = (0.53, 0.85)  # of 2 steps, which still draw
    table.write(made / "samplers/late.safetensors")
    samplers = {**manifest.samplers, "late": "samplers/late.safetensors"}
    toy.seal(made, dataclasses.replace(manifest, samplers=samplers))
    return made


def test_a_run_that_gives_noise_is_warned_of(folder: Path) -> None:
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as pipe:
        with pytest.warns(LateStartWarning, match=TOLD) as told:
            pipe("a boat", sampler="late", steps=1)
        assert "timestep_spacing: trailing" in str(told[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe("a boat", sampler="late", steps=2)
            pipe("a boat", sampler="plain", steps=1)
            size = (toy_pictures.WIDTH, toy_pictures.HEIGHT)
            image = Image.fromarray(np.zeros((*size[::-1], 3), np.uint8))
            pipe("a boat", sampler="late", steps=1, image=image, strength=1.0)


def test_the_command_says_so_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = bundle_module.open

    def opened(folder: Path, *, backend: str | None, **options: Any) -> Bundle:
        assert backend is None
        return real(folder, backend=toy_pictures.Backend(), **options)

    monkeypatch.setattr(bundle_module, "open", opened)
    asked = ["generate", str(folder), "-p", "a", "-p", "b", "--sampler", "late", "--json", "-o", f"{tmp_path}/made/"]
    for more in (["--dry-run"], []):
        assert cli.main([*asked, "--steps", "1", *more]) == 0
        out, err = capsys.readouterr()
        assert err.count(f"warning: {TOLD}") == 1
        assert len(json.loads(out)["warnings"]) == 1
    assert cli.main([*asked, "--steps", "2", "--force"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["warnings"], "warning" in err) == ([], False)
