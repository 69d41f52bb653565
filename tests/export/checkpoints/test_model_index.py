"""What a folder says of its pipeline is obeyed, refused by name, or named as left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.model_index import _PIPELINES, ModelIndex, read_model_index
from hidiff_export.compiler.stages.weights import model_index
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family
from hidiff_export.recipe import Recipe

TAKEN = (Component.UNET, Component.TEXT_ENCODER, Component.VAE)
XL_TAKEN = (*TAKEN, Component.TEXT_ENCODER_2)

# As published: stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0.
SD = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
XL = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def read(folder: Path, index: Any, family: Family = Family.SDXL, taken: Any = None) -> ModelIndex:
    (folder / "model_index.json").write_text(json.dumps(index))
    return read_model_index(str(folder), family, taken or (XL_TAKEN if family.is_sdxl else TAKEN))


def refused(folder: Path, index: Any, family: Family = Family.SDXL, taken: Any = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, index, family, taken)
    assert caught.value.exit_code == 3
    assert caught.value.advice
    assert "model_index.json" in str(caught.value)
    return str(caught.value)


def test_every_class_that_is_taken_is_one_of_diffusers() -> None:
    missing = {name for name in _PIPELINES if not hasattr(diffusers, name)}
    assert not missing
    assert len(_PIPELINES) == 12


@pytest.mark.parametrize("name", sorted(_PIPELINES))
def test_the_pipelines_of_the_families_are_taken(tmp_path: Path, name: str) -> None:
    given = {**(XL if "XL" in name else SD), "_class_name": name, "controlnet": ["diffusers", "ControlNetModel"]}
    family = Family.SDXL if "XL" in name else Family.SD15
    taken = (*(XL_TAKEN if family.is_sdxl else TAKEN), Component.CONTROLNET)
    assert "controlnet" not in "".join(read(tmp_path, given, family, taken).notices)
    assert "controlnet (name it as the recipe's controlnet)" in read(tmp_path, given, family).notices[0]


def test_a_checkpoint_without_one_is_as_usual(tmp_path: Path) -> None:
    for source in (str(tmp_path), "random:0", str(tmp_path / "a.safetensors")):
        assert read_model_index(source, Family.SDXL, XL_TAKEN) == ModelIndex(True, ())


@pytest.mark.parametrize("value", [True, False])
def test_zeros_for_empty_prompts_are_as_sdxl_says(tmp_path: Path, value: bool) -> None:
    given = {**XL, "force_zeros_for_empty_prompt": value}
    assert read(tmp_path, given) == ModelIndex(value, ())
    # The pipelines of other families do not read the key: without a negative prompt they take the empty one.
    assert read(tmp_path, {**SD, "force_zeros_for_empty_prompt": value}, Family.SD15).force_zeros_for_empty_prompt
    del given["force_zeros_for_empty_prompt"]
    assert read(tmp_path, given) == ModelIndex(True, ())


@pytest.mark.parametrize("value", [None, 0, "false"])
def test_zeros_that_are_neither_are_refused(tmp_path: Path, value: Any) -> None:
    message = refused(tmp_path, {**XL, "force_zeros_for_empty_prompt": value})
    assert "force_zeros_for_empty_prompt must be true or false" in message
    assert f"has force_zeros_for_empty_prompt {json.dumps(value)}" in message


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("FluxPipeline", "another pipeline, FluxPipeline."),
        ("StableDiffusion3Pipeline", "another pipeline, StableDiffusion3Pipeline."),
        ("KolorsPipeline", "another pipeline, KolorsPipeline."),
        ("StableDiffusionUpscalePipeline", "another pipeline, StableDiffusionUpscalePipeline."),
        ("OnnxStableDiffusionPipeline", "another pipeline, OnnxStableDiffusionPipeline."),
        ("StableDiffusionXLInstructPix2PixPipeline", "which edits a picture by an instruction"),
        ("LatentConsistencyModelPipeline", "whose UNet takes the guidance scale as an input"),
        (["my_pipeline", "StableDiffusionPipeline"], "StableDiffusionPipeline, whose code comes with the checkpoint"),
        (7, "another pipeline, 7."),
    ],
)
def test_other_pipelines_are_refused_by_name(tmp_path: Path, name: Any, meaning: str) -> None:
    message = refused(tmp_path, {**XL, "_class_name": name})
    assert meaning in message
    assert "give a checkpoint of one of them" in message


@pytest.mark.parametrize(
    ("component", "library", "name"),
    [
        ("vae", "diffusers", "AutoencoderTiny"),
        ("vae", "diffusers", "AsymmetricAutoencoderKL"),
        ("vae", "diffusers", "ConsistencyDecoderVAE"),
        ("unet", "diffusers", "UNetMotionModel"),
        ("unet", "my_unet", "MyUNet"),
        ("text_encoder", "transformers", "RobertaModel"),
        ("text_encoder_2", "transformers", "CLIPTextModel"),
        ("tokenizer", "transformers", "XLMRobertaTokenizer"),
        ("tokenizer_2", "transformers", "T5Tokenizer"),
    ],
)
def test_other_components_are_refused_by_name(tmp_path: Path, component: str, library: str, name: str) -> None:
    given = {**XL, component: [library, name]}
    assert f"The checkpoint's {component} is of the class {name}, expected " in refused(tmp_path, given)
    left_out = Component(component.replace("tokenizer", "text_encoder"))
    rest = tuple(taken for taken in XL_TAKEN if taken is not left_out)
    assert read(tmp_path, given, taken=rest).notices == ()


@pytest.mark.parametrize("value", [None, [None, None]])
@pytest.mark.parametrize(
    ("component", "advice"),
    [
        ("unet", "that has one."),
        ("vae", "vae: false"),
        ("text_encoder", "text: false"),
        ("tokenizer_2", "text: false"),
    ],
)
def test_components_that_are_not_there_are_told(tmp_path: Path, component: str, advice: str, value: Any) -> None:
    message = refused(tmp_path, {**XL, component: value})
    assert f"The checkpoint's pipeline has no {component}." in message
    assert advice in message


@pytest.mark.parametrize("value", ["AutoencoderKL", ["diffusers"], ["diffusers", 3], {"diffusers": "AutoencoderKL"}])
def test_components_that_are_not_said_are_refused(tmp_path: Path, value: Any) -> None:
    assert "model_index.json does not say what its vae is" in refused(tmp_path, {**XL, "vae": value})


def test_a_projection_that_is_not_used_may_be_there(tmp_path: Path) -> None:
    given = {**SD, "text_encoder": ["transformers", "CLIPTextModelWithProjection"]}
    assert read(tmp_path, given, Family.SD15) == read(tmp_path, SD, Family.SD15)


def test_a_refiner_is_refused_where_diffusers_would_use_its_score(tmp_path: Path) -> None:
    refiner = {**XL, "requires_aesthetics_score": True}
    for name in ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"):
        message = refused(tmp_path, {**refiner, "_class_name": name})
        assert "conditioned on an aesthetic score, as SDXL's refiner is" in message
    assert read(tmp_path, refiner).notices == ("model_index.json: left out requires_aesthetics_score",)
    assert read(tmp_path, {**refiner, "requires_aesthetics_score": False}).notices == ()


def test_what_is_left_out_is_named_in_one_line(tmp_path: Path) -> None:
    assert read(tmp_path, SD, Family.SD15).notices == (
        "model_index.json: left out feature_extractor, safety_checker (no picture is checked)",
    )
    given = {
        **SD,
        "feature_extractor": [None, None],
        "safety_checker": None,
        "requires_safety_checker": True,
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "is_cosxl_edit": False,
        "my_own_key": "mine",
    }
    assert read(tmp_path, given, Family.SD15).notices == (
        "model_index.json: left out image_encoder (for IP-Adapters), my_own_key",
    )


@pytest.mark.parametrize(("content", "match"), [("{", "cannot be read"), ("[]", "not a JSON object")])
def test_a_damaged_one_is_told(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match=match):
        read_model_index(str(tmp_path), Family.SDXL, XL_TAKEN)


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=r"model_index\.json is not in the local cache") as caught:
        read_model_index("someone/something", Family.SDXL, XL_TAKEN)
    assert "hf download someone/something" in caught.value.advice
    home = tmp_path / "hub" / "models--someone--something"
    for name, content in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/model_index.json", json.dumps(XL))):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(content)
    assert read_model_index("someone/something", Family.SDXL, XL_TAKEN) == ModelIndex(True, ())


def test_another_source_has_its_own(tmp_path: Path) -> None:
    read(tmp_path, {**XL, "force_zeros_for_empty_prompt": False})
    sdxl = {"family": "sdxl", "source": "random:0", "width": 1024, "height": 1024}
    assert model_index(Recipe.from_dict(sdxl)).force_zeros_for_empty_prompt
    assert not model_index(Recipe.from_dict({**sdxl, "source": str(tmp_path)})).force_zeros_for_empty_prompt
