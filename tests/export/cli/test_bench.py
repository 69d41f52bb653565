"""`bench` on the command line: real contenders in processes of their own, and all that can be wrong with one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy
from click.testing import CliRunner, Result
from PIL import Image

from hidiff_export.benchmarking import bench_plots
from hidiff_export.cli import main
from hidiff_runtime.format.manifest import Manifest


@pytest.fixture(autouse=True)
def _no_temporary_files_are_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    # PyTorch makes a cache of its own with its first import of the compiler, in whichever test that is.
    assert not [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor")]


def _bench(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(main, ["bench", *map(str, arguments)])


def _report(*arguments: object) -> dict[str, Any]:
    result = _bench(*arguments, "--json", "--threads", 1, "--rounds", 1, "--no-peaks")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"no JSON: {name}"))
    return report


def _by_name(report: dict[str, Any], place: int = 0) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in report["sizes"][place]["contenders"]}


@pytest.fixture
def changed(sd15_bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of the bundle whose files may be changed."""

    def copied(name: str) -> Path:
        shutil.copytree(sd15_bundle, tmp_path / name)
        return tmp_path / name

    return copied


@pytest.mark.slow
def test_peers_and_bundles_are_measured_and_faults_show(
    sd15_bundle: Path, changed: Callable[[str], Path], tmp_path: Path
) -> None:
    """Beside sound contenders: one with other weights, one that runs another phase, and one that is broken."""
    other, wrong, broken = changed("other-weights"), changed("wrong-phase"), changed("broken")
    with (other / "unet/weights.safetensors").open("r+b") as file:  # only the size of a store is looked at here
        file.seek(-4096, os.SEEK_END)
        file.write(b"\x3d" * 4096)
    manifest = Manifest.read(wrong)
    first, second = manifest.phases
    phases = (replace(first, engines=second.engines), replace(second, engines=first.engines))
    toy.seal(wrong, replace(manifest, phases=phases))
    engine = broken / Manifest.read(broken).phases[1].engines["onnxruntime"]
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    report = _report(sd15_bundle, other, wrong, broken, "--operators", "-o", tmp_path / "report")
    own = f"{sd15_bundle.name} onnxruntime"
    found = _by_name(report)
    names = ["diffusers", "hidiffusion", "eager", own]
    assert list(found) == [*names, *(f"{one.name} onnxruntime" for one in (other, wrong, broken))]
    assert found["diffusers"]["decibels"] is found["eager"]["decibels"] is None
    assert found["hidiffusion"]["decibels"] > 100
    assert found[own]["decibels"] > 80 > 60 > found["other-weights onnxruntime"]["decibels"]
    assert found["wrong-phase onnxruntime"]["decibels"] < 20
    assert "has changed" in found["broken onnxruntime"]["failure"] or "hash" in found["broken onnxruntime"]["failure"]
    assert found["broken onnxruntime"]["phases"].keys() == {"strided", "windowed"}
    _check_figures(report, found[own], found["diffusers"])
    assert json.loads((tmp_path / "report/bench.json").read_text()) == report
    page = (tmp_path / "report/bench.md").read_text()
    assert "- broken onnxruntime failed: " in page
    assert f"#### Operators of {own}, strided" in page


def _check_figures(report: dict[str, Any], bundle: dict[str, Any], stock: dict[str, Any]) -> None:
    """Compares what follows from the plan, and looks whether what is measured is there."""
    size = report["sizes"][0]
    assert [(phase["phase"], phase["steps"]) for phase in size["phases"]] == [("strided", 20), ("windowed", 30)]
    assert (size["width"], size["height"], size["batch"], size["model_batch"]) == (128, 128, 1, 2)
    assert size["base"] == "diffusers"
    tflops = [phase["tflops"] for phase in size["phases"]]
    assert bundle["run"]["tflops"] == pytest.approx(20 * tflops[0] + 30 * tflops[1])
    assert stock["run"]["tflops"] == pytest.approx(50 * size["stock_tflops"])
    assert stock["run"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    for one in (bundle, stock):
        assert one["peak_memory_bytes"] > 1 << 20
        for phase in one["phases"].values():
            assert [len(phase[key]) for key in ("wall", "processor")] == [1, 1]
            shares = [each["share"] for each in phase["operators"]]
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) == pytest.approx(1)
    assert "Conv" in [each["operator"] for each in bundle["phases"]["strided"]["operators"]]
    assert any("convolution" in each["operator"] for each in stock["phases"]["strided"]["operators"])
    assert report["machine"]["threads"] == 1
    assert report["settings"] == {"steps": 50, "rounds": 1, "timesteps": [981, 501, 1]}


@pytest.mark.slow
def test_people_get_a_table_with_what_is_missing_and_plots(sd15_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    result = _bench(sd15_bundle, "--peers", "stable-diffusion.cpp", "--rounds", 2, "--threads", 1, "-o", output)
    assert result.exit_code == 0, result.output
    assert f"{sd15_bundle.name} onnxruntime" in result.stdout
    assert "note: stable-diffusion.cpp is left out: it draws whole pictures" in result.stdout
    assert "note: No dB with HiDiffusion: eager in float32 is not measured. Add it to --peers." in result.stdout
    assert "GFLOP/s: float32 " in (output / "bench.md").read_text()
    assert json.loads((output / "bench.json").read_text())["peak_gflops"].keys() == {"float32", "bfloat16", "int8"}
    if not bench_plots.available():
        assert "plots are left out: matplotlib is not installed." in result.stderr
        assert not (output / "plots").exists()
        return
    for name in ("steps-128x128.png", "run-128x128.png"):
        with Image.open(output / "plots" / name) as picture:
            assert picture.width > 800
        assert f"![{name}](plots/{name})" in (output / "bench.md").read_text()


@pytest.mark.slow
def test_a_recipe_is_measured_by_its_peers(tmp_path: Path) -> None:
    """At both of its sizes, in both precisions, compared with a row of one's own choice."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "family: sd15\nsource: random:0\nunet_width: tiny\nsizes: [128x128, 192x128]\nsampler: ddim\nsteps: 10\n"
    )
    options = ("--peers", "diffusers,eager,eager:bfloat16", "--base", "eager", "--steps", 10)
    report = _report(recipe, *options, "-o", tmp_path / "report")
    assert [(size["width"], size["base"]) for size in report["sizes"]] == [(128, "eager"), (192, "eager")]
    for place in range(2):
        found = _by_name(report, place)
        assert list(found) == ["diffusers", "eager", "eager:bfloat16"]
        assert 20 < found["eager:bfloat16"]["decibels"] < 60
    if bench_plots.available():
        assert (tmp_path / "report/plots/sizes.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("BUNDLE", "--peers", "tensorflow"), 2, "There is no such peer."),
        (("BUNDLE", "--peers", "eager:int8"), 2, "There is no such peer."),
        (("BUNDLE", "--rounds", "0"), 2, "0 is not in the range"),
        (("BUNDLE", "--size", "big"), 2, "'big' is not WIDTHxHEIGHT"),
        (("BUNDLE", "--size", "640x640"), 2, "No bundle has this size."),
        (("BUNDLE", "--backend", "tensorrt"), 2, "The bundle has no engines of this backend."),
        (("BUNDLE", "--base", "stock"), 2, "There is no such row to compare with."),
        (("BUNDLE", "--peer-python", "optimum-intel=/nowhere"), 2, "Expected PEER=PYTHON"),
        (("BUNDLE", "tiny"), 2, "Expected folders of bundles, or one recipe."),
        (("no-such-recipe",), 2, "no-such-recipe"),
        (("tiny", "--peers", "none"), 2, "There is nothing to measure."),
        (("tiny", "--backend", "onnxruntime"), 2, "A recipe has no engines."),
        (("tiny", "--size", "640x640"), 2, "The recipe has no such size."),
        (("EMPTY",), 4, "manifest.json"),
        ((), 2, "Missing argument"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    sd15_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"BUNDLE": str(sd15_bundle), "EMPTY": str(tmp_path / "empty")}
    result = _bench(*(places.get(word, word) for word in arguments), "-o", tmp_path / "report")
    assert result.exit_code == code, result.output
    assert words in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": "sd21"}, "of another family"),
        ({"guidance": False}, "of another guidance"),
        ({"task": "inpainting"}, "of another task"),
        ({"recipe": {"source": "random:1"}}, "of another checkpoint"),
    ],
)
def test_bundles_that_compute_something_else_are_refused(
    sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    """The second bundle is the first with another word in its manifest."""
    read = Manifest.read
    manifest = read(sd15_bundle)
    given = {**change, "recipe": {**manifest.recipe, **change.get("recipe", {})}}
    shared = replace(manifest.whole.shared, **given)
    other = replace(manifest.whole, shared=shared).manifests[0]
    again = iter([manifest, other])
    monkeypatch.setattr(Manifest, "read", lambda _path: next(again))
    result = _bench(sd15_bundle, sd15_bundle, "-o", tmp_path / "report")
    assert result.exit_code == 2, result.output
    assert f"Bundles {words} cannot be compared." in result.output


def test_a_folder_that_holds_something_else_is_left_alone(sd15_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    result = _bench(sd15_bundle, "-o", tmp_path)
    assert result.exit_code == 2
    assert "There is something else than an older report." in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_an_interrupted_run_leaves_no_process_and_no_report(sd15_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hidiff_export", "bench", str(sd15_bundle), "--peers", "none", "--no-peaks"]
    command += ["--rounds", "1000000", "-o", str(tmp_path / "report")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        children: list[psutil.Process] = []
        while not any("evaluation_worker" in " ".join(child.cmdline()) for child in children):
            assert process.poll() is None
            time.sleep(0.05)
            children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Interrupted." in words
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert list(tmp_path.iterdir()) == []
