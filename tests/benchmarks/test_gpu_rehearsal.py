"""The GPU benchmark at tiny width on the CPU: its script, and each job's work on real engines."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import engines, parity, speed
from benchmarks.gpu.cases import PYTORCH, REHEARSAL, Scale
from benchmarks.gpu.pipelines import psnr_db
from benchmarks.gpu.record import ABSENT, DONE, FAILED, NOT_BEGUN, NOT_ENDED, Job, Record
from benchmarks.gpu.record import REHEARSAL as KIND
from benchmarks.gpu.table import markdown
from benchmarks.gpu.work import Work
from hidiff_export.compiler.stages import order
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.verification.reference_samples import ReferenceSamples

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.sh"


@dataclass(frozen=True)
class SmallWork(Work):
    """Work on a bundle that is there already."""

    made: Path

    @property
    def scale(self) -> Scale:
        return dataclasses.replace(REHEARSAL, parity_steps=3, run_steps=3)

    def recipe(self, backend: str | None = None) -> Recipe:  # noqa: ARG002 - the bundle decides
        return Recipe.from_dict(Manifest.read(self.made).recipe)

    @property
    def bundle(self) -> Path:
        return self.made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sd15_bundle: Path) -> Iterator[Path]:
    """Where the reference's arrays and the record are."""
    folder = tmp_path_factory.mktemp("gpu")
    Record(folder / "out.json").create(KIND, "abc")
    with torch.random.fork_rng(devices=[]):
        parity.reference(work(folder, sd15_bundle, Job("reference", "sd15-1024", "float16")))
        yield folder


def work(folder: Path, bundle: Path, job: Job) -> SmallWork:
    return SmallWork(job, Record(folder / "out.json"), folder, True, bundle)


def results(folder: Path, job: Job) -> list[dict[str, Any]]:
    return [result for result in Record(folder / "out.json").read()["results"] if result["job"] == job.name]


@pytest.mark.slow
def test_the_reference_is_the_published_packages(folder: Path) -> None:
    found = results(folder, Job("reference", "sd15-1024", "float16"))
    assert all(result["ok"] for result in found)
    published = [result for result in found if "published" in result["candidate"]]
    assert sorted(result["control"] for result in published) == [False, False, True, True]


@pytest.mark.slow
def test_engines_pass_and_what_is_wrong_does_not(folder: Path, sd15_bundle: Path) -> None:
    job = Job("parity", "sd15-1024", "float16", "onnxruntime")
    parity.engine_parity(work(folder, sd15_bundle, job))
    found = results(folder, job)
    assert all(result["ok"] for result in found), found
    kinds = {(result["what"], result["control"]) for result in found}
    assert kinds == {(what, control) for what in ("call", "run", "picture") for control in (False, True)}
    assert "## Parity" in markdown(Record(folder / "out.json").read())


@pytest.mark.slow
@pytest.mark.parametrize("by", [PYTORCH, "onnxruntime"])
def test_contenders_take_turns(folder: Path, sd15_bundle: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("speed", "sd15-1024", "float16", by)
    monkeypatch.setattr(SmallWork, "steps", work(folder, sd15_bundle, job).steps[:1])
    if by != PYTORCH:  # it is compiled once, for the time
        monkeypatch.setattr(torch, "compile", lambda module, **_options: module)
    speed.phases(work(folder, sd15_bundle, job))
    found = results(folder, job)
    assert all(result["status"] == DONE for result in found), found
    timed = {(result["phase"], result["contender"]) for result in found if result["what"] == "phase"}
    own = {"engine"} if by != PYTORCH else {"eager published package", "eager stock"}
    names = {"eager PhaseUNet", "compiled PhaseUNet"} | own
    assert timed == {("strided", name) for name in names}
    assert all(result["largest_bytes"] > 0 for result in found if result["what"] == "activation")


@pytest.mark.parametrize("by", ["eager published package", "onnxruntime"])
def test_whole_runs_take_time_and_memory(folder: Path, sd15_bundle: Path, by: str) -> None:
    job = Job("run", "sd15-1024", "float16", by)
    speed.whole_run(work(folder, sd15_bundle, job))
    (result,) = results(folder, job)
    assert result["steps"] == 3
    assert result["median_s"] > 0


def test_a_failure_is_a_result_and_the_next_goes_on(tmp_path: Path, sd15_bundle: Path) -> None:
    Record(tmp_path / "out.json").create(KIND, "abc")
    job = Job("parity", "sd15-1024", "float16", "onnxruntime")
    parity.engine_parity(work(tmp_path, sd15_bundle, job))  # there is no reference
    found = results(tmp_path, job)
    assert [result["status"] for result in found] == [FAILED] * 4
    assert all("No such file" in result["reason"] for result in found)


def test_a_bundle_is_built_with_every_stage_but_the_reference(
    tmp_path: Path, sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[Any] = []
    monkeypatch.setattr(engines, "build", lambda *_: stages.extend(order.STAGES))
    recipe = Recipe.from_dict(Manifest.read(sd15_bundle).recipe)
    before = order.STAGES
    engines.build_bundle(recipe, tmp_path / "bundle")
    assert order.STAGES is before
    assert [stage.name for stage in stages] == [stage.name for stage in before]
    assert stages[:-1] == list(before[:-1])
    index, _ = stages[-1].run(StageContext(recipe, tmp_path), lambda *_: None)
    assert not ReferenceSamples.read(index).calls


def test_the_script_tells_what_cannot_run_and_keeps_to_its_record(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(out, "--rehearse", "--cases", "sd15-1024", "--parts", "environment", "parity")
    assert done.returncode == 0, done.stderr
    data = Record(out).read()
    ends = {name: job["status"] for name, job in data["jobs"].items()}
    assert ends.pop("environment") == DONE
    assert len(ends) == 6
    assert set(ends.values()) == {ABSENT}
    assert "parity-sd15-1024-float16-tensorrt: cannot run" in markdown(data)
    other = run(out, "--cases", "sd15-1024")
    assert other.returncode == 2
    assert "another kind" in other.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_every_job_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "out.json", "--cases", "sd15-1024")
    assert done.returncode == 5, done.stderr
    assert "next:  --rehearse" in done.stderr
    found = Record(tmp_path / "out.json").read()["jobs"].values()
    assert {job["status"] for job in found} == {ABSENT}
    assert all("finds no CUDA device" in job["reason"] for job in found)


def test_an_interruption_ends_the_job_and_keeps_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = [SCRIPT, out, "--rehearse", "--cases", "sd15-1024", "--parts", "environment", "reference"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("reference"):
            break
    process.terminate()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(300) == 130
    assert "goes on from there" in told
    ends = {name: job["status"] for name, job in Record(out).read()["jobs"].items()}
    interrupted, never = (f"reference-sd15-1024-{precision}" for precision in ("float16", "bfloat16"))
    assert ends == {"environment": DONE, interrupted: NOT_ENDED, never: NOT_BEGUN}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV", "PYTHONWARN"))}
    return subprocess.run([SCRIPT, *words], env=clean, capture_output=True, text=True, timeout=600)


def test_the_picture_is_measured_against_four_deviations() -> None:
    picture = np.tile(np.array([-1.0, 1.0]), 8).astype(np.float32)
    assert psnr_db(picture, picture + np.float32(0.04)) == pytest.approx(40, abs=1e-3)
    assert psnr_db(picture, picture) == math.inf
    assert math.isnan(psnr_db(picture, picture * np.float32(np.nan)))
