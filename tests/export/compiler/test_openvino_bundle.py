"""bfloat16 and int8 from recipe to pictures on the CPU, at tiny width, beside PyTorch and the other backend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load_stored
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.cli import main
from hidiff_export.compiler.compile import build
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe import Recipe
from hidiff_runtime import BundleError, Pipeline, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from tests.conftest import NoDisplay
from tests.openvino_bundles import with_openvino

CHANGES = ("width=128", "height=128", "sampler=ddim", "steps=[3]", "precision=bfloat16", "backend=openvino")
RECIPE = Recipe.load("tiny", [*CHANGES])


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The tiny recipe's bundle in bfloat16, text encoder and VAE included."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "bfloat16-bundle"
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            build(RECIPE, folder, NoDisplay())
    return folder


def precisions(folder: Path, phase: int) -> list[dict[str, str]]:
    """What each kind of layer of a phase runs in, of what is computed first and of the rest."""
    with open_bundle(folder, backend="openvino") as bundle:
        session = bundle.engine(bundle.manifest.phases[phase].phase)
        models = [part.request.get_compiled_model().get_runtime_model() for part in session._parts]
    return [
        {
            node.get_friendly_name(): f"{info['layerType'].value} {info['runtimePrecision'].value}"
            for node in model.get_ordered_ops()
            for info in (node.get_rt_info(),)
        }
        for model in models
    ]


@pytest.mark.slow
def test_a_bundle_is_verified_and_checked(half: Path) -> None:
    """`verify` compares graphs with PyTorch in bfloat16 arithmetic, and engines and runs with PyTorch and diffusers."""
    result = CliRunner().invoke(main, ["verify", str(half), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert "openvino" in told["candidate"]
    assert not any("keeps float32" in note for note in told["graphs"]["notes"])
    report = check(half)
    assert "keeps float32" not in report.render()
    assert report.ok, report.render()
    assert report.backend == "openvino"
    engines = [verdict for verdict in report.verdicts if verdict.boundary == "engine against PyTorch"]
    assert {verdict.phase for verdict in engines} == {"strided", "windowed"}
    assert min(verdict.metrics.snr_db for verdict in engines if verdict.metrics) > 35
    assert max(verdict.metrics.snr_db for verdict in engines if verdict.metrics) < 60  # rounded, that is


def test_a_graph_of_another_phase_is_found(half: Path) -> None:
    with open_bundle(half) as bundle:
        first, second = (bundle.engine(record.phase)._engine for record in bundle.manifest.phases)
    assert first != second
    content = first.read_text()
    first.write_text(content.replace("strided.openvino.onnx", "windowed.openvino.onnx"))
    try:
        with pytest.raises(BundleError, match=r"strided\.openvino\.json"):
            check(half, verify="size", runs=False)
    finally:
        first.write_text(content)


def test_sinusoids_are_computed_in_float32_and_layers_in_bfloat16(half: Path) -> None:
    before, rest = precisions(half, 1)
    assert not any(kind.endswith("bf16") for kind in before.values())
    assert any(kind.startswith("Math f32") for kind in before.values())
    layers = {kind for kind in rest.values() if kind.split()[0] in ("Convolution", "FullyConnected", "MVN")}
    assert layers == {"Convolution bf16", "FullyConnected bf16", "MVN bf16"}
    assert not any(kind.startswith("Math") for kind in rest.values())


def test_every_timestep_costs_about_the_same(half: Path) -> None:
    """Where the sinusoid is rounded, a timestep of 999 leaves 9 dB of the time embedding and one of 1 leaves 51."""
    record = Manifest.read(half).phases[1]
    rng = np.random.default_rng(0)
    inputs = {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in record.inputs}
    inputs["window_shifts"] = np.array([0, 1, 2, 3, 1], np.int32)[: record.input("window_shifts").shape[0]]
    unet = load_stored(Component.UNET, WeightStore.open(half / "unet/weights.safetensors"))
    phase = PhaseUNet(unet, RECIPE.unet_layout, record.phase, RECIPE.latent_height, RECIPE.latent_width)
    found = {}
    with open_bundle(half) as bundle:
        session = bundle.engine(record.phase)
        for timestep in (1, 250, 500, 750, 999):
            inputs["timestep"] = np.float32([timestep])
            with torch.no_grad():
                exact = phase(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
            noise = session.run(inputs)["noise_pred"] - exact
            found[timestep] = 10 * np.log10((exact**2).sum() / (noise**2).sum())
    assert min(found.values()) > 34
    assert max(found.values()) - min(found.values()) < 4


def test_the_same_seed_gives_the_picture_of_the_other_backend(sd15_bundle: Path, tmp_path: Path) -> None:
    """Two backends of one float32 recipe, whose graphs and weights are the same files."""
    folder = with_openvino(sd15_bundle, tmp_path / "b")
    pictures = []
    for backend in ("openvino", "onnxruntime"):
        with Pipeline.open(folder, backend=backend) as pipe:
            pictures.append(np.asarray(pipe("a boat", seed=3), np.int16))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 5
