"""A real build, interrupted at every stage and refused by the disk, that goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_export.compiler.compile import build, stage_key
from hidiff_export.compiler.stages.engines import EnginesStage
from hidiff_export.compiler.stages.graphs import GraphsStage
from hidiff_export.compiler.stages.order import QUANTIZED_STAGES, STAGES, check_order
from hidiff_export.compiler.stages.quantization import QuantizationStage
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage, tabulated
from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.compiler.stages.weights import WeightsStage
from hidiff_export.compiler.workspace import STATE
from hidiff_export.errors import BundleError, Cancelled, ExportError, StorageError
from hidiff_export.families.family import default_scheduler
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Prediction
from hidiff_runtime import check
from hidiff_runtime.format.manifest import Contents, FileDigest, Manifest
from tests.export.compiler.disk import files_of_at_most

SMALL = (
    *("width=64", "height=64", "guidance=false", "sampler=[ddim]", "steps=1-5", "text=false", "vae=false"),
    "hidiffusion.thresholds.strided=1.0",  # one phase, for the time
)


class Interrupting:
    """A display at whose stage ``title`` somebody presses Ctrl-C as soon as it shows progress."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.reused: list[str] = []
        self.notices: list[str] = []

    @contextmanager
    def stage(self, title: str, *, reused: bool) -> Iterator[Report]:
        if reused:
            self.reused.append(title)

        def report(_done: float, _total: float, _note: str) -> None:
            if title == self.title:
                raise KeyboardInterrupt

        yield report

    def notice(self, text: str) -> None:
        self.notices.append(text)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load("tiny", SMALL)


@pytest.fixture(scope="module")
def bundle(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in spite of a full disk, and of Ctrl-C at every stage."""
    output = tmp_path_factory.mktemp("build") / "bundle"
    with files_of_at_most(1_000_000), pytest.raises(StorageError) as refused:
        build(recipe, output, Interrupting())
    assert refused.value.exit_code == 6
    assert "unet/weights.safetensors" not in names(output.with_name("bundle.partial"))
    titles = [stage.title for stage in STAGES]
    for attempt, title in enumerate(titles):
        display = Interrupting(title)
        with pytest.raises(Cancelled) as cancelled:
            build(recipe, output, display)
        assert cancelled.value.exit_code == 130
        assert not output.exists()
        # Each attempt finishes the stage that the one before was interrupted in, and does nothing twice.
        assert display.reused == titles[: max(0, attempt - 1)]
    build(recipe, output, Interrupting())
    return output


def test_the_bundle_holds_what_its_manifest_lists_and_nothing_else(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert names(bundle) == sorted([*manifest.files, "manifest.json"])
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_the_engines_compute_what_pytorch_recorded(bundle: Path) -> None:
    report = check(bundle)
    assert report.ok
    assert {verdict.phase for verdict in report.verdicts} >= {"strided"}


def test_a_finished_bundle_is_not_built_again(bundle: Path, recipe: Recipe) -> None:
    with pytest.raises(BundleError) as refused:
        build(recipe, bundle, Interrupting())
    assert "--force" in refused.value.advice


def test_a_stage_of_other_code_or_another_recipe_is_not_reused(recipe: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(Cancelled):
        build(recipe, output, Interrupting("sampler tables"))
    state = json.loads((tmp_path / "bundle.partial" / STATE).read_text())
    assert list(state["stages"]) == ["weights"]
    display = Interrupting("sampler tables")
    with pytest.raises(Cancelled):
        build(Recipe.load("tiny", (*SMALL, "source=random:1")), output, display)
    assert display.reused == []


def test_weights_with_another_noise_schedule_are_not_reused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stage_key(WeightsStage(), StageContext(recipe, tmp_path), {})
    schedule = {**default_scheduler(recipe.family)[1], "prediction_type": "v_prediction"}
    monkeypatch.setattr("hidiff_export.scheduler_tables.noise_schedule.find_scheduler_config", lambda _source: schedule)
    assert stage_key(WeightsStage(), StageContext(recipe, tmp_path), {}) != before
    own = recipe.model_copy(update={"prediction": Prediction.EPSILON})  # which outdoes what comes with the checkpoint
    assert stage_key(WeightsStage(), StageContext(own, tmp_path), {}) == before


def test_what_is_doubted_of_a_checkpoint_is_told_once_a_build_and_again_when_it_goes_on(tmp_path: Path) -> None:
    asked = Recipe.load("tiny", (*SMALL, "steps=1", "sampler=[ddim, euler]"))
    for _ in range(2):
        display = Interrupting("sampler tables")
        with pytest.raises(Cancelled):
            build(asked, tmp_path / "bundle", display)
        (told,) = display.notices
        assert "begins at timestep 1 of 999 and gives noise" in told
    assert display.reused == ["weights"]


def test_weights_of_another_pipeline_are_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdxl = {"family": "sdxl", "source": "random:0", "unet_width": "tiny", "width": 128, "height": 128}
    context = StageContext(Recipe.from_dict(sdxl), tmp_path)
    before = stage_key(WeightsStage(), context, {})
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False}
    monkeypatch.setattr("hidiff_export.checkpoints.model_index.find_model_index", lambda _source: index)
    assert stage_key(WeightsStage(), context, {}) != before
    index["force_zeros_for_empty_prompt"] = True
    assert stage_key(WeightsStage(), context, {}) == before


@pytest.mark.parametrize("changed", [{"timesteps": [999, 599, 100]}, {"tcd_eta": 0.1}, {"sampler": ["euler"]}])
def test_tables_of_other_runs_are_not_reused(changed: dict[str, Any]) -> None:
    given = {**Recipe.load("tiny").to_dict(), "sampler": ["euler", "tcd"], "steps": [3], "timesteps": [999, 599, 199]}
    assert tabulated(Recipe.from_dict(given)) == tabulated(Recipe.from_dict({**given, "source": "random:1"}))
    assert tabulated(Recipe.from_dict(given)) != tabulated(Recipe.from_dict({**given, **changed}))


def test_a_build_tells_what_it_leaves_out_of_a_pipeline_whether_weights_are_made_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": ["stable_diffusion", "SafetyChecker"]}
    monkeypatch.setattr("hidiff_export.checkpoints.model_index.find_model_index", lambda _source: index)
    told: list[str] = []
    WeightsStage().inputs(StageContext(Recipe.load("tiny"), tmp_path, notice=told.append))
    assert [text for text in told if text == "model_index.json: left out safety_checker (no picture is checked)"]


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        (
            (WeightsStage(), GraphsStage(), EnginesStage(), SchedulerTablesStage(), WeightsStage()),
            "weights, graphs, engines, samplers, weights: two stages are called weights",
        ),
        (
            (WeightsStage(), EnginesStage(), GraphsStage()),
            "weights, engines, graphs: engines needs graphs, which does not come before it",
        ),
        ((GraphsStage(),), "graphs: graphs needs weights, which is not among them"),
        (
            (WeightsStage(), GraphsStage(), EnginesStage(QuantizationStage.name)),
            "weights, graphs, engines: engines needs quantization, which is not among them",
        ),
    ],
)
def test_stages_in_an_order_that_cannot_run_are_refused_before_any_work(
    stages: tuple[Stage, ...], fault: str, recipe: Recipe, tmp_path: Path
) -> None:
    display = Interrupting("weights")
    with pytest.raises(ExportError) as refused:
        build(recipe, tmp_path / "bundle", display, stages=stages)
    assert refused.value.summary == "The stages of the build cannot run in the order that they were put together in."
    assert refused.value.given == fault
    assert "hidiff_export.compiler.stages.order" in refused.value.advice
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stages", [STAGES, QUANTIZED_STAGES])
def test_the_usual_stages_are_in_order_and_depend_on_it(stages: tuple[Stage, ...]) -> None:
    check_order(stages)
    with pytest.raises(ExportError):
        check_order(stages[::-1])
    for needed in {name for stage in stages for name in stage.needs}:
        with pytest.raises(ExportError):
            check_order([stage for stage in stages if stage.name != needed])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["build", "tiny", "-o", "{out}", "--set", "width=100"], 2),
        (["build", "tiny", "-o", "{out}", "--source", "nowhere/at/all.safetensors", "--set", "unet_width=full"], 3),
        (["build", "no-such-recipe", "-o", "{out}"], 2),
        (["inspect", "{out}"], 4),
    ],
)
def test_what_cannot_be_built_leaves_nothing(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [word.format(out=tmp_path / "bundle") for word in arguments])
    assert done.exit_code == code
    assert "next:" in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


class Telling:
    """A stage that writes a file and tells something."""

    name, title, needs, module = "telling", "telling", (), __name__

    def inputs(self, _context: StageContext) -> None:
        """Nothing."""

    def run(self, context: StageContext, _report: Report) -> tuple[Path, ...]:
        """Writes and tells."""
        context.notice("as it was found")
        path = context.folder / "unet/found"
        path.parent.mkdir(parents=True)
        path.write_text("found", encoding="utf-8")
        return (path,)


class Other(Telling):
    """A stage that writes another file."""

    name = title = "another"

    def run(self, context: StageContext, _report: Report) -> tuple[Path, ...]:
        """Writes."""
        path = context.folder / "unet/another"
        path.write_text("another", encoding="utf-8")
        return (path,)


class Stopping(Telling):
    """A stage at which somebody presses Ctrl-C."""

    name, title, needs = "stopping", "stopping", ("telling",)

    def run(self, _context: StageContext, _report: Report) -> tuple[Path, ...]:
        """Is interrupted."""
        raise KeyboardInterrupt


def test_a_build_that_goes_on_without_a_stage_has_not_its_files(recipe: Recipe, tmp_path: Path) -> None:
    listed: list[str] = []

    def assemble(_context: StageContext, files: Mapping[str, FileDigest]) -> Contents:
        listed.extend(files)
        raise Cancelled("enough is known")

    with pytest.raises(Cancelled):
        build(recipe, tmp_path / "bundle", Interrupting(), stages=(Telling(), Stopping()))
    with pytest.raises(Cancelled, match="enough"):
        build(recipe, tmp_path / "bundle", Interrupting(), stages=(Other(),), assemble=assemble)
    assert listed == ["unet/another"]


def test_what_a_finished_stage_told_is_told_again_when_a_build_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    for reused in ([], ["telling"]):
        display = Interrupting()
        with pytest.raises(Cancelled):
            build(recipe, tmp_path / "bundle", display, stages=(Telling(), Stopping()))
        assert (display.reused, display.notices) == (reused, ["as it was found"])
