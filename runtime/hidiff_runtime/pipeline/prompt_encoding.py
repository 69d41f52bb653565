"""Prompts as the embeddings that a bundle's UNet is conditioned on: what diffusers calls ``encode_prompt``."""

from __future__ import annotations

import functools
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.denoising.conditioning import Array, is_whole
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.format.tokenizer import Tokenizer, Tokens
from hidiff_runtime.pipeline.request_fields import LONG_PROMPTS

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.format.specs import Network, TextEncoderRecord

MOST_CHUNKS = 4
"""Chunks of 75 tokens that a bundle can be built for."""

_WHITESPACE = "\t\n\v\f\r"
_Asked = tuple[str, int]
"""A prompt, and how many layers its embeddings skip."""


class TruncationWarning(UserWarning):
    """The end of a prompt was cut; the message quotes it."""


@dataclass(frozen=True)
class TextEncoding:
    """One prompt, encoded.

    Args:
        prompt_embeds: float32 ``[tokens, width]``, the text encoders' side by side, the chunks' one after another.
        text_embeds: SDXL's pooled ``[width]``, of the first chunk.
        cut: the end of the prompt that was cut; nothing where none was.
    """

    prompt_embeds: Array
    text_embeds: Array | None
    cut: tuple[str, ...]


def encode_prompts(
    bundle: Bundle,
    prompts: Sequence[str],
    negative: Sequence[str] | None = None,
    *,
    clip_skip: int = 0,
    long_prompt: str = "truncate",
) -> tuple[dict[str, Any], dict[str, str]]:
    """Encodes prompts, each different one once, and closes the text encoders again.

    As in diffusers, ``clip_skip`` is for the prompts alone; without negative prompts SDXL takes zeros for their
    embeddings where its checkpoint says ``force_zeros_for_empty_prompt``, and all others those of the empty prompt.

    Args:
        prompts: at least one, none of them empty.
        negative: as many, possibly empty; only where the bundle was built with guidance.
        clip_skip: how many layers of the text encoders are skipped, counted from the one that is usual.
        long_prompt: ``truncate`` cuts prompts of more than 75 tokens, with a warning; ``chunk`` spreads them over as
            many chunks as the bundle was built for, each with a start and an end of its own.

    Returns:
        ``prompt_embeds`` float32 ``[prompts, tokens, width]``, ``text_embeds`` ``[prompts, width]`` for SDXL, and with
        guidance both once more with ``negative_`` before: arguments of `Denoiser.denoise`. And the end that was cut of
        each prompt of which one was.

    Raises:
        InputError: a prompt is empty, has control characters or does not fit; another argument is not one it takes.
        BundleError: the bundle has no text encoders, or a broken tokenizer.
        EngineError: an engine or the `tokenizers` library is missing, or fails.
    """
    records = bundle.manifest.text_encoders
    if not records:
        raise BundleError(
            "The bundle has no text encoder.",
            given=bundle.root,
            advice="Give embeddings, or build it with text: true in the recipe.",
        )
    check_options(clip_skip, min(record.clip_skip for record in records), long_prompt)
    clip_skip = int(clip_skip)
    _check_prompts(prompts, negative, guidance=bundle.manifest.guidance)
    sdxl = any(record.output("text_embeds") is not None for record in records)
    zeros = negative is None and sdxl and bundle.manifest.force_zeros_for_empty_prompt
    opposite = (negative or [""] * len(prompts)) if bundle.manifest.guidance and not zeros else []
    asked = [(prompt, clip_skip) for prompt in prompts]
    unasked = [(prompt, 0) for prompt in opposite]
    found = _encode(bundle, dict.fromkeys([*asked, *unasked]), chunked=long_prompt == "chunk")
    embeds: dict[str, Any] = dict(_stacked([found[key] for key in asked]))
    if bundle.manifest.guidance:
        others = {name: np.zeros_like(array) for name, array in embeds.items()}
        others = others if zeros else _stacked([found[key] for key in unasked])
        embeds |= {f"negative_{name}": array for name, array in others.items()}
    cut = {prompt: encoding.cut[0] for (prompt, _), encoding in found.items() if encoding.cut}
    for text in dict.fromkeys(cut.values()):
        warnings.warn(
            f"The prompt is longer than the text encoder can read. This was cut: {text!r}. Shorten the prompt, or use "
            "long_prompt='chunk' with a bundle built with prompt_chunks.",
            TruncationWarning,
            stacklevel=2,
        )
    return embeds, cut


class TokenCounter:
    """Counts prompts' tokens with the bundle's tokenizers, read once; opens no engine.

    Raises:
        BundleError: a broken tokenizer.
        EngineError: the `tokenizers` library is missing.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._chunks = chunks_of(bundle)
        records = bundle.manifest.text_encoders
        self._tokenizers = [Tokenizer.open(bundle.file(record.tokenizer), record.places) for record in records]

    def count(self, prompt: str, *, long_prompt: str = "truncate") -> tuple[int, str]:
        """Returns how many tokens a prompt has, and the end of it that would be cut.

        Raises:
            InputError: it does not fit the bundle's chunks.
        """
        count, longest = 0, ""
        for tokenizer in self._tokenizers:
            rows = _rows(tokenizer, prompt, self._chunks, chunked=long_prompt == "chunk")
            count = max(count, tokenizer.count(prompt))
            longest = max(longest, *(row.cut for row in rows), key=len)
        return count, longest


def _stacked(encodings: Sequence[TextEncoding]) -> dict[str, Array]:
    embeds = {"prompt_embeds": np.stack([encoding.prompt_embeds for encoding in encodings])}
    pooled = [encoding.text_embeds for encoding in encodings if encoding.text_embeds is not None]
    return embeds | ({"text_embeds": np.stack(pooled)} if pooled else {})


def _encode(bundle: Bundle, asked: dict[_Asked, None], *, chunked: bool) -> dict[_Asked, TextEncoding]:
    """Encodes by every text encoder in turn, so that one is open at a time, and evaluates no tokens twice."""
    texts = dict.fromkeys(prompt for prompt, _ in asked)
    chunks = chunks_of(bundle)
    parts: dict[_Asked, list[TextEncoding]] = {key: [] for key in asked}
    tokens = {}
    for record in bundle.manifest.text_encoders:
        tokenizer = bundle.tokenizer(record)
        tokens[record.name] = {text: _rows(tokenizer, text, chunks, chunked=chunked) for text in texts}
    for record in bundle.manifest.text_encoders:
        with bundle.network(cast("Network", record.name)) as session:
            evaluate = functools.cache(functools.partial(_evaluate, session, record))
            for prompt, skip in asked:
                rows = tokens[record.name][prompt]
                parts[prompt, skip].append(_encoded(rows, [evaluate(row.ids, skip) for row in rows]))
    return {key: _joined(encodings) for key, encodings in parts.items()}


def _joined(encodings: Sequence[TextEncoding]) -> TextEncoding:
    """Returns the text encoders' embeddings side by side, and the pooled ones of the last."""
    embeds = np.concatenate([encoding.prompt_embeds for encoding in encodings], axis=-1)
    longest = max((encoding.cut for encoding in encodings), key=lambda cut: len("".join(cut)))
    return TextEncoding(embeds, encodings[-1].text_embeds, longest)


def chunks_of(bundle: Bundle) -> int:
    """Returns how many chunks of the text encoder's tokens the bundle was built for."""
    taken = bundle.manifest.phases[0].input("prompt_embeds")
    given = bundle.manifest.text_encoders[0].input("input_ids")
    assert taken is not None  # by the manifest's own checks
    assert given is not None
    return taken.shape[1] // given.shape[1]


def _rows(tokenizer: Tokenizer, prompt: str, chunks: int, *, chunked: bool) -> tuple[Tokens, ...]:
    """Returns a prompt's tokens for every chunk of the bundle; the empty prompt's where it has no more."""
    rows = tokenizer.chunks(prompt) if chunked else (tokenizer.encode(prompt),)
    if len(rows) > chunks:
        held = "one chunk" if chunks == 1 else f"{chunks} chunks"
        build = f", or build the bundle with prompt_chunks: {len(rows)}" if len(rows) <= MOST_CHUNKS else ""
        raise InputError(
            f"The prompt is too long for this bundle, which holds {held} of 75 tokens.",
            given=f"{len(rows)} chunks: {prompt[:60]!r}…",
            advice=f"Shorten the prompt, use long_prompt='truncate'{build}.",
        )
    return (*rows, *[tokenizer.encode("")] * (chunks - len(rows)))


def _evaluate(session: Session, record: TextEncoderRecord, ids: tuple[int, ...], skip: int) -> dict[str, Array]:
    """Returns the outputs. Raises EngineError for NaN, for which the denoiser would blame the caller."""
    outputs = session.run({"input_ids": np.array([ids], np.int32), "clip_skip": np.array([skip], np.int32)})
    for name, array in outputs.items():
        if bad := count_nonfinite(array):
            raise EngineError(
                f"The {record.name} gave NaN or infinite values.",
                given=f"{bad} of {array.size} in {name}",
                advice="Build the bundle in float32 or bfloat16: half precision overflows in some checkpoints.",
            )
    return outputs


def _encoded(rows: Sequence[Tokens], outputs: Sequence[dict[str, Array]]) -> TextEncoding:
    """Returns the rows' embeddings one after another, and the first one's pooled embeddings."""
    embeds = np.concatenate([found["prompt_embeds"][0] for found in outputs])
    pooled = outputs[0]["text_embeds"][0] if "text_embeds" in outputs[0] else None
    return TextEncoding(embeds, pooled, tuple(row.cut for row in rows if row.cut))


def check_options(clip_skip: Any, most: int, long_prompt: Any) -> None:
    """Refuses layers that no text encoder leaves out, and what cannot become of a long prompt.

    Raises:
        InputError: says what there is.
    """
    if not is_whole(clip_skip) or not 0 <= clip_skip <= most:
        raise InputError(
            f"clip_skip must be a whole number from 0 to {most}.",
            given=repr(clip_skip),
            advice="0 takes the layer that is usual, 1 the one before it.",
        )
    if long_prompt not in LONG_PROMPTS:
        raise InputError(
            f"long_prompt must be one of {', '.join(LONG_PROMPTS)}.",
            given=repr(long_prompt),
            advice="'truncate' cuts long prompts, 'chunk' spreads them over the bundle's chunks.",
        )


def _check_prompts(prompts: Sequence[str], negative: Sequence[str] | None, *, guidance: bool) -> None:
    if isinstance(prompts, str) or not prompts:
        raise InputError("Prompts come as a list of texts.", given=repr(prompts), advice="Give at least one prompt.")
    for prompt in prompts:
        check_text("prompt", prompt)
        check_not_empty(prompt)
    if negative is None:
        return
    if not guidance:
        raise InputError(
            "This bundle was built without guidance: it takes no negative prompt.",
            given=repr(negative),
            advice="Leave the negative prompt out, or build the bundle with guidance: true.",
        )
    if isinstance(negative, str) or len(negative) != len(prompts):
        raise InputError(
            "Negative prompts come as a list of as many texts as there are prompts.",
            given=f"{negative!r} for {len(prompts)} prompts",
            advice="Repeat the negative prompt for each.",
        )
    for prompt in negative:
        check_text("negative prompt", prompt)


def check_not_empty(prompt: str) -> None:
    """Refuses a prompt of whitespace alone. Raises InputError."""
    if not prompt.strip():
        raise InputError("A prompt is empty.", given=repr(prompt), advice="Say what the picture is to show.")


def check_text(name: str, text: object) -> None:
    """Refuses what is no text, or has control characters; line ends and tabulators are whitespace.

    Raises:
        InputError: names the character and its position, counted from 1.
    """
    if not isinstance(text, str):
        raise InputError(f"A {name} must be text.", given=type(text).__name__, advice="Give a str.")
    if text.isprintable():  # what follows is slow for many
        return
    for position, character in enumerate(text, 1):
        if character not in _WHITESPACE and unicodedata.category(character) in ("Cc", "Cs"):
            kind = "control character" if unicodedata.category(character) == "Cc" else "half of a surrogate pair"
            raise InputError(
                f"A {name} has a {kind}.",
                given=f"U+{ord(character):04X} at position {position} of {text[:60]!r}",
                advice="Take it out; line ends and tabulators may stay.",
            )
