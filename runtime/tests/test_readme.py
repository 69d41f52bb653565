"""The README's examples, run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import toy
import toy_pictures
from PIL import Image
from toy_reference import record

from hidiff_runtime import bundle as bundle_module
from hidiff_runtime import cli
from hidiff_runtime.verification import replay

KIND = toy.Toy(tokens=toy_pictures.TOKENS)
README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def _toy_bundle_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bundle`` is a toy in the current folder, and its backend the one that is found."""
    real = bundle_module.open

    def opened(folder: Path, *, backend: str | None = None, **options: Any) -> bundle_module.Bundle:
        assert backend is None
        return real(folder, backend=toy_pictures.Backend(), **options)

    for module, name in ((bundle_module, "open"), (replay, "open_bundle")):
        monkeypatch.setattr(module, name, opened)
    monkeypatch.setattr("hidiff_runtime.open", opened, raising=False)
    monkeypatch.chdir(tmp_path)
    folder = toy_pictures.make(tmp_path / "bundle")
    record(folder, KIND)


def test_the_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = KIND.given()
    for code in blocks("python"):
        exec(compile(code, str(README), "exec"), names)
    assert names["latents"].shape == (1, 4, toy.HEIGHT, toy.WIDTH)
    out = capsys.readouterr().out
    assert out.count("8/8 windowed") == 2
    assert len(names["images"]) == 2
    with Image.open("lighthouse.png") as picture:
        assert picture.info["parameters"].startswith("a lighthouse at dusk\nSteps: 8")
    assert "within bounds" in out


def test_the_commands_run() -> None:
    commands = [
        shlex.split(line)[1:] for block in blocks("sh") for line in block.splitlines() if line.startswith("hidiff-run")
    ]
    assert [command[0] for command in commands] == ["generate", "info", "check", "denoise"]
    for command in commands:
        assert cli.main(command) == 0
    assert Path("latents.safetensors").exists()
    assert Path("dusk.png").exists()
