"""A bundle moved to another checkpoint and back is the bundle it was, byte for byte, and nothing is traced for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import linked
import onnx
import pytest
import torch
from click.testing import CliRunner, Result

import hidiff_runtime
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.cli import main
from hidiff_export.compiler.graph_specs import phase_record
from hidiff_export.compiler.rebase import check_checkpoint, rebase, rebased_recipe
from hidiff_export.compiler.stages.graphs import _modules
from hidiff_export.compiler.stages.reuse import check_graph
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.errors import BundleError, CheckpointError, InputError
from hidiff_export.graph import portable
from hidiff_export.graph.portable import write_graph
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Precision, Prediction
from hidiff_export.scheduler_tables.noise_schedule import resolve_noise_schedule
from hidiff_runtime import check
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from hidiff_runtime.reused_features import Reuse
from tests.conftest import NoDisplay
from tests.loras import factors, kohya


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every export fail."""

    monkeypatch.setattr(portable, "capture", _refuse)
    monkeypatch.setattr(SchedulerTablesStage, "run", _refuse)


def recipe_of(bundle: Path) -> Recipe:
    return rebased_recipe(Manifest.read(bundle), {})[0]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("no_tracing")
def test_there_and_back_gives_what_was_built(sd15_bundle: Path, tmp_path: Path) -> None:
    built = files(sd15_bundle)
    there = rebase(sd15_bundle, tmp_path / "there", NoDisplay(), changes={"source": "random:1"}).folder
    assert check(there).ok
    moved = files(there)
    assert moved.keys() == built.keys()
    changed = {path for path in built if built[path] != moved[path]}
    assert {"unet/weights.safetensors", "text_encoder/weights.safetensors", "vae/weights.safetensors"} <= changed
    assert not any(path.endswith(".onnx") or path.startswith("samplers/") for path in changed)
    back = rebase(there, tmp_path / "back", NoDisplay(), changes={"source": "random:0"}).folder
    after = files(back)
    assert [path for path in built.keys() | after.keys() if built.get(path) != after.get(path)] == []
    assert files(sd15_bundle) == built, "the bundle that graphs were taken from was touched"


def test_graphs_do_not_depend_on_the_weights(sd15_bundle: Path, tmp_path: Path) -> None:
    """Graphs of weights that are all alike, zero biases and unit norms among them, which folding could see through.

    The bundle's come of an earlier export, so that this shows too that an export gives the same bytes every time.
    """
    recipe = recipe_of(sd15_bundle)
    context = StageContext(recipe, tmp_path / "bundle")
    for component in (Component.UNET, Component.TEXT_ENCODER, Component.VAE):
        config = json.loads((sd15_bundle / component.value / "config.json").read_text())
        alike = {
            name: torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            for name, shape in component.shapes(component.config(recipe.family, recipe.task, recipe.unet_width)).items()
        }
        folder = context.folder / component.value
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        WeightStore.write(alike, folder / "weights.safetensors", Precision.FLOAT32)
    traced = ["unet/windowed.onnx", "text_encoder/text_encoder.onnx", "vae/decoder.onnx"]
    for module, batch, store, path in _modules(context):
        name = path.relative_to(context.folder).as_posix()
        if name in traced:
            write_graph(module, batch, store, path)
            assert path.read_bytes() == (sd15_bundle / name).read_bytes(), name
            traced.remove(name)
    assert not traced


def store_of(bundle: Path, path: Path, precision: Precision = Precision.FLOAT32, **more: torch.Tensor) -> WeightStore:
    """A store of the bundle's UNet in another place, with ``more`` tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = WeightStore.open(bundle / "unet" / "weights.safetensors").state_dict()
    return WeightStore.write({**tensors, **more}, path, precision)


def test_a_graph_that_does_not_fit_the_store_is_not_taken(sd15_bundle: Path, tmp_path: Path) -> None:
    context = StageContext(recipe_of(sd15_bundle), sd15_bundle)
    phase = context.phases[0]
    graph, record = context.graph(phase), phase_record(context, phase)
    name = "weights.safetensors"
    check_graph(graph, record, store_of(sd15_bundle, tmp_path / "same" / name))
    others = {
        "float16": store_of(sd15_bundle, tmp_path / "half" / name, Precision.FLOAT16),
        "moved": store_of(sd15_bundle, tmp_path / "moved" / name, first=torch.zeros(4096)),
        "elsewhere": store_of(sd15_bundle, tmp_path / "elsewhere.safetensors"),
    }
    for what, store in others.items():
        with pytest.raises(BundleError, match="do not fit the new weights"):
            check_graph(graph, record, store)
        assert what
    model = onnx.load(graph, load_external_data=False)
    weight = next(one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL)
    for named in (weight, model.graph.input[0]):
        named.name = "another"
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(model.SerializeToString())
        with pytest.raises(BundleError):
            check_graph(broken, record, store_of(sd15_bundle, tmp_path / "same" / name))
    (tmp_path / "none.onnx").write_bytes(b"\xff no graph")
    with pytest.raises(BundleError):
        check_graph(tmp_path / "none.onnx", record, store_of(sd15_bundle, tmp_path / "same" / name))


def checkpoint(folder: Path, recipe: Recipe, *components: Component) -> Recipe:
    """A folder of tiny networks as diffusers writes them."""
    from hidiff_export.checkpoints.load import build, load

    for component in components:
        network = build(component, *load(component, "random:3", recipe.family, recipe.task, recipe.unet_width)[:2])
        network.save_pretrained(folder / component.value)
    return recipe.model_copy(update={"source": str(folder)})


def test_a_checkpoint_that_lacks_a_network_is_refused(sd15_bundle: Path, tmp_path: Path) -> None:
    recipe = recipe_of(sd15_bundle)
    partial = checkpoint(tmp_path / "unet-alone", recipe, Component.UNET)
    with pytest.raises(CheckpointError, match="There is no text_encoder"):
        check_checkpoint(BundleFolder(sd15_bundle), partial)
    without = partial.model_copy(update={"text": False, "vae": False})
    check_checkpoint(BundleFolder(sd15_bundle), without)


def test_another_familys_checkpoint_is_refused(sd15_bundle: Path, tmp_path: Path) -> None:
    recipe = recipe_of(sd15_bundle)
    sdxl = Recipe.from_dict({**recipe.to_dict(), "family": "sdxl"})
    other = checkpoint(tmp_path / "sdxl", sdxl, Component.UNET)
    with pytest.raises(CheckpointError, match="not sd15 at tiny width: it looks like sdxl"):
        check_checkpoint(BundleFolder(sd15_bundle), recipe.model_copy(update={"source": other.source}))


def test_another_configuration_than_was_traced_is_refused(sd15_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_num_groups": 2}))
    with pytest.raises(CheckpointError, match="another configuration of the AutoencoderKL") as refused:
        check_checkpoint(BundleFolder(folder), recipe_of(sd15_bundle))
    assert "norm_num_groups" in str(refused.value.given)
    path.write_text(json.dumps({**json.loads((sd15_bundle / "vae" / "config.json").read_text()), "sample_size": 64}))
    check_checkpoint(BundleFolder(folder), recipe_of(sd15_bundle))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["rebase", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ((), 2, "Nothing is to be changed"),
        (("--lora", "a.safetensors", "--no-lora"), 2, "contradict"),
        (("--lora", "a.safetensors:x"), 2, "not a number"),
        (("--source", "model.ckpt"), 2, "pickle"),
        (("--source", "missing.safetensors"), 2, "fabricated"),
        (("--controlnet", "random:1"), 2, "no ControlNet"),
        (("--lora", "missing.safetensors"), 3, "cannot be read"),
    ],
)
def test_what_is_refused_leaves_nothing(
    sd15_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, word: str
) -> None:
    done = run(sd15_bundle, *arguments, "-o", tmp_path / "new")
    assert (done.exit_code, word in done.stderr) == (code, True), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_tracing")
def test_a_bundle_of_links_is_rebased_where_it_may(sd15_bundle: Path, tmp_path: Path) -> None:
    folder = linked.elsewhere(sd15_bundle, tmp_path)
    arguments = (folder, "--source", "random:0", "-o", tmp_path / "new", "--no-verify")
    done = run(*arguments)
    assert done.exit_code == 4
    assert "consists of symbolic links that lead out" in done.stderr
    assert not (tmp_path / "new").exists()
    done = run(*arguments, "--allow-links", tmp_path / "store")
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "new") == files(sd15_bundle)
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_symlink()]


def test_a_folder_that_is_no_bundle_and_the_bundle_itself_are_refused(sd15_bundle: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--source", "random:1", "-o", tmp_path / "new").exit_code == 4
    with pytest.raises(InputError, match="take the place"):
        rebase(sd15_bundle, sd15_bundle, NoDisplay(), changes={"source": "random:1"})


def test_a_lora_of_another_family_leaves_nothing(sd15_bundle: Path, tmp_path: Path) -> None:
    given = factors(Recipe.load("sdxl-2048").family, rank=2, seed=0, only=r"(down|mid)_block.*attn1\.to_q")
    path = kohya(given, tmp_path / "lora.safetensors", alpha=1.0, sgm=True)
    done = run(sd15_bundle, "--lora", path, "-o", tmp_path / "new")
    assert done.exit_code == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["lora.safetensors"]


def test_what_is_not_named_stays(sd15_bundle: Path) -> None:
    manifest = Manifest.read(sd15_bundle)
    recipe, _ = rebased_recipe(manifest, {"source": "random:7", "lora": [{"path": "a.safetensors", "scale": 0.5}]})
    assert recipe.source == "random:7"
    assert recipe.lora[0].scale == 0.5
    assert recipe.to_dict() | {"source": "random:0", "lora": []} == dict(manifest.recipe)
    older = {key: value for key, value in manifest.recipe.items() if key not in ("text", "vae")}
    assert rebased_recipe(_with(manifest, recipe=older), {})[0].text
    assert not rebased_recipe(_with(manifest, recipe=older, text_encoders=(), vae=None), {})[0].text


def _with(manifest: Manifest, **values: Any) -> Manifest:
    return replace(manifest, **values)


@pytest.mark.usefixtures("no_tracing")
def test_a_damaged_graph_is_not_taken_and_a_whole_bundle_may_be_replaced(sd15_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))
    graph = folder / "unet" / "windowed.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + b"\0")
    with pytest.raises(BundleError, match="broken"):
        rebase(folder, tmp_path / "new", NoDisplay(), changes={"source": "random:1"})
    assert not (tmp_path / "new" / MANIFEST).exists()
    graph.write_bytes(whole)
    path = kohya(
        factors(recipe_of(folder).family, rank=2, seed=0, only="mid_block"), tmp_path / "l.safetensors", alpha=1.0
    )
    done = run(folder, "--lora", f"{path}:0.5", "-o", folder, "--force", "--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["lora"][0]["scale"], len(summary["lora"][0]["sha256"])) == (0.5, 64)
    assert summary["parity"]
    assert Manifest.read(folder).recipe["lora"] == [{"path": str(path), "scale": 0.5}]


def test_the_new_sources_own_schedule_goes_before_the_old_recipes(sd15_bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(sd15_bundle)
    words = {"prediction": "v_prediction", "timestep_spacing": "trailing"}
    told = _with(manifest, recipe={**manifest.recipe, **words})
    (tmp_path / "a/scheduler").mkdir(parents=True)
    own = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading"}
    (tmp_path / "a/scheduler/scheduler_config.json").write_text(json.dumps(own))
    changes = {"source": str(tmp_path / "a"), "unet_width": "full"}
    full = _with(told, recipe={**told.recipe, "unet_width": "full"})
    recipe, notices = rebased_recipe(full, changes)
    assert (recipe.prediction, recipe.timestep_spacing) == (None, None)
    assert resolve_noise_schedule(recipe).config["prediction_type"] == "epsilon"
    assert [notice.split(" of the old")[0] for notice in notices] == [
        "prediction v_prediction",
        "timestep_spacing trailing",
    ]
    kept, notices = rebased_recipe(full, changes, ["prediction=v_prediction"])
    assert (kept.prediction, kept.timestep_spacing) == (Prediction.VELOCITY, None)
    assert len(notices) == 1


def test_a_source_that_says_nothing_keeps_the_old_recipes_words(sd15_bundle: Path) -> None:
    manifest = Manifest.read(sd15_bundle)
    told = _with(manifest, recipe={**manifest.recipe, "prediction": "v_prediction"})
    recipe, notices = rebased_recipe(told, {"source": "random:4"})
    assert (recipe.prediction, notices) == (Prediction.VELOCITY, ())


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("width=256", "width"),
        ("guidance=false", "guidance"),
        ("precision=float16", "precision"),
        ("vae_tile=64", "vae_tile"),
        ("hidiffusion.windows=false", "hidiffusion"),
        ("hidiffusion.thresholds={strided: 40%, pooled: 20%}", "hidiffusion"),
        ("text=false", "text"),
        ("vae=false", "vae"),
        ("batch=2", "batch"),
        ("prompt_chunks=2", "prompt_chunks"),
        ("guidance_until=0.6", "guidance_until"),
        ("reuse=3", "reuse"),
    ],
)
def test_what_graphs_are_traced_with_is_not_set_anew(sd15_bundle: Path, tmp_path: Path, setting: str, key: str) -> None:
    done = run(sd15_bundle, "--set", setting, "-o", tmp_path / "new")
    assert (done.exit_code, f"traced for another {key}." in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["reuse={every: 3, depth: 2}", "reuse=null"])
def test_features_stay_of_one_depth_and_may_serve_longer(sd15_bundle: Path, setting: str) -> None:
    """Full graphs give them, and shallow ones take them, as they were traced."""
    manifest = Manifest.read(sd15_bundle)
    phases = tuple(
        replace(record, phase=replace(record.phase, shallow=shallow))
        for record in manifest.phases
        for shallow in (False, True)
    )
    held = _with(manifest, recipe={**manifest.recipe, "reuse": 3}, phases=phases)
    with pytest.raises(InputError, match="traced for another reuse"):
        rebased_recipe(held, {}, [setting])
    assert rebased_recipe(held, {}, ["reuse=4"])[0].phase_rule().reuse == Reuse(4)


def test_a_controlnet_is_not_left_out(sd15_bundle: Path) -> None:
    manifest = Manifest.read(sd15_bundle)
    held = _with(manifest, recipe={**manifest.recipe, "task": "controlnet", "controlnet": "random:1"})
    with pytest.raises(InputError, match="traced for another controlnet"):
        rebased_recipe(held, {}, ["controlnet=null"])


def test_other_runs_are_tabulated_anew_under_the_same_graphs(
    sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "capture", _refuse)
    changes = ["--set", "timesteps=[999, 599, 199]", "--set", "sampler=[euler, tcd]", "--set", "tcd_eta=0.1"]
    done = run(sd15_bundle, *changes, "-o", tmp_path / "new", "--no-verify", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["noise_schedule"]["timesteps"] == [999, 599, 199]
    new = hidiff_runtime.open(tmp_path / "new")
    for sampler in ("euler", "tcd"):
        schedule = new.sampler(sampler).schedule(3)
        assert [evaluation.timestep for evaluation in schedule.evaluations] == [999, 599, 199]
    assert check(tmp_path / "new").ok
    graph = "unet/windowed.onnx"
    assert (tmp_path / "new" / graph).read_bytes() == (sd15_bundle / graph).read_bytes()


def _refuse(*_: object) -> None:
    raise AssertionError("a graph was traced")
