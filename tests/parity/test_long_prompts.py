"""A prompt over several chunks, from text to picture, beside diffusers' pipeline with the embeddings of the chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hidiff_export.recipe import Recipe
from hidiff_export.reference.tolerances import TOLERANCES, Boundary
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.verification.comparison import compare
from tests.parity.pictures import Picture, diffusers_pipeline, expected, generated, module_bundle, opened

BOUND = TOLERANCES[Boundary.RUN, "float32"]
LONG = "the quick brown fox jumps over the lazy dog; " * 4
SHORT = "blurry"
ASKED = {"steps": 3, "guidance_scale": 5.0, "seed": 5}
RECIPE = Recipe.from_dict(
    {
        "family": "sd15",
        "source": "random:0",
        "unet_width": "tiny",
        "width": 128,
        "height": 128,
        "prompt_chunks": 2,
        "sampler": "pndm",
        "steps": [3],
    }
)


def same(found: Picture, wanted: Picture) -> bool:
    return compare(Boundary.RUN.value, wanted.exact, found.exact, BOUND).ok


def embeds(pipe: Any, text: str) -> torch.Tensor:
    """By hand: rows of 75 tokens, two of them, each with start, end and padding of its own."""
    words = pipe.tokenizer(text).input_ids[1:-1]
    start, end, padding = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
    rows = [[start, *row, end, *[padding] * (75 - len(row))] for row in (words[:75], words[75:150])]
    with torch.no_grad():
        return pipe.text_encoder(torch.tensor(rows)).last_hidden_state.reshape(1, 154, -1)


def test_a_long_prompt_fills_two_chunks(tmp_path: Path) -> None:
    folder = module_bundle(RECIPE, tmp_path / "bundle")
    assert str(Manifest.read(folder).phases[0].input("prompt_embeds")) == "prompt_embeds float32[2, 154, 32]"
    text = LONG[:130]  # 107 tokens
    with opened(folder, RECIPE) as pipe:
        found = generated(pipe, prompt=text, negative_prompt=SHORT, long_prompt="chunk", **ASKED)
    theirs = diffusers_pipeline(RECIPE, "StableDiffusionPipeline")
    given = {"prompt_embeds": embeds(theirs, text), "negative_prompt_embeds": embeds(theirs, SHORT)}
    assert same(found, expected(theirs, RECIPE, {**ASKED, **given}))
    swapped = {**given, "prompt_embeds": torch.roll(given["prompt_embeds"], 77, 1)}
    first_alone = {**given, "prompt_embeds": torch.cat([given["prompt_embeds"][:, :77], embeds(theirs, "")[:, 77:]], 1)}
    # The order of the chunks says nothing to attention, what is in them everything.
    assert same(found, expected(theirs, RECIPE, {**ASKED, **swapped}))
    assert not same(found, expected(theirs, RECIPE, {**ASKED, **first_alone}))
