"""What a bundle's ``tokenizer.json`` may say.

The `tokenizers` library builds whatever a file describes: it makes rows of any length, runs any regular expression, and
with some settings ends the process instead of raising an error. So a file is compared with the one kind of tokenizer
that bundles have, CLIP's, before the library sees it. Vocabulary, merges and the tokens' numbers are the file's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hidiff_runtime.format.codec import Fields, parse_object
from hidiff_runtime.format.regular_files import read_regular

LARGEST = 8 * 2**20
"""Bytes of a file; CLIP's has two million."""

MOST_PLACES = 1024
"""The longest row of tokens; CLIP's has 77."""

_MOST_TOKENS = 2**24
_LONGEST_TOKEN = 1024

_FLAG = object()
"""In a pattern: true or false, either of which only changes what tokens come out."""

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": _FLAG, "trim_offsets": _FLAG, "use_regex": _FLAG}
_PARTS: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
            _BYTE_LEVEL,
        ],
    },
    "decoder": _BYTE_LEVEL,
}
"""What is the same in every such file, as transformers' ``CLIPTokenizer`` writes it."""


def read_tokenizer(path: Path, places: int | None = None) -> bytes:
    """Reads a ``tokenizer.json`` that is one of CLIP's kind.

    Args:
        path: of the file.
        places: tokens that the text encoder takes, which rows must be as long as.

    Returns:
        The file's content.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `LARGEST`.
        BundleError: it says anything else; the field is named.
    """
    content = read_regular(path, LARGEST)
    fields = Fields(parse_object(content, path.name), path.name)
    for key, pattern in _PARTS.items():
        value = fields.take(key)
        if not _matches(value, pattern):
            raise fields.wrong(key, "must be that of CLIP's tokenizers", value)
    vocabulary = dict(fields.nested("model", _model))
    vocabulary.update(fields.each("added_tokens", _added))
    fields.nested("padding", lambda inner: _padding(inner, vocabulary, places))
    fields.nested("post_processor", lambda inner: _post_processor(inner, vocabulary))
    fields.done()
    return content


def _matches(value: Any, pattern: Any) -> bool:
    if pattern is _FLAG:
        return isinstance(value, bool)
    if isinstance(pattern, dict):
        same = isinstance(value, dict) and value.keys() == pattern.keys()
        return same and all(_matches(value[key], below) for key, below in pattern.items())
    if isinstance(pattern, list):
        same = isinstance(value, list) and len(value) == len(pattern)
        return same and all(map(_matches, value, pattern))
    return type(value) is type(pattern) and bool(value == pattern)


def _model(fields: Fields) -> dict[str, int]:
    """Returns the vocabulary of a byte-pair model whose merges are made of its tokens."""
    for key, allowed in {
        "type": ("BPE",),
        "dropout": (None,),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": ("</w>",),
        "fuse_unk": (False,),
        "byte_fallback": (False,),
        "ignore_merges": (False,),
    }.items():
        value = fields.take(key)
        if not any(_matches(value, one) for one in allowed):
            raise fields.wrong(key, "must be that of CLIP's tokenizers", value)
    vocabulary = fields.mapping("vocab")
    numbers = list(vocabulary.values())
    whole = all(type(number) is int and 0 <= number < _MOST_TOKENS for number in numbers)
    if not whole or len(set(numbers)) != len(numbers):
        raise fields.wrong("vocab", f"must give each token a number of its own below {_MOST_TOKENS}", numbers[:5])
    if fields.text("unk_token") not in vocabulary:
        raise fields.wrong("unk_token", "must be a token of the vocabulary", "")
    for index, merge in enumerate(fields.items("merges")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise fields.wrong(f"merges[{index}]", "must be two tokens", merge)
        if not (pair[0] in vocabulary and pair[1] in vocabulary and pair[0] + pair[1] in vocabulary):
            raise fields.wrong(f"merges[{index}]", "must be of tokens of the vocabulary, and make one", merge)
    return vocabulary


def _added(fields: Fields) -> tuple[str, int]:
    """Returns a token that is found before the model runs, and its number."""
    number, content = fields.whole("id", 0, _MOST_TOKENS - 1), fields.text("content")
    if len(content) > _LONGEST_TOKEN:
        raise fields.wrong("content", f"must have at most {_LONGEST_TOKEN} characters", content)
    for key in ("single_word", "lstrip", "rstrip", "normalized", "special"):
        fields.flag(key)
    return content, number


def _padding(fields: Fields, vocabulary: dict[str, int], places: int | None) -> None:
    length = fields.nested("strategy", lambda inner: inner.whole("Fixed", 3, MOST_PLACES))
    if places is not None and length != places:
        raise fields.wrong("strategy.Fixed", f"must be the {places} tokens that the text encoder takes", length)
    for key, pattern in {"direction": "Right", "pad_to_multiple_of": None, "pad_type_id": 0}.items():
        value = fields.take(key)
        if not _matches(value, pattern):
            raise fields.wrong(key, f"must be {pattern!r}", value)
    _numbered(fields, "pad_token", fields.take("pad_token"), fields.take("pad_id"), vocabulary)


def _post_processor(fields: Fields, vocabulary: dict[str, int]) -> None:
    """Start and end, put around each prompt."""
    if fields.text("type") != "RobertaProcessing":
        raise fields.wrong("type", "must be 'RobertaProcessing'", "")
    fields.flag("trim_offsets")
    fields.flag("add_prefix_space")
    for key in ("cls", "sep"):
        pair = fields.take(key)
        if not isinstance(pair, list) or len(pair) != 2:
            raise fields.wrong(key, "must be a token and its number", pair)
        _numbered(fields, key, pair[0], pair[1], vocabulary)


def _numbered(fields: Fields, key: str, token: Any, number: Any, vocabulary: dict[str, int]) -> None:
    if not isinstance(token, str) or type(number) is not int or vocabulary.get(token) != number:
        raise fields.wrong(key, "must be a token of the vocabulary, with its number there", [token, number])
