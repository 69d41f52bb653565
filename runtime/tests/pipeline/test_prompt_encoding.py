"""Prompts as embeddings, with text encoders of a few lines of numpy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures

from hidiff_runtime.bundle import Bundle
from hidiff_runtime.bundle import open as open_bundle
from hidiff_runtime.errors import BundleError, InputError
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.pipeline.prompt_encoding import TruncationWarning, encode_prompts

LONG = "x" * 75 + " The rest"


@contextmanager
def opened(
    folder: Path, *, chunks: int = 1, with_text: bool = True, **kind: Any
) -> Iterator[tuple[Bundle, toy_pictures.Backend]]:
    toy_pictures.make(folder, toy.Toy(**kind), with_text=with_text, chunks=chunks)
    backend = toy_pictures.Backend()
    with open_bundle(folder, backend=backend) as bundle:
        yield bundle, backend


def expected(bundle: Bundle, ids: tuple[int, ...], skip: int, output: str = "prompt_embeds") -> np.ndarray:
    """What the toy's text encoders give for these tokens."""
    inputs = {"input_ids": np.array([ids], np.int32), "clip_skip": np.array([skip], np.int32)}
    found = [toy_pictures.encode_text(record, inputs) for record in bundle.manifest.text_encoders]
    return np.concatenate([outputs[output][0] for outputs in found if output in outputs], axis=-1)


def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.open(bundle.root / bundle.manifest.text_encoders[0].tokenizer)


@pytest.mark.parametrize("sdxl", [False, True])
def test_prompts_and_their_opposites(tmp_path: Path, sdxl: bool) -> None:
    with opened(tmp_path, sdxl=sdxl) as (bundle, _):
        prompts, negative = ["a cat", "A dog"], ["", "blurry"]
        embeds, cut = encode_prompts(bundle, prompts, negative, clip_skip=2)
        rows = [tokenizer(bundle).encode(text).ids for text in (*prompts, *negative)]
        names = ("prompt_embeds", "text_embeds") if sdxl else ("prompt_embeds",)
        assert set(embeds) == {*names, *(f"negative_{name}" for name in names)}
        for name in names:
            assert np.array_equal(embeds[name], [expected(bundle, row, 2, name) for row in rows[:2]])
            opposite = [expected(bundle, row, 0, name) for row in rows[2:]]  # as in diffusers, clip_skip is not theirs
            assert np.array_equal(embeds[f"negative_{name}"], opposite)
        assert embeds["prompt_embeds"].dtype == np.float32
        assert cut == {}
        given = bundle.denoiser().denoise(**{n: a[:1] for n, a in embeds.items()}, steps=2, seed=0, guidance_scale=2.0)
        assert np.isfinite(given).all()


def test_without_a_negative_prompt_sdxl_takes_zeros_and_others_the_empty_prompt(tmp_path: Path) -> None:
    with opened(tmp_path / "sdxl", sdxl=True) as (bundle, _):
        embeds, _ = encode_prompts(bundle, ["a cat"])
        assert not embeds["negative_prompt_embeds"].any()
        assert not embeds["negative_text_embeds"].any()
        assert embeds["text_embeds"].any()
    with opened(tmp_path / "sd", sdxl=False) as (bundle, _):
        embeds, _ = encode_prompts(bundle, ["a cat"])
        given, _ = encode_prompts(bundle, ["a cat"], [""])
        assert np.array_equal(embeds["negative_prompt_embeds"], given["negative_prompt_embeds"])
        assert not np.array_equal(embeds["negative_prompt_embeds"], embeds["prompt_embeds"])


def test_without_guidance_there_are_no_opposites(tmp_path: Path) -> None:
    with opened(tmp_path, guidance=False) as (bundle, _):
        embeds, _ = encode_prompts(bundle, ["a cat"])
        assert not [name for name in embeds if name.startswith("negative_")]
        with pytest.raises(InputError, match="without guidance"):
            encode_prompts(bundle, ["a cat"], ["a dog"])


def test_equal_prompts_are_evaluated_once_and_encoders_are_closed(tmp_path: Path) -> None:
    with opened(tmp_path, sdxl=True) as (bundle, backend):
        encode_prompts(bundle, ["a cat", "A  CAT", "a cat"], ["", "", ""])
        assert [name for name, _ in backend.calls] == ["text_encoder"] * 2 + ["text_encoder_2"] * 2
        order = [f"{event} {name}" for name in ("text_encoder", "text_encoder_2") for event in ("open", "close")]
        assert backend.events == order


def test_a_long_prompt_is_cut_with_a_warning_that_quotes_it(tmp_path: Path) -> None:
    with opened(tmp_path, sdxl=True) as (bundle, _):
        with pytest.warns(TruncationWarning, match="'The rest'") as caught:
            embeds, cut = encode_prompts(bundle, [LONG, LONG])
        assert cut == {LONG: "The rest"}
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole, cut = encode_prompts(bundle, ["x" * 75] * 2)
        assert cut == {}
        assert np.array_equal(embeds["prompt_embeds"], whole["prompt_embeds"])


@pytest.mark.parametrize("sdxl", [False, True])
def test_chunks(tmp_path: Path, sdxl: bool) -> None:
    with opened(tmp_path, sdxl=sdxl, chunks=3) as (bundle, _):
        embeds, cut = encode_prompts(bundle, [LONG], ["a dog"], long_prompt="chunk")
        first, second = (tokens.ids for tokens in tokenizer(bundle).chunks(LONG))
        dog, empty = (tokenizer(bundle).encode(text).ids for text in ("a dog", ""))
        for name, rows in (("prompt_embeds", (first, second, empty)), ("negative_prompt_embeds", (dog, empty, empty))):
            assert np.array_equal(embeds[name][0], np.concatenate([expected(bundle, row, 0) for row in rows]))
        if sdxl:
            assert np.array_equal(embeds["text_embeds"][0], expected(bundle, first, 0, "text_embeds"))
        assert cut == {}
        with pytest.warns(TruncationWarning, match="The rest"):
            cut_embeds, _ = encode_prompts(bundle, [LONG])
        assert np.array_equal(cut_embeds["prompt_embeds"][0, 77:154], expected(bundle, empty, 0))


def test_more_chunks_than_the_bundle_holds_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as (bundle, backend):
        encode_prompts(bundle, ["x" * 75], long_prompt="chunk")
        backend.calls.clear()
        with pytest.raises(InputError, match="one chunk of 75 tokens") as caught:
            encode_prompts(bundle, [LONG], long_prompt="chunk")
        assert "prompt_chunks: 2" in caught.value.advice
        assert not backend.calls
        with pytest.raises(InputError) as caught:
            encode_prompts(bundle, ["x" * 301], long_prompt="chunk")
        assert "prompt_chunks" not in caught.value.advice


@pytest.mark.parametrize(
    ("prompts", "negative", "options", "match"),
    [
        ([], None, {}, "list of texts"),
        ("a cat", None, {}, "list of texts"),
        ([""], None, {}, "empty"),
        ([" \n\t"], None, {}, "empty"),
        (["a\x00b"], None, {}, r"control character.\n.*U\+0000 at position 2"),
        (["a"], ["\x1b[31m"], {}, r"negative prompt has a control character.\n.*U\+001B at position 1"),
        (["caf\x85"], None, {}, r"U\+0085 at position 4"),
        (["a \ud83d"], None, {}, "surrogate"),
        ([b"a cat"], None, {}, "must be text"),
        (["a"], ["", ""], {}, "as many texts as"),
        (["a"], "blurry", {}, "as many texts as"),
        (["a"], None, {"clip_skip": -1}, "from 0 to 4"),
        (["a"], None, {"clip_skip": 5}, "from 0 to 4"),
        (["a"], None, {"clip_skip": 1.0}, "from 0 to 4"),
        (["a"], None, {"long_prompt": "cut"}, "truncate, chunk"),
    ],
)
def test_what_it_does_not_take(
    tmp_path: Path, prompts: Any, negative: Any, options: dict[str, Any], match: str
) -> None:
    with opened(tmp_path) as (bundle, backend):
        with pytest.raises(InputError, match=match):
            encode_prompts(bundle, prompts, negative, **options)
        assert not backend.events


def test_control_like_characters_that_belong_to_text_are_taken(tmp_path: Path) -> None:
    with opened(tmp_path) as (bundle, _):
        encode_prompts(bundle, ["two\nlines\tand \u200f\u200d joiners\ufeff"])


def test_a_bundle_without_text_encoders(tmp_path: Path) -> None:
    with (
        opened(tmp_path, with_text=False) as (bundle, _),
        pytest.raises(BundleError, match="no text encoder") as caught,
    ):
        encode_prompts(bundle, ["a cat"])
    assert "text: true" in caught.value.advice


def test_tokens_that_are_no_whole_chunks_are_no_bundle(tmp_path: Path) -> None:
    manifest = Manifest.read(toy_pictures.make(tmp_path))
    encoder = manifest.text_encoders[0]
    ids = replace(encoder.inputs[0], shape=(1, 50))
    given = replace(encoder.outputs[0], shape=(1, 50, toy.DIM))
    broken = replace(manifest, text_encoders=(replace(encoder, inputs=(ids, *encoder.inputs[1:]), outputs=(given,)),))
    toy.seal(tmp_path, broken)
    with pytest.raises(BundleError, match="whole number of times"):
        Manifest.read(tmp_path)
