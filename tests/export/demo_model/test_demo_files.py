"""The model in the package: whole or named as damaged, loaded by diffusers as it is, drawing what it is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.sources import find_checkpoint, find_tokenizer, local_path, source_fingerprint
from hidiff_export.demo_model import demo_classifier, demo_files, demo_model, demo_prompts
from hidiff_export.errors import CheckpointError
from hidiff_export.quality.classifier import Classifier
from hidiff_export.quality.scoring import subject_of

MOST_BYTES = 12_000_000
HOME = Path(demo_files.__file__).parent
BACKGROUNDS = {"white": (245, 245, 245), "purple": (130, 75, 170), "green": (75, 160, 75), "orange": (240, 145, 45)}
BACKGROUNDS |= {"gray": (135, 135, 135), "black": (20, 20, 20), "yellow": (245, 215, 80), "pink": (245, 165, 195)}
BACKGROUNDS |= {"red": (205, 45, 45), "blue": (60, 105, 205)}


def test_all_of_it_fits_the_package() -> None:
    folders = (demo_model(), demo_classifier())
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert 5_000_000 < size < MOST_BYTES


def test_every_file_has_a_hash_and_every_hash_a_file() -> None:
    known = demo_files._hashes(HOME)
    there = [path for part in (demo_model(), demo_classifier()) for path in part.rglob("*") if path.is_file()]
    assert sorted(known) == sorted(path.relative_to(HOME).as_posix() for path in (*there, demo_prompts()))


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (
            "model/unet/diffusion_pytorch_model.safetensors",
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "SHA",
        ),
        ("model/vae/config.json", lambda path: path.write_text("{}"), "SHA-256"),
        ("model/tokenizer/merges.txt", Path.unlink, "No such file"),
        ("files.json", Path.unlink, "files.json"),
        ("files.json", lambda path: path.write_text("{"), "files.json"),
    ],
)
def test_damage_is_named_with_the_hash_and_the_way_back(tmp_path, monkeypatch, name, damage, told) -> None:
    home = tmp_path / "demo_model"
    shutil.copytree(HOME, home, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(demo_files, "_HOME", home)
    expected = demo_files._hashes(HOME).get(name, "")
    damage(home / name)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("demo", Component.UNET)
    assert name in str(caught.value.given)
    assert told in str(caught.value.given)
    assert expected in str(caught.value.given)
    assert "pip install --force-reinstall" in caught.value.advice


def test_it_is_a_source_like_any_folder() -> None:
    assert local_path("demo") == demo_model()
    assert find_checkpoint("demo", Component.VAE).paths[0].is_relative_to(demo_model())
    assert set(find_tokenizer("demo", "tokenizer")) >= {"vocab.json", "merges.txt"}
    assert source_fingerprint("demo", Component.UNET) == source_fingerprint(str(demo_model()), Component.UNET)
    assert local_path("./demo") == Path("demo")  # for a folder of that name


@pytest.fixture(scope="module")
def drawn() -> tuple[list[str], torch.Tensor]:
    """Prompts that it was never trained on, and what diffusers draws of them, ``[pictures, 3, height, width]``."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(demo_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 128
    prompts = demo_prompts().read_text("utf-8").splitlines()[::3]
    settings = {"num_inference_steps": 15, "guidance_scale": 4.0, "output_type": "pt"}
    return prompts, pipe(prompts, generator=torch.Generator().manual_seed(0), **settings).images.float()


def test_diffusers_loads_it_unchanged_and_backgrounds_are_those_asked_for(
    drawn: tuple[list[str], torch.Tensor],
) -> None:
    prompts, pictures = drawn
    colors = {name: torch.tensor(color) for name, color in BACKGROUNDS.items()}
    edges = torch.cat([pictures[:, :, :4].flatten(2), pictures[:, :, -4:].flatten(2)], 2).median(2).values * 255
    nearest = [min(colors, key=lambda name: float((edge - colors[name]).norm())) for edge in edges]
    asked = [next((name for name in colors if f" {name} background" in prompt), "") for prompt in prompts]
    assert np.mean([name == wanted for name, wanted in zip(nearest, asked, strict=True)]) > 0.9
    assert set(asked) == set(BACKGROUNDS)


def test_subjects_are_those_asked_for_twenty_times_as_often_as_by_chance(drawn: tuple[list[str], torch.Tensor]) -> None:
    prompts, pictures = drawn
    seen = Classifier.load(demo_classifier())
    with torch.no_grad():
        best = seen(pictures).argmax(1).tolist()
    asked = [seen.labels.index(str(subject_of(prompt, seen.labels))) for prompt in prompts]
    right = float(np.mean([one == other for one, other in zip(asked, best, strict=True)]))
    assert right > 20 / len(seen.labels)
    # Told of other prompts, they are not right: the score is no property of the pictures alone.
    assert np.mean([one == other for one, other in zip(asked[1:] + asked[:1], best, strict=True)]) < right / 4
