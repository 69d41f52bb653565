"""The reference of text encoders and the VAE: transformers and diffusers, beside the modules that are exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.tokenizer import tokenizer_json
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.modules.text_encoder import TextEncoderModule
from hidiff_export.modules.vae import VaeDecoder, VaeEncoder
from hidiff_export.recipe import Recipe
from hidiff_export.reference.text_vae_reference import NetworkCall, PictureNetworks
from hidiff_runtime.format.specs import GraphRecord, VaeRecord
from hidiff_runtime.verification.reference_samples import Drawn

TINY = {"source": "random:0", "unet_width": "tiny", "width": 192, "height": 128, "steps": [3]}
SDXL = Recipe.from_dict({**TINY, "family": "sdxl", "vae_tile": 128, "batch": 2})
SD15 = Recipe.from_dict({**TINY, "family": "sd15"})


def write(recipe: Recipe, root: Path) -> Path:
    for name in (*recipe.text_encoders, "vae"):
        component, folder = Component(name), root / name
        folder.mkdir(parents=True)
        found = load(component, recipe.source, recipe.family, recipe.task, recipe.unet_width)
        (folder / "config.json").write_text(json.dumps({**component.written_as, **found.config}), encoding="utf-8")
        WeightStore.write(found.state_dict, folder / "weights.safetensors", "float32")
        if component.is_text:
            text = tokenizer_json(recipe.source, component, recipe.family, recipe.unet_width)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(SDXL, tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(SD15, tmp_path_factory.mktemp("sd15"))


def exported(recipe: Recipe, call: NetworkCall, root: Path) -> list[np.ndarray]:
    """What the module that is exported makes of the same inputs."""
    component = Component("vae" if call.network.startswith("vae") else call.network)
    config = json.loads((root / component.value / "config.json").read_text(encoding="utf-8"))
    known = {key: value for key, value in config.items() if key not in component.written_as}
    network = build(component, known, WeightStore.open(root / component.value / "weights.safetensors").state_dict())
    if component.is_text:
        module: torch.nn.Module = TextEncoderModule(network, penultimate=recipe.family.is_sdxl)
    else:
        module = (VaeDecoder if call.network == "vae_decoder" else VaeEncoder)(network, recipe.tiles)
    given = {name: v.array() if isinstance(v, Drawn) else v for name, v in call.inputs.items()}
    with torch.inference_mode():
        found = module(**{name: torch.from_numpy(value) for name, value in given.items()})
    return [tensor.numpy() for tensor in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_network_is_asked_and_what_is_exported_computes_the_same(
    family: str, request: pytest.FixtureRequest
) -> None:
    recipe = {"sd15": SD15, "sdxl": SDXL}[family]
    root = request.getfixturevalue(family)
    networks = PictureNetworks(root, recipe)

    calls = [*networks.text_calls(), *networks.vae_calls()]

    assert [call.network for call in calls] == [
        *(name for name in recipe.text_encoders for _ in range(2)),
        *("vae_decoder", "vae_encoder"),
    ]
    for call in calls:
        for expected, found in zip(call.outputs.values(), exported(recipe, call, root), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert [call.inputs["clip_skip"].tolist() for call in calls[:2]] == [[0], [1]]  # type: ignore[union-attr]


def test_prompts_are_encoded_by_diffusers_for_a_whole_batch(sdxl: Path) -> None:
    inputs = PictureNetworks(sdxl, SDXL).prompt_inputs()

    assert inputs is not None
    assert len(set(inputs.prompts)) == 2
    assert {name: array.shape for name, array in inputs.embeds.items()} == {
        **dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (2, 77, 32)),
        **dict.fromkeys(("text_embeds", "negative_text_embeds"), (2, 32)),
    }
    assert not np.array_equal(inputs.embeds["prompt_embeds"][0], inputs.embeds["prompt_embeds"][1])
    chunked = inputs.fitted("prompt_embeds", (2, 154, 32))
    np.testing.assert_array_equal(chunked[:, :77], inputs.embeds["prompt_embeds"])
    np.testing.assert_array_equal(chunked[1, 77:], inputs.empty[0])


def test_the_first_tile_by_itself_is_what_no_other_tile_touches(sdxl: Path) -> None:
    networks = PictureNetworks(sdxl, SDXL)
    latents = np.random.RandomState(0).standard_normal((2, 4, 16, 24)).astype(np.float32)
    tiles = SDXL.tiles
    decoder = GraphRecord("", {}, tiles.decoder_inputs(), tiles.decoder_outputs())
    encoder = GraphRecord("", {}, tiles.encoder_inputs(), tiles.encoder_outputs())

    whole = networks.decode(latents, VaeRecord(decoder, encoder, 0.13025, tiles.overlap, ()))
    part, corner = networks.decode_part(latents)

    assert whole.shape == (2, 3, 128, 192)
    assert corner == (0, 0)
    untouched = SDXL.width - tiles.width
    np.testing.assert_allclose(part[..., :untouched], whole[..., :untouched], rtol=0, atol=1e-5)
    assert not np.allclose(part, whole[..., : part.shape[-1]], rtol=0, atol=1e-3)
    assert part.min() >= 0
    assert part.max() <= 1


def test_a_bundle_from_before_there_were_any_has_none(tmp_path: Path) -> None:
    networks = PictureNetworks(tmp_path, SDXL)

    assert (networks.text_encoders, networks.has_vae, networks.prompt_inputs()) == ((), False, None)
    assert [*networks.text_calls(), *networks.vae_calls()] == []
