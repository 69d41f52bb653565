"""A verification with PyTorch in the engines' place: what holds, and what each kind of damage makes fail."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import linked
import numpy as np
import pytest
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_export.errors import CheckpointError, EngineError, InputError
from hidiff_export.recipe import Recipe
from hidiff_export.reference.tolerances import Boundary
from hidiff_export.verification.report import Report
from hidiff_export.verification.verify import verify
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import verify_files
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.format.safetensors import write as write_tensors
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from tests.export.verification.torch_bundle import TorchBackend, build, refresh, use, write_manifest

COMMON = {"source": "random:0", "unet_width": "tiny", "width": 128, "height": 128, "steps": [3]}
SD15 = Recipe.from_dict({**COMMON, "family": "sd15", "sampler": "euler_ancestral"})
# A ControlNet sees latents of 128 at the longer side, 8x128 here, which is cheap.
WIDE = {"width": 768, "height": 64}
TASKS = {
    "sd21, no guidance": {"family": "sd21", "guidance": False, "batch": 2, "sampler": "pndm", "width": 192},
    "sdxl, two rescaled pictures": {"family": "sdxl", "steps": [3, 7], "batch": 2, "guidance_rescale": 0.7},
    "sdxl inpainting": {"family": "sdxl", "task": "inpainting", "batch": 2},
    "sdxl controlnet": {"family": "sdxl", "task": "controlnet"},
    "sd15 with a controlnet, rescaled": {
        **{"family": "sd15", "task": "controlnet", "controlnet": "random:1", "guidance_rescale": 0.7},
        **WIDE,
    },
    "turbo, second order": {"family": "sdxl-turbo", "sampler": "heun", "steps": [2]},
    "no windows": {"family": "sd15", "hidiffusion": {"windows": False}},
}

LIVE = {Boundary.TRAJECTORY.value, Boundary.RANDOM.value, Boundary.RUN.value}
"""What engines are judged by, beside the samples that the bundle brings."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SD15, tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def bundle(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one's own to damage."""
    use(TorchBackend(SD15), monkeypatch)
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def failing(report: Report) -> set[str]:
    return {verdict.boundary for verdict in report.failures}


def test_a_whole_bundle_holds_at_every_boundary_and_progress_is_told(bundle: Path) -> None:
    told: list[tuple[float, float, str]] = []

    report = verify(bundle, progress=lambda *now: told.append(now))

    assert report.ok
    done = [now[0] for now in told]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(told[-1][1], rel=0.01)
    assert {note.partition(":")[0] for _, _, note in told} >= {"diffusers", "PyTorch", "engine", "graph", "denoiser"}
    measured = Counter(verdict.boundary for verdict in report.verdicts)
    assert measured[Boundary.TRAJECTORY.value] == 3
    assert measured[Boundary.RANDOM.value] == 2
    assert measured[Boundary.GRAPH.value] == 2
    assert measured[Boundary.RUN.value] == 1
    assert measured[Boundary.RECORDED_CALL.value] == 5
    assert measured[Boundary.RECORDED_RUN.value] == 1
    assert measured[Boundary.SAMPLER.value] == measured[Boundary.RECORDED_SAMPLER.value] == 1
    assert measured[Boundary.MANIFEST.value] == 1
    for boundary in (Boundary.TRAJECTORY, Boundary.RANDOM):
        phases = {verdict.phase for verdict in report.verdicts if verdict.boundary == boundary.value}
        assert phases == {"strided", "windowed"}


def test_without_onnx_runtime_nothing_is_begun(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backend runs, but the portable graphs could not be checked in the end."""
    use(TorchBackend(SD15, missing="onnxruntime is not installed"), monkeypatch)
    with pytest.raises(EngineError, match="portable graphs cannot be checked") as caught:
        verify(bundle)
    assert caught.value.exit_code == 5
    assert caught.value.advice == "pip install it"


@pytest.mark.parametrize("case", TASKS)
def test_every_task_is_proven_by_its_own_pipeline(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_dict({**COMMON, **TASKS[case]})
    use(TorchBackend(recipe), monkeypatch)

    report = verify(build(recipe, tmp_path / "bundle"))

    check_whole(report, recipe)


def check_whole(report: Report, recipe: Recipe) -> None:
    """Every boundary holds, in every phase, and a ControlNet is judged where there is one."""
    assert report.ok, report.to_markdown()
    other = {Boundary.CONTROLNET.value, Boundary.SAMPLER.value, Boundary.RECORDED_SAMPLER.value}
    phases = {verdict.phase for verdict in report.verdicts if verdict.boundary not in other}
    assert phases == {None, *(phase.name for phase in recipe.phase_rule().phases())}
    boundaries = {verdict.boundary for verdict in report.verdicts}
    assert (Boundary.CONTROLNET.value in boundaries) == (recipe.controlnet is not None)


RESCALED = {"sd15": {"family": "sd15"}, "sd15 inpainting": {"family": "sd15", "task": "inpainting"}}
"""A pipeline that takes a rescale of guidance, and one that does not; `TASKS` has more of each."""


@pytest.mark.parametrize("case", RESCALED)
def test_a_bundles_own_rescale_is_the_references_too(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_dict({**COMMON, **RESCALED[case], "guidance_rescale": 0.7})
    use(TorchBackend(recipe), monkeypatch)
    folder = build(recipe, tmp_path / "bundle")

    report = verify(folder)
    assert report.ok, report.to_markdown()

    manifest = Manifest.read(folder)
    write_manifest(folder, replace(manifest, guidance_rescale=0.0))
    assert failing(verify(folder)) == {Boundary.RUN.value, Boundary.MANIFEST.value}
    index = folder / "reference/samples.json"
    samples = json.loads(index.read_text(encoding="utf-8"))
    assert samples["runs"][0]["guidance_rescale"] == 0.7
    samples["runs"][0]["guidance_rescale"] = 0.0
    index.write_text(json.dumps(samples), encoding="utf-8")
    write_manifest(folder, manifest)
    assert failing(verify(folder)) == {Boundary.RECORDED_STEP.value, Boundary.RECORDED_RUN.value}


def test_the_source_a_bundle_was_built_from_holds_and_another_seed_fails_everywhere(bundle: Path) -> None:
    same, other = verify(bundle, against="random:0"), verify(bundle, against="random:1")

    assert same.ok
    assert same.verdicts[0].boundary == Boundary.WEIGHTS.value
    assert same.against == "random:0"
    assert failing(other) >= {
        Boundary.WEIGHTS.value,
        Boundary.TRAJECTORY.value,
        Boundary.RANDOM.value,
        Boundary.RUN.value,
    }


def test_engines_of_two_phases_swapped(bundle: Path) -> None:
    strided, windowed = bundle / "unet/strided.engine", bundle / "unet/windowed.engine"
    first, second = strided.read_text(encoding="utf-8"), windowed.read_text(encoding="utf-8")
    strided.write_text(second, encoding="utf-8")
    windowed.write_text(first, encoding="utf-8")

    report = verify(refresh(bundle))

    assert failing(report) >= {*LIVE, Boundary.RECORDED_CALL.value, Boundary.RECORDED_RUN.value}
    assert Boundary.GRAPH.value not in failing(report)
    calls = [verdict for verdict in report.verdicts if verdict.boundary in (Boundary.TRAJECTORY, Boundary.RANDOM)]
    assert not any(verdict.ok for verdict in calls)


@dataclass
class CannotRun(TorchBackend):
    """Runs graphs, and no engine."""

    def open(self, engine: Path, *arguments: Any) -> Any:
        assert engine.suffix == ".onnx"
        return super().open(engine, *arguments)


@pytest.mark.parametrize("against", [None, "random:0"])
def test_graphs_alone_are_judged_where_no_engine_runs(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, against: str | None
) -> None:
    use(CannotRun(SD15), monkeypatch)

    report = verify(bundle, against=against, graphs_only=True)

    assert report.ok
    assert report.candidate == "portable graphs"
    weights = [] if against is None else [Boundary.WEIGHTS.value]
    settled = [Boundary.SAMPLER.value, Boundary.MANIFEST.value]
    assert [verdict.boundary for verdict in report.verdicts] == [*weights, *settled, *[Boundary.GRAPH.value] * 2]
    assert "Engines: none ran" in report.to_markdown()


def test_a_wrong_graph_fails_where_no_engine_runs(bundle: Path) -> None:
    shutil.copy(bundle / "unet/windowed.onnx", bundle / "unet/strided.onnx")
    refresh(bundle)

    result = CliRunner().invoke(main, ["verify", str(bundle), "--graphs-only", "--json"])

    assert result.exit_code == 1
    assert [verdict["ok"] for verdict in json.loads(result.stdout)["verdicts"]][-2:] == [False, True]


def test_a_graph_of_another_phase(bundle: Path) -> None:
    shutil.copy(bundle / "unet/windowed.onnx", bundle / "unet/strided.onnx")

    report = verify(refresh(bundle))

    assert failing(report) == {Boundary.GRAPH.value}
    assert [verdict.phase for verdict in report.failures] == ["strided"]


def test_one_shift_of_one_recorded_sample_changed(bundle: Path) -> None:
    index = bundle / "reference/samples.json"
    samples = json.loads(index.read_text(encoding="utf-8"))
    shifts = samples["calls"][1]["window_shifts"]
    shifts[2] = (shifts[2] + 1) % 4
    index.write_text(json.dumps(samples), encoding="utf-8")

    report = verify(refresh(bundle))

    assert failing(report) == {Boundary.RECORDED_CALL.value}
    assert len(report.failures) == 1


def test_a_sampler_table_changed_where_no_run_looks(bundle: Path) -> None:
    path = bundle / "samplers/table.safetensors"
    table = SamplerTable.read(path)
    replace(table, noising=table.noising * 1.01).write(path)
    refresh(bundle)

    report = verify(bundle)

    assert failing(report) == {Boundary.SAMPLER.value, Boundary.RECORDED_SAMPLER.value}
    assert {verdict.fault for verdict in report.failures} == {"noised picture of 3 steps, evaluation 3"}


def test_a_setting_of_the_manifest_that_is_not_the_recipes(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    write_manifest(bundle, replace(manifest, windowed_blocks=manifest.windowed_blocks[::-1]))

    report = verify(bundle)

    assert failing(report) == {Boundary.MANIFEST.value}
    assert report.failures[0].fault.startswith("windowed_blocks: expected ['down_blocks.0")


def test_one_weight_changed_is_found_against_the_source_alone(bundle: Path) -> None:
    name = "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_q.weight"
    change_weight(bundle / "unet/weights.safetensors", name)
    refresh(bundle)

    own, against = verify(bundle), verify(bundle, against="random:0")

    assert failing(own) == {Boundary.RECORDED_CALL.value, Boundary.RECORDED_STEP.value, Boundary.RECORDED_RUN.value}
    weights = against.verdicts[0]
    assert not weights.ok
    assert weights.fault == f"1 tensors differ: {name}"
    assert failing(against) >= {
        Boundary.WEIGHTS.value,
        Boundary.TRAJECTORY.value,
        Boundary.RANDOM.value,
        Boundary.RUN.value,
    }


def change_weight(store: Path, name: str) -> None:
    """Scales one tensor by 1.5."""
    with SafetensorsFile.open(store) as file:
        tensors = {key: np.array(value) for key, value in file.arrays().items()}
    tensors[name] = tensors[name] * np.float32(1.5)
    write_tensors(store, tensors)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda outputs: {"noise_pred": np.where(outputs["noise_pred"] > 2, np.nan, outputs["noise_pred"])}, "NaN"),
        (lambda _outputs: {}, "missing output"),
    ],
)
def test_an_engine_that_gives_no_sound_output(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, fault: str
) -> None:
    use(TorchBackend(SD15, spoil), monkeypatch)

    report = verify(bundle)

    calls = [verdict for verdict in report.verdicts if verdict.boundary == Boundary.RANDOM.value]
    assert calls
    assert all(fault in verdict.fault for verdict in calls)
    assert Boundary.RUN.value in failing(report)


def test_a_checkpoint_that_is_not_there_and_a_step_count_that_is_not_tabulated_are_refused(bundle: Path) -> None:
    with pytest.raises(CheckpointError):
        verify(bundle, against=str(bundle / "nowhere"))
    with pytest.raises(InputError, match="no table for this number of steps"):
        verify(bundle, steps=4)


def test_the_command_prints_the_report_writes_junit_and_keeps_it_in_the_bundle(bundle: Path, tmp_path: Path) -> None:
    junit = tmp_path / "parity.xml"

    result = CliRunner().invoke(main, ["verify", str(bundle), "--json", "--junit", str(junit)])

    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["ok"]
    assert "<testsuite" in junit.read_text(encoding="utf-8")
    manifest = Manifest.read(bundle)
    assert manifest.report is not None
    assert json.loads((bundle / manifest.report).read_text(encoding="utf-8")) == printed
    verify_files(BundleFolder(bundle), manifest.files)


def test_a_bundle_of_links_is_verified_where_it_may_and_its_store_stays_as_it_is(bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder = linked.elsewhere(bundle, home)
    stored = {path: path.read_bytes() for path in (home / "store").rglob("*") if path.is_file()}
    refused = CliRunner().invoke(main, ["verify", str(folder)])
    assert refused.exit_code == 4
    assert "consists of symbolic links that lead out" in refused.stderr

    result = CliRunner().invoke(main, ["verify", str(folder), "--json", "--allow-links", str(home / "store")])

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ok"]
    assert "The report was not kept in the bundle: What would be written over is a symbolic link" in result.stderr
    assert {path: path.read_bytes() for path in (home / "store").rglob("*") if path.is_file()} == stored


def test_the_command_fails_with_1_when_a_comparison_does(bundle: Path) -> None:
    shutil.copy(bundle / "unet/windowed.engine", bundle / "unet/strided.engine")
    refresh(bundle)

    result = CliRunner().invoke(main, ["verify", str(bundle)], env={"COLUMNS": "200"})

    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert json.loads((bundle / "parity/report.json").read_text(encoding="utf-8"))["ok"] is False


def test_a_bundle_that_cannot_be_written_to_is_verified_all_the_same(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hidiff_export.verification.report.write_json", refuse)

    result = CliRunner().invoke(main, ["verify", str(bundle), "--json"])

    assert result.exit_code == 0
    assert "was not kept in the bundle" in result.stderr
    assert Manifest.read(bundle).report is None


def test_another_controlnet_in_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is given the store's weights, the engines keep those they were opened with."""
    controlled = {"family": "sdxl", "task": "controlnet", "controlnet": "random:1", **WIDE}
    recipe = Recipe.from_dict({**COMMON, **controlled})
    use(TorchBackend(recipe), monkeypatch)
    folder = build(recipe, tmp_path / "bundle")
    check_whole(verify(folder), recipe)
    change_weight(folder / "controlnet/weights.safetensors", "controlnet_mid_block.weight")

    report = verify(refresh(folder))

    assert failing(report) == {Boundary.CONTROLNET.value, Boundary.RUN.value}
