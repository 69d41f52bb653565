from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from hidiff_runtime import __version__, cli
from hidiff_runtime import bundle as bundle_module
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.format import safetensors
from hidiff_runtime.format.manifest import Manifest

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def _toy_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the toy backend when none is asked for."""
    real = bundle_module.open

    def opened(folder: Path, *, backend: str | None, **options: Any) -> Bundle:
        return real(folder, backend=backend or toy.ToyBackend(), **options)

    monkeypatch.setattr(bundle_module, "open", opened)


def test_check_prints_a_table_and_exits_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "engine against PyTorch" in out
    assert "all 12 within bounds" in out
    assert err == ""


def test_check_prints_json_and_exits_1_on_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "unet/strided.toy").write_text((folder / "unet/windowed.toy").read_text())
    toy.seal(folder)
    assert cli.main(["check", str(folder), "--json", "--calls-only"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["ok"]
    assert [verdict["ok"] for verdict in data["verdicts"]] == [True, False, True]


def test_info_describes_the_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in ("sd15", "64x48", "strided_pooled", "latents float32[2, 4, 6, 8]", "plain", "1 to 12", "guidance on"):
        assert part in out
    assert cli.main(["info", str(folder), "--json"]) == 0
    assert Manifest.from_json(json.loads(capsys.readouterr().out)) == Manifest.read(folder)


@pytest.mark.parametrize(
    "kind", [toy.Toy(), toy.Toy(guidance=False, sdxl=True), toy.Toy(inpainting=True), toy.Toy(control=True)]
)
def test_denoise_with_random_embeddings(tmp_path: Path, kind: toy.Toy, capsys: pytest.CaptureFixture[str]) -> None:
    folder = toy.make(tmp_path / "bundle", kind)
    output = tmp_path / "latents.safetensors"
    command = ["denoise", str(folder), "--random-embeds", "3", "--steps", "4", "-o", str(output)]
    command += ["--guidance", "5"] if kind.guidance else []
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert str(output) in out
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 1/4  strided_pooled")
    assert lines[-1].endswith(" s")
    with safetensors.SafetensorsFile.open(output) as file:
        latents = np.array(file.array("latents"))
        assert file.metadata == {"steps": "4", "seed": "0", "sampler": "plain"}
    assert latents.shape == (1, 4, toy.HEIGHT, toy.WIDTH)
    assert np.isfinite(latents).all()


def test_denoise_with_embeddings_from_a_file(folder: Path, tmp_path: Path) -> None:
    embeds, output = tmp_path / "embeds.safetensors", tmp_path / "latents.safetensors"
    safetensors.write(embeds, toy.Toy().given())
    command = ["denoise", str(folder), "--embeds", str(embeds), "--steps", "8", "--guidance", "4", "--seed", "3"]
    assert cli.main([*command, "--sampler", "noisy", "-o", str(output)]) == 0
    expected = toy.reference_run(toy.Toy(), Manifest.read(folder), toy.stored_weights(toy.Toy()))["latents"]
    with safetensors.SafetensorsFile.open(output) as file:
        np.testing.assert_allclose(file.array("latents"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--random-embeds", "0", "--steps", "4"], 2, "needs a guidance_scale"),
        (["--random-embeds", "0", "--steps", "99", "--guidance", "2"], 2, "no table for this number of steps"),
        (["--random-embeds", "0", "--steps", "4", "--guidance", "2", "--sampler", "x"], 2, "no such sampler"),
        (["--random-embeds", "-99999999999999999999", "--steps", "4", "--guidance", "2"], 2, "not a seed"),
        (["--embeds", "nowhere", "--steps", "4", "--guidance", "2"], 2, "cannot be read"),
        (["--embeds", "{folder}/unet/weights.safetensors", "--steps", "4", "--guidance", "2"], 2, "not embeddings"),
        (["--random-embeds", "0", "--steps", "4", "--guidance", "2", "--backend", "abacus"], 2, "abacus"),
    ],
    ids=["no guidance", "steps", "sampler", "seed", "no file", "no embeddings", "backend"],
)
def test_bad_input_exits_2_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    output = tmp_path / "latents.safetensors"
    filled = [argument.replace("{folder}", str(folder)) for argument in arguments]
    assert cli.main(["denoise", str(folder), *filled, "-o", str(output)]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not output.exists()


def test_options_of_the_backend_reach_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", str(folder), "--option", "threads=2", "--option", "device=cpu", "--option", "graph=false"]
    command.append("--option")
    assert cli.main([*command, "shade=a=b"]) == 0
    assert toy.ToyBackend.opened_with == {"threads": 2, "device": "cpu", "graph": False, "shade": "a=b"}
    assert cli.main([*command, "resident=all"]) == 2
    assert "no option of a backend" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "threads"])


def test_how_a_bundle_is_opened(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "latents.safetensors"
    command = ["denoise", str(folder), "--random-embeds", "0", "--steps", "4", "--guidance", "2", "-o", str(output)]
    assert cli.main([*command, "--prefetch", "--loop", "host", "--resident", "all"]) == 0
    assert cli.main([*command, "--prefetch", "--memory-limit", "1GiB"]) == 0
    assert cli.main([*command, "--resident", "all", "--memory-limit", "1GiB"]) == 2
    assert "memory_limit does not go with resident='all'" in capsys.readouterr().err
    assert cli.main([*command, "--loop", "device"]) == 5
    assert "device keeps no arrays" in capsys.readouterr().err


def test_an_output_nowhere_is_refused_before_anything_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["denoise", str(folder), "--random-embeds", "0", "--steps", "1", "--guidance", "2", "-o", "no/where"]
    assert cli.main(command) == 2
    assert "folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "info"])
def test_a_broken_bundle_exits_4(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert cli.main([command, str(tmp_path)]) == 4
    assert "not a finished bundle" in capsys.readouterr().err


def test_an_interrupt_exits_130(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.denoise, "_show_step", interrupt)
    output = tmp_path / "latents.safetensors"
    command = ["denoise", str(folder), "--random-embeds", "0", "--steps", "4", "--guidance", "2", "-o", str(output)]
    assert cli.main(command) == 130
    assert not output.exists()


def test_usage_errors_exit_2_and_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["paint"], ["denoise", "x"], ["check", "x", "--verify", "never"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()
    for command in ("check", "info", "denoise"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert f"hidiff-run {command} bundle" in out
        assert "exit codes" in out


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hidiff_runtime.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_results_without_a_place_exit_6(folder: Path) -> None:
    command = [sys.executable, "-m", "hidiff_runtime.cli", "info", str(folder)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 6
        assert done.stderr.splitlines()[0] == "error: The results cannot be printed."
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert subprocess.run([*command[:-1], str(folder / "none")], stderr=full, check=False).returncode == 4
