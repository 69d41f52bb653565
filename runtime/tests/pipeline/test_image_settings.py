"""A web UI's picture for a bundle: the sampler and settings that are nearest, and what will not be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
import toy_pictures
import web_ui
from PIL import Image

from hidiff_runtime import bundle as bundle_module
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.image_parameters import read_parameters
from hidiff_runtime.pipeline.image_settings import Likeness, settings_like

Like = Callable[..., Likeness]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bundles")
    kinds = {"sd": toy.Toy(), "sdxl": toy.Toy(sdxl=True), "unguided": toy.Toy(guidance=False)}
    made = {name: toy_pictures.add_samplers(toy_pictures.make(home / name, kind)) for name, kind in kinds.items()}
    lora = [{"path": "loras/ink.safetensors", "scale": 0.5}]
    made["lora"] = toy_pictures.add_samplers(
        toy_pictures.make(home / "lora"), source="models/mine.safetensors", lora=lora
    )
    made["chunks"] = toy_pictures.add_samplers(toy_pictures.make(home / "chunks", chunks=2))
    return made


@pytest.fixture
def like(folders: dict[str, Path], tmp_path: Path) -> Iterator[Like]:
    """What a bundle is asked for a web UI's text."""
    opened: list[Bundle] = []

    def ask(text: str, bundle: str = "sd", *, with_prompt: bool = True, **given: Any) -> Likeness:
        opened.append(bundle_module.open(folders[bundle], backend=toy_pictures.Backend()))
        read = read_parameters(web_ui.png(tmp_path / "web.png", parameters=text))
        return settings_like(opened[-1], read, given, with_prompt=with_prompt)

    yield ask
    for bundle in opened:
        bundle.close()


def test_a_web_uis_picture_is_drawn_as_near_as_can_be(like: Like) -> None:
    text = web_ui.text(Sampler="DPM++ 2M", Schedule_type="Karras", Clip_skip="2", Version="v1.10.1")
    found = like(text.replace("\nSteps", "\nNegative prompt: fog\nSteps"))
    assert found.prompt == "a boat"
    assert found.settings == {
        "negative_prompt": "fog",
        "steps": 4,
        "guidance_scale": 7.0,
        "guidance_rescale": 0.0,
        "seed": 5,
        "sampler": "dpmpp_2m_karras",
        "clip_skip": 1,
    }
    assert found.warnings == (
        "the picture was made by a web UI (v1.10.1), whose noise is another: expect one alike at most",
        "the picture was drawn with toy, this bundle was built from sd15",
        "Clip skip is for the prompt alone here, web UIs skip layers in the negative prompt too",
    )


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected", "warned"),
    [
        ("DPM++ 2M Karras", None, "dpmpp_2m_karras", False),
        ("DPM++ 2M", "Karras", "dpmpp_2m_karras", False),
        ("DPM++ 2M", "Automatic", "dpmpp_2m_karras", False),
        ("DPM++ 2M", "Uniform", "dpmpp_2m", False),
        ("DPM++ 2M", "Normal", "dpmpp_2m", False),
        ("DPM++ 2M", None, "dpmpp_2m", False),
        ("DPM++ 2M", "Exponential", "dpmpp_2m", True),
        ("k_euler", None, "euler", False),
        ("Euler", "Automatic", "euler", False),
        ("Euler", "Karras", "euler", True),
        ("noisy", None, "noisy", False),
    ],
)
def test_the_sampler_is_the_one_of_the_same_schedule(
    like: Like, sampler: str, schedule: str | None, expected: str, warned: bool
) -> None:
    found = like(web_ui.text(Sampler=sampler, **({} if schedule is None else {"Schedule_type": schedule})))
    assert found.settings["sampler"] == expected
    assert any("schedule" in warning for warning in found.warnings) is warned


@pytest.mark.parametrize(("bundle", "layer", "skipped"), [("sd", 2, 1), ("sd", 1, 0), ("sdxl", 2, 0), ("sdxl", 3, 1)])
def test_clip_skip_is_counted_by_the_bundles_family(like: Like, bundle: str, layer: int, skipped: int) -> None:
    assert like(web_ui.text(Clip_skip=str(layer)), bundle).settings["clip_skip"] == skipped


def test_networks_in_the_prompt_are_no_words(like: Like) -> None:
    text = "a boat, <lora:ink:0.5>, (red:1.2), <lora:oil:0.80:0.4>, <hypernet:old>"
    found = like(web_ui.text(text), "lora")
    assert found.prompt == "a boat, , (red:1.2)"
    told = "\n".join(found.warnings)
    assert "ink" not in told  # which the bundle was built with, at this scale
    assert "the prompt adds oil at 0.80, which this bundle was not built with; it is left out" in told
    assert "the prompt adds old at 1, which" in told
    assert "read as words here, such as '(red:1.2)'" in told
    assert "adds ink at 1.0, this bundle was built with it at 0.5" in "\n".join(
        like(web_ui.text("x <lora:ink:1.0>"), "lora").warnings
    )
    assert not any("words" in warning for warning in like(web_ui.text("a boat (small), [red], 16:9")).warnings)


def test_what_bundles_have_nothing_like_is_left_out_by_name(like: Like) -> None:
    extras = {"Denoising_strength": "0.4", "Hires_upscale": "2", "Hires_steps": "10", "ADetailer_model": "face"}
    found = like(web_ui.text(**extras))
    assert "left out, as bundles have nothing like it: Hires upscale, Hires steps, ADetailer model" in found.warnings
    assert "strength" not in found.settings  # it is of the second pass
    assert "the picture is 512x768, this bundle draws 64x48" in like(web_ui.text(Size="512x768")).warnings
    told = like(web_ui.text(), "unguided", guidance_scale=None)
    assert "left out, as this bundle was built without guidance: guidance 7" in told.warnings
    assert like(web_ui.text(), "chunks").settings["long_prompt"] == "chunk"
    assert like(web_ui.text("a boat\nNegative prompt: <lora:x:1>")).settings["negative_prompt"] is None
    bare = like("a boat\nSteps: 4, Seed: 5, Size: 64x48")
    assert "the picture does not name its sampler; this bundle's plain is taken" in bare.warnings


def test_a_picture_from_an_image_takes_its_strength(like: Like) -> None:
    image = Image.new("RGB", (64, 48))
    assert like(web_ui.text(Denoising_strength="0.4"), image=image).settings["strength"] == 0.4


def test_eta_is_ddims(like: Like) -> None:
    assert like(web_ui.text(Sampler="DDIM", Eta_DDIM="0.5")).settings["eta"] == 0.5
    assert "eta" not in like(web_ui.text(Sampler="Euler", Eta_DDIM="0.5")).settings
    assert "eta" not in like(web_ui.text(Sampler="DDIM", Eta_DDIM="0.5"), sampler="euler").settings


def test_a_sampler_by_our_name_is_found_by_the_web_uis(folders: dict[str, Path], like: Like) -> None:
    assert folders["sd"].is_dir()
    assert like(web_ui.text(Sampler="dpmpp_2m_karras")).settings["sampler"] == "dpmpp_2m_karras"
    with pytest.raises(InputError, match="does not have the picture's sampler"):
        like(web_ui.text(Sampler="heun"))


def test_markup_of_a_prompt_that_is_not_drawn_is_not_told(like: Like) -> None:
    text = web_ui.text("(red:1.2)\nNegative prompt: (fog:1.3)")
    told = [warning for warning in like(text).warnings if "words" in warning]
    assert [text.split(" in the ")[1].split(" are")[0] for text in told] == ["prompt", "negative prompt"]
    told = like(text, negative_prompt="x", with_prompt=False).warnings
    assert not any("words" in warning for warning in told)
