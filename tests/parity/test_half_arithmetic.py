"""A float16 bundle by its users' commands: its graphs are judged in float16 arithmetic, though on a CPU."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from hidiff_export.cli import main
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe import Recipe
from hidiff_export.reference.evaluation_plan import edge_points
from hidiff_export.reference.flops_progress import FlopsProgress
from hidiff_export.reference.magnitude_recorder import MagnitudeRecorder
from hidiff_export.reference.random_inputs import arrays
from hidiff_export.reference.reference import courses, random_calls
from hidiff_export.reference.reference_weights import networks_of_store
from hidiff_export.reference.tolerances import Boundary
from hidiff_runtime import cli
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.verification.comparison import Metrics, Verdict
from tests.parity.test_verify_negative import refresh

pytestmark = pytest.mark.slow

BLOCK = "up_blocks.3.attentions.1.transformer_blocks.0"
LARGEST = 65504.0
GRAPHS = {Boundary.GRAPH.value, Boundary.GRAPH_RUN.value}


@pytest.fixture
def bundle(half_bundle: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    return Path(shutil.copytree(half_bundle, tmp_path / "bundle"))


def verified(folder: Path, exit_code: int) -> dict[str, list[Verdict]]:
    """The verdicts of ``hidiff-export verify`` by boundary."""
    result = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    assert result.exit_code == exit_code, result.output
    found = defaultdict(list)
    for verdict in json.loads(result.stdout)["verdicts"]:
        found[verdict["boundary"]].append(Verdict.from_dict(verdict))
    return found


def scale(folder: Path, factors: Mapping[str, float]) -> Path:
    """Multiplies float16 weights of the UNet, and hashes anew."""
    store = folder / "unet/weights.safetensors"
    for name, factor in factors.items():
        with SafetensorsFile.open(store) as file:
            info = file.info(name)
        values = np.memmap(store, np.float16, "r+", info.offset, info.shape)
        values[...] = values.astype(np.float32) * factor
        values.flush()
    return refresh(folder)


def checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``hidiff-run check`` prints."""
    capsys.readouterr()
    cli.main(["check", str(folder), "--calls-only"])
    return capsys.readouterr().out


def test_a_sound_bundle_is_as_exact_as_pytorch_in_float16(half_bundle: Path, bundle: Path, capsys: Any) -> None:
    before = checked(bundle, capsys)
    assert "do not say whether numbers overflow or lose digits in a GPU's float16 arithmetic" in before
    assert "holds no verdict on that: 'hidiff-export verify' judges its graphs in float16 arithmetic" in before

    found = verified(bundle, 0)

    assert len(found[Boundary.GRAPH.value]) == 2
    assert len(found[Boundary.GRAPH_RUN.value]) == 3
    assert len(found[Boundary.TEXT_GRAPH.value]) == 2
    assert "its graphs in float16 arithmetic: within bounds" in checked(bundle, capsys)
    for phase, halves in in_torch(half_bundle).items():
        (graph,) = (v for v in found[Boundary.GRAPH.value] if v.phase == phase)
        (engine,) = (v for v in found[Boundary.RANDOM.value] if v.phase == phase)
        assert graph.metrics is not None
        assert engine.metrics is not None
        assert abs(graph.metrics.snr_db - halves) < 1.5
        assert engine.metrics.snr_db > halves + 2  # the CPU's engine rounds less than half precision does


def in_torch(folder: Path) -> dict[str, float]:
    """What PyTorch's own float16 arithmetic is off by, in dB, on each phase's first random call."""
    recipe = recipe_of(folder)
    with open_bundle(folder) as opened:
        config = json.loads(opened.sampler().origin["config"])
    points = edge_points(recipe.phase_rule(), courses(recipe, config))
    networks, meter = networks_of_store(folder, recipe), FlopsProgress(recipe, recipe.unet_config(), None)
    calls = list(random_calls(networks.unet, recipe, points, meter, MagnitudeRecorder(recipe)))
    half = networks.unet.half()
    found = {}
    for phase in recipe.phase_rule().phases():
        call = next(call for call in calls if call.point.phase == phase)
        module = PhaseUNet(half, recipe.unet_layout, phase, recipe.latent_height, recipe.latent_width)
        given = {**arrays(call.inputs), "window_shifts": call.window_shifts}
        tensors = {name: torch.from_numpy(value) for name, value in given.items()}
        with torch.inference_mode():
            noise_pred = module(**PhaseUNet.arguments(tensors)).float().numpy()
        found[phase.name] = Metrics.of(call.noise_pred, noise_pred).snr_db
    return found


def test_an_overflow_fails_though_every_engine_on_the_cpu_is_exact(bundle: Path, capsys: Any) -> None:
    """The feed-forward computes what it did, but its middle is forty thousand times larger."""
    first = {f"{BLOCK}.ff.net.0.proj.{kind}": 200.0 for kind in ("weight", "bias")}
    scale(bundle, first | {f"{BLOCK}.ff.net.2.weight": 1 / 40000})

    found = verified(bundle, 1)

    for boundary in (Boundary.TRAJECTORY, Boundary.RANDOM, Boundary.RUN):
        assert all(verdict.ok for verdict in found[boundary.value])
    assert sum(len(found[boundary]) for boundary in GRAPHS) == 5
    for boundary in GRAPHS:
        assert all("NaN or infinite" in verdict.fault for verdict in found[boundary])
    assert all(verdict.ok for verdict in found[Boundary.TEXT_GRAPH.value])
    report = json.loads((bundle / "parity/report.json").read_text(encoding="utf-8"))
    assert (report["graphs"]["arithmetic"], report["graphs"]["ok"]) == ("float16", False)
    assert "its graphs in float16 arithmetic: FAILED" in checked(bundle, capsys)


def test_a_lora_that_overflows_is_no_bundle_that_holds(bundle: Path, tmp_path: Path) -> None:
    """It ends with an error, or with a report that says that the graphs fail, and they alone."""
    layers = {f"{BLOCK}.ff.net.0.proj": 200.0, f"{BLOCK}.ff.net.2": 1 / 40000}
    lora, out = tmp_path / "large.safetensors", tmp_path / "out"
    save_file(lora_tensors(bundle, layers), lora)

    result = CliRunner().invoke(main, ["rebase", str(bundle), "--lora", str(lora), "-o", str(out), "--json"])

    assert result.exit_code != 0, result.output
    if out.exists():
        report = json.loads((out / "parity/report.json").read_text(encoding="utf-8"))
        assert {verdict["boundary"] for verdict in report["verdicts"] if not verdict["ok"]} == GRAPHS


def test_scores_above_the_largest_float16_pass_in_a_rebased_bundle(bundle: Path, tmp_path: Path) -> None:
    """Attention is float32 in every engine. By a LoRA, and through the verification at the end of `rebase`."""
    layers = {f"{BLOCK}.attn2.to_q": 100.0, f"{BLOCK}.attn2.to_k": 100.0, f"{BLOCK}.attn2.to_out.0": 0.1}
    lora = tmp_path / "scores.safetensors"
    save_file(lora_tensors(bundle, layers), lora)

    result = CliRunner().invoke(
        main, ["rebase", str(bundle), "--lora", str(lora), "-o", str(tmp_path / "out"), "--json"]
    )

    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out/parity/report.json").read_text(encoding="utf-8"))
    judged = [verdict for verdict in report["verdicts"] if verdict["boundary"] in GRAPHS]
    assert len(judged) == 5
    assert all(verdict["ok"] for verdict in judged)
    assert largest_score(tmp_path / "out") > LARGEST


def lora_tensors(folder: Path, layers: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """A LoRA of full rank that multiplies layers."""
    tensors = {}
    with SafetensorsFile.open(folder / "unet/weights.safetensors") as file:
        for name, factor in layers.items():
            weight = torch.from_numpy(np.array(file.arrays()[f"{name}.weight"], np.float32))
            tensors[f"unet.{name}.lora_A.weight"] = torch.eye(weight.shape[1])
            tensors[f"unet.{name}.lora_B.weight"] = (factor - 1) * weight
    return tensors


def largest_score(folder: Path) -> float:
    """The largest scaled product of a query and a key that PyTorch meets in `BLOCK`'s cross-attention."""
    recipe = recipe_of(folder)
    networks = networks_of_store(folder, recipe)
    attention = networks.unet.get_submodule(f"{BLOCK}.attn2")
    kept: dict[str, torch.Tensor] = {}
    for name in ("to_q", "to_k"):
        attention.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: kept.update({name: output})
        )
    size = (recipe.latent_height, recipe.latent_width)
    with torch.inference_mode():
        shape = (2, 4, *size)
        networks.unet(torch.ones(shape), torch.tensor(500), torch.randn(2, 77, 32, generator=torch.manual_seed(0)))
    heads = attention.heads
    query, key = (kept[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("to_q", "to_k"))
    return float((query @ key.transpose(-1, -2)).abs().max() * attention.scale)


def recipe_of(folder: Path) -> Recipe:
    return Recipe.from_dict(Manifest.read(folder).recipe, "the bundle's recipe")
