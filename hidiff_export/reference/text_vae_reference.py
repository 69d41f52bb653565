"""The reference beside the UNet's: text encoders by transformers, the VAE by diffusers, and prompts by a pipeline.

Each network is loaded when it is its turn and let go of afterwards, so that at most one of them is in memory beside
the UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import load_stored
from hidiff_export.checkpoints.stored_configs import WEIGHTS
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.families.family import Family
from hidiff_export.families.graph_io import PROMPT_TOKENS
from hidiff_export.recipe import Recipe
from hidiff_export.reference.random_inputs import drawn
from hidiff_runtime.format.specs import VaeRecord
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.pipeline.vae import decode_tiles
from hidiff_runtime.verification.image_metrics import unit
from hidiff_runtime.verification.reference_samples import Drawn

if TYPE_CHECKING:
    from hidiff_runtime.backends.protocol import Session

Array = NDArray[Any]

PROMPT = "A lighthouse at dusk, gulls over the breakers; oil on canvas, très détaillé 🌊"
NEGATIVE = "blurry, low contrast"
_LONG = ", ".join(["a harbour town of 1,204 lamps, each one's light on the wet stones of the quay"] * 6)
_ASKED = ((PROMPT, 0), (_LONG, 1))
"""Prompts that text encoders are asked for, and how many layers are skipped: accents, an emoji, and one to be cut."""

_PIXELS_ENOUGH = 128
"""Side of the part of a picture that a build keeps."""


@dataclass(frozen=True)
class NetworkCall:
    """One evaluation of a ControlNet, a text encoder or half of the VAE.

    Args:
        network: its engine's name.
        inputs: of its graph.
        outputs: by name, float32.
        prompt: that the tokens are of.
    """

    network: str
    inputs: Mapping[str, Array | Drawn]
    outputs: Mapping[str, Array]
    prompt: str | None = None


@dataclass(frozen=True)
class PromptInputs:
    """What diffusers makes of a run's prompts.

    Args:
        prompts: one for each picture.
        negative: as many; None without guidance.
        embeds: by the denoiser's names, float32.
        empty: the empty prompt's, ``[1, 77, width]``.
    """

    prompts: tuple[str, ...]
    negative: tuple[str, ...] | None
    embeds: Mapping[str, Array]
    empty: Array

    def fitted(self, name: str, shape: tuple[int, ...]) -> Array:
        """Returns the embeddings for a UNet that takes ``shape``: any further chunks are those of empty prompts."""
        embeds = self.embeds[name]
        if embeds.shape == shape:
            return embeds
        more = shape[1] // embeds.shape[1] - 1
        return np.concatenate([embeds, *[np.repeat(self.empty, len(embeds), axis=0)] * more], axis=1)


class PictureNetworks:
    """The text encoders and the VAE of a bundle, float32, with the weights as they are stored.

    Args:
        root: the bundle's folder, also while it is being built. What has no weights there is left out.
        recipe: of the bundle.
    """

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self._root = root
        self._recipe = recipe
        named = (*recipe.text_encoders, *(("vae",) if recipe.vae else ()))
        self._names = [name for name in named if (root / name / "weights.safetensors").is_file()]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for name in self._names if name != "vae")

    @property
    def has_vae(self) -> bool:
        """Whether there is a VAE."""
        return "vae" in self._names

    def text_calls(self) -> Iterator[NetworkCall]:
        """Yields each text encoder on prompts, by transformers itself: the layer by its list of hidden states."""
        for name in self.text_encoders:
            tokenizer = self._tokenizer(name)
            encoder = self._load(name)
            with torch.inference_mode():
                for prompt, skip in _ASKED:
                    ids = np.array([tokenizer.encode(prompt).ids], np.int32)
                    inputs = {"input_ids": ids, "clip_skip": np.array([skip], np.int32)}
                    outputs = _hidden(encoder, torch.from_numpy(ids).long(), skip, self._recipe.family)
                    yield NetworkCall(name, inputs, outputs, prompt)

    def prompt_inputs(self) -> PromptInputs | None:
        """Returns a run's prompts through diffusers' own ``encode_prompt``; None without text encoders."""
        if not self.text_encoders:
            return None
        batch, guidance, sdxl = self._recipe.batch, self._recipe.guidance, self._recipe.family.is_sdxl
        prompts = tuple(PROMPT if index == 0 else f"{PROMPT}, {index}" for index in range(batch))
        negative = (NEGATIVE,) * batch if guidance else None
        pipe = self._pipeline()
        call: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": guidance}
        call |= {} if negative is None else {"negative_prompt": list(negative)}
        with torch.inference_mode():
            found = pipe.encode_prompt(list(prompts), **call)
            empty = pipe.encode_prompt("", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        names = ("prompt_embeds", "negative_prompt_embeds", *(("text_embeds", "negative_text_embeds") if sdxl else ()))
        embeds = {name: tensor.numpy() for name, tensor in zip(names, found, strict=True) if tensor is not None}
        return PromptInputs(prompts, negative, embeds, empty.numpy())

    def vae_calls(self) -> Iterator[NetworkCall]:
        """Yields both halves of the VAE on a random tile, by diffusers; nothing without a VAE."""
        if not self.has_vae:
            return
        tiles = self._recipe.tiles
        latents, image = tiles.decoder_inputs()[0], tiles.encoder_inputs()[0]
        model = self._load("vae")
        with torch.inference_mode():
            noise = drawn("latents", latents.shape, 0)
            given = Drawn(noise.seed, noise.shape, 1 / model.config.scaling_factor)
            decoded = model.decode(torch.from_numpy(given.array()), return_dict=False)[0].numpy()
            yield NetworkCall("vae_decoder", {"latents": given}, {"image": decoded})
            picture = Drawn(drawn("image", image.shape, 0).seed, image.shape, uniform=True)
            moments = model.encode(torch.from_numpy(picture.array())).latent_dist.parameters.numpy()
            yield NetworkCall("vae_encoder", {"image": picture}, {"moments": moments})

    def decode(self, latents: Array, vae: VaeRecord) -> Array:
        """Returns the picture of latents by diffusers' VAE, in the bundle's tiles: float32, from 0 to 1."""
        model = self._load("vae")
        with torch.inference_mode():
            return unit(decode_tiles(cast("Session", _TorchDecoder(model)), vae, latents))

    def decode_part(self, latents: Array) -> tuple[Array, tuple[int, int]]:
        """Returns the middle of the first tile of latents, decoded, from 0 to 1; and its first row and column."""
        shape = self._recipe.tiles.decoder_inputs()[0]
        rows, columns = shape.shape[2:]
        tile = np.ascontiguousarray(latents[..., :rows, :columns])
        model = self._load("vae")
        with torch.inference_mode():
            scaled = torch.from_numpy(tile) / model.config.scaling_factor
            picture = torch.cat([model.decode(one, return_dict=False)[0] for one in scaled.split(1)]).numpy()
        height, width = picture.shape[2:]
        corner = (max(height - _PIXELS_ENOUGH, 0) // 2, max(width - _PIXELS_ENOUGH, 0) // 2)
        part = picture[..., corner[0] : corner[0] + _PIXELS_ENOUGH, corner[1] : corner[1] + _PIXELS_ENOUGH]
        return unit(part), corner

    def _tokenizer(self, name: str) -> Tokenizer:
        return Tokenizer.open(self._root / name / "tokenizer.json")

    def _load(self, name: str) -> Any:
        return load_stored(Component(name), WeightStore.open(self._root / name / WEIGHTS))

    def _pipeline(self) -> Any:
        """Returns a pipeline that can do nothing but encode prompts."""
        parts: dict[str, Any] = dict.fromkeys(("vae", "unet", "scheduler"))
        for name in self.text_encoders:
            parts |= {name: self._load(name), name.replace("text_encoder", "tokenizer"): self._fast_tokenizer(name)}
        if self._recipe.family.is_sdxl:
            return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts)

    def _fast_tokenizer(self, name: str) -> Any:
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = tokenizers.Tokenizer.from_file(str(self._root / name / "tokenizer.json"))
        padding: Any = backend.padding
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token=padding["pad_token"], model_max_length=PROMPT_TOKENS
        )


class _TorchDecoder:
    """diffusers' decoder as the session that `decode_tiles` cuts and blends for."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the tile's picture."""
        return {"image": self._vae.decode(torch.from_numpy(inputs["latents"]), return_dict=False)[0].numpy()}


def _hidden(encoder: Any, ids: torch.Tensor, skip: int, family: Family) -> dict[str, Array]:
    """Returns ``prompt_embeds`` as diffusers takes them, and ``text_embeds`` of an encoder that has them."""
    found = encoder(ids, output_hidden_states=True)
    if family.is_sdxl:
        embeds = found.hidden_states[-(skip + 2)]
    else:
        embeds = getattr(encoder, "text_model", encoder).final_layer_norm(found.hidden_states[-(skip + 1)])
    outputs = {"prompt_embeds": embeds.numpy()}
    return outputs | ({"text_embeds": found.text_embeds.numpy()} if "text_embeds" in found else {})
