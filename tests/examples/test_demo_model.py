"""The demo model's training: scenes follow from their numbers, held-out pairs stay out, a stopped run goes on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from hidiff_export.families.family import Family, Task, Width, text_encoder_configs, unet_config, vae_config
from hidiff_export.quality.classifier import Classifier

FOLDER = Path(__file__).parents[2] / "examples/demo_model"
MOST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as the folder's own commands import them."""
    names = ("scenes", "training", "tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def scenes(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["scenes"]


def _library(scenes: ModuleType):
    """Six subjects, each a square of a color of its own."""
    names = ("cat", "owl", "red apple", "house", "key", "fish")
    glyphs = tuple(Image.new("RGBA", (20, 20), (40 * index, 255 - 40 * index, 7, 255)) for index in range(6))
    return scenes.Library(glyphs, names, (("pet", "animal"), (), ("fruit",), (), (), ("animal",)))


def test_a_scene_follows_from_its_number_and_others_differ(scenes: ModuleType) -> None:
    library = _library(scenes)
    drawn = [scenes.draw_scene(library, (1, number)) for number in range(50)]
    assert drawn == [scenes.draw_scene(library, (1, number)) for number in range(50)]
    assert len({(scene.subject, scene.place, scene.center) for scene in drawn}) > 40
    first = scenes.render(library, drawn[0], 64, (1, 0))
    np.testing.assert_array_equal(first, scenes.render(library, drawn[0], 64, (1, 0)))
    assert first.shape == (64, 64, 3)


def test_held_out_pairs_are_never_drawn_and_every_subject_has_some(scenes: ModuleType) -> None:
    library = _library(scenes)
    for number in range(2000):
        scene = scenes.draw_scene(library, (2, number))
        assert not scenes.held_out(scene.subject, scene.place)
        assert scene.second is None or not scenes.held_out(scene.second, scene.place)
    for subject in range(200):
        assert any(scenes.held_out(subject, place) for place in range(len(scenes.BACKGROUNDS)))


def test_a_prompt_says_where_the_subject_is(scenes: ModuleType) -> None:
    library = _library(scenes)
    told = 0
    for number in range(300):
        scene = scenes.draw_scene(library, (3, number))
        assert scene.prompt.split(" ", 1)[0] in ("a", "an")
        assert library.names[scene.subject] in scene.prompt
        for words, across in (("on the left", -1), ("on the right", 1)):
            if words in scene.prompt:
                told += 1
                assert across * (scene.center[0] - 0.5) > 0
        pixels = scenes.render(library, replace(scene, second=None), 64, (3, number))
        column, row = (round(64 * share) for share in scene.center)
        np.testing.assert_array_equal(
            pixels[min(row, 63), min(column, 63)], library.glyphs[scene.subject].getpixel((1, 1))[:3]
        )
    assert told > 10


def test_a_stopped_run_goes_on_as_if_it_had_not_been(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    training = scripts["training"]

    def trained(folder: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

        def loss_at(step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            batch = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
            return ((network(batch) - batch.sum(1, keepdim=True)) ** 2).mean()

        schedule = training.Schedule(steps=12, batch=16, rate=1e-2, warmup=2, average=0.8)
        return dict(training.train("toy", network, loss_at, schedule, folder, every=5).state_dict())

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stop=7)
    resumed = trained(tmp_path / "stopped")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)
    assert trained(tmp_path / "stopped").keys() == whole.keys()  # a finished one is only read


def test_averaged_weights_soon_forget_the_first_and_frozen_ones_stay(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    training = scripts["training"]
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    for layer, value in zip(network, (0.0, 1.0), strict=True):
        torch.nn.init.constant_(layer.weight, value)
    network[1].requires_grad_(False)

    def loss_at(_step: int) -> torch.Tensor:
        return ((network[0](torch.ones(1, 1)) - 1) ** 2).mean()

    schedule = training.Schedule(steps=300, batch=1, rate=0.05, warmup=1, average=0.9999)
    averaged = training.train("toy", network, loss_at, schedule, tmp_path)
    assert averaged[0].weight.item() > 0.8  # with 0.9999 from the first step on it would be below 0.03
    assert averaged[1].weight.item() == 1


def test_the_tokenizer_spells_what_it_never_saw(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    tokenizer = scripts["tokens"].make_tokenizer(_library(scripts["scenes"]), tmp_path)
    words = ("boat", "book", "boot", "ant", "and", "sea", "set", "ears", "eyes", "keys", "rays", "lid", "lip", "milk")
    library = replace(_library(scripts["scenes"]), keywords=(words,) * 6)  # with pairs that are equally frequent
    learned = [scripts["tokens"].make_tokenizer(library, tmp_path / name).get_vocab() for name in ("one", "two", "one")]
    assert learned[0] == learned[1] == learned[2]
    assert tokenizer.tokenize("a red apple") == ["a</w>", "red</w>", "apple</w>"]
    assert len(tokenizer("Zürich 日本").input_ids) > 8
    assert tokenizer("owl", padding="max_length").input_ids[-1] == tokenizer.eos_token_id


def test_its_networks_have_the_modules_of_stable_diffusion_and_fit_the_package() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        small, full = (
            UNet2DConditionModel(**unet_config(Family.SD15, Task.TEXT_TO_IMAGE, width))
            for width in (Width.DEMO, Width.FULL)
        )
        vae = AutoencoderKL(**vae_config(Family.SD15, Width.DEMO))
        text = CLIPTextModel(CLIPTextConfig(**text_encoder_configs(Family.SD15, Width.DEMO)["text_encoder"]))
        classifier = Classifier(("",) * 200)
    assert small.state_dict().keys() == full.state_dict().keys()
    networks = (small, vae, text, classifier)
    half = 2 * sum(tensor.numel() for network in networks for tensor in network.state_dict().values())
    assert half < MOST_BYTES - 120_000  # for everything that is no weight
