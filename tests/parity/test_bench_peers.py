"""What `bench` measures as a peer is what it is called: diffusers' own UNet, and the published package's prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import load_file

from hidiff_export.benchmarking import published_package
from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.evaluation_worker import EVALUATORS
from hidiff_export.benchmarking.lineup import Lineup, benched_bundles, recipes_of
from hidiff_export.benchmarking.peers import wanted_peers
from hidiff_export.benchmarking.timings import signal_to_noise
from hidiff_export.benchmarking.torch_evaluators import evaluator
from hidiff_export.benchmarking.workload import TIMESTEPS, inputs_file
from hidiff_export.recipe import Recipe
from tests.parity import published

PHASES = ("strided", "windowed")
ALIKE = 100.0
"""Decibels: sums in another order leave 120 and more, another phase or other shifts less than 20."""


@pytest.fixture(scope="module")
def lineup(sd15_bundle: Path) -> Lineup:
    """Of the peers that compute with PyTorch."""
    bundles = benched_bundles([sd15_bundle], None, (), ())
    peers = wanted_peers("diffusers,hidiffusion,eager,compile", ("float32",))
    return Lineup(bundles, recipes_of(bundles), sd15_bundle / "unet/weights.safetensors", peers)


@pytest.fixture(scope="module")
def inputs(lineup: Lineup, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, NDArray[Any]]]:
    """Of each phase, at the run's middle."""
    folder = tmp_path_factory.mktemp("inputs")
    lineup.work(lineup.sizes[0]).write_inputs(folder)
    return {phase: dict(np.load(inputs_file(folder, phase, TIMESTEPS.index(501)))) for phase in PHASES}


@pytest.fixture(scope="module")
def peers(lineup: Lineup) -> dict[str, Competitor]:
    """By name."""
    found, left_out = lineup.competitors(lineup.sizes[0])
    assert not left_out
    return {one.name: one for one in found}


@pytest.fixture(scope="module")
def unet(lineup: Lineup) -> Any:
    """Diffusers' UNet with the bundle's weights, loaded by diffusers."""
    config = UNet2DConditionModel.load_config(lineup.store.with_name("config.json"))
    made = UNet2DConditionModel.from_config(config)
    made.load_state_dict(load_file(lineup.store))
    return made.eval().requires_grad_(False)


def tensors(given: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in given.items()}


def test_every_kind_of_peer_has_an_evaluator(peers: dict[str, Competitor]) -> None:
    assert {one.kind for one in peers.values()} <= EVALUATORS.keys()


def test_the_peer_diffusers_is_diffusers(peers: dict[str, Competitor], inputs: Any, unet: Any) -> None:
    stock = evaluator("stock", peers["diffusers"].settings)
    given = tensors(inputs["strided"])
    expected = unet(given["latents"], given["timestep"], given["prompt_embeds"], return_dict=False)[0].numpy()
    for phase in PHASES:
        stock.open(phase)
        assert signal_to_noise(expected, stock.evaluate(inputs["strided"])) > ALIKE
    assert signal_to_noise(expected, stock.evaluate({**inputs["strided"], "timestep": np.float32([1])})) < ALIKE


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["eager", "hidiffusion"])
def test_peers_with_hidiffusion_are_the_published_package(
    peers: dict[str, Competitor], inputs: Any, unet: Any, name: str, phase: str
) -> None:
    made = evaluator if name == "eager" else published_package.evaluator
    one = made(peers[name].kind, peers[name].settings)
    step = peers["hidiffusion"].settings["phase_steps"][phase]
    recipe = Recipe.from_dict(peers[name].settings["recipe"])
    evaluation = published.Evaluation(recipe.family, recipe.task, step, 50)
    expected = published.predict(unet, evaluation, tensors(inputs[phase]), seed=501).numpy()
    one.open(phase)
    assert signal_to_noise(expected, one.evaluate(inputs[phase])) > ALIKE
    other = next(each for each in PHASES if each != phase)
    one.open(other)
    assert signal_to_noise(expected, one.evaluate(inputs[phase])) < ALIKE  # a phase is told from another
