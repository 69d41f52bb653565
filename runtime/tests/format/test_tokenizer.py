"""Prompts as tokens, by a tokenizer of single letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import toy_pictures
from toy_pictures import TOKENS

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.format.tokenizer_file import LARGEST

LETTERS = TOKENS - 2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    toy_pictures.tokenizer(found)
    return found


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.open(path)


def test_start_tokens_end_and_padding(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.encode("").ids[:2]
    assert tokenizer.encode("").ids == (start, *[end] * (TOKENS - 1))
    found = tokenizer.encode("ab  C").ids
    assert (found[0], len(set(found[1:4])), found[4:]) == (start, 3, (end,) * (TOKENS - 4))
    assert found == tokenizer.encode("AB\nc").ids != tokenizer.encode("ab d").ids


@pytest.mark.parametrize("letters", [0, 1, LETTERS, LETTERS + 1])
def test_tokens_are_counted_without_start_end_and_padding(tokenizer: Tokenizer, letters: int) -> None:
    assert tokenizer.count("x" * letters) == letters


@pytest.mark.parametrize("extra", ["", "!", " The END, ok"])
def test_what_has_no_place_is_quoted_as_it_was_written(tokenizer: Tokenizer, extra: str) -> None:
    whole = tokenizer.encode("x" * LETTERS)
    found = tokenizer.encode("x" * LETTERS + extra)
    assert found.cut == extra.strip()
    assert len(found.ids) == TOKENS
    assert found.ids[-1] == whole.ids[-1]
    assert found.ids[:-2] == whole.ids[:-2]


@pytest.mark.parametrize("before", ["é", "日本", "👩🏽‍🚀", "e\u0301", "ﬁ\t\n"])
def test_the_cut_is_found_behind_characters_of_many_bytes_and_normalization(tokenizer: Tokenizer, before: str) -> None:
    count = sum(id != tokenizer.encode("").ids[-1] for id in tokenizer.encode(before).ids) - 1
    assert tokenizer.encode(before + " " + "x" * (LETTERS - count) + " Cut").cut == "Cut"


@pytest.mark.parametrize("length", [0, 1, LETTERS, LETTERS + 1, 2 * LETTERS, 2 * LETTERS + 1])
def test_chunks_hold_every_token_once(tokenizer: Tokenizer, length: int) -> None:
    prompt = ("abcdefg" * LETTERS)[:length]
    rows = [tokens.ids for tokens in tokenizer.chunks(prompt)]
    assert len(rows) == max(1, -(-length // LETTERS))
    start, end = tokenizer.encode("").ids[:2]
    assert all((len(row), row[0]) == (TOKENS, start) and end in row for row in rows)
    joined = [id for row in rows for id in row[1 : row.index(end)]]
    assert len(joined) == length
    assert joined[:LETTERS] == list(tokenizer.encode(prompt).ids[1 : 1 + min(length, LETTERS)])
    if length <= LETTERS:
        assert rows == [tokenizer.encode(prompt).ids]


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    toy_pictures.tokenizer(path)
    first = Tokenizer.kept(path)
    assert Tokenizer.kept(str(path)) is first
    assert first.encode("a") == Tokenizer.open(path).encode("a")
    path.write_text(path.read_text() + "\n")
    assert Tokenizer.kept(path) is not first
    path.unlink()
    with pytest.raises(BundleError, match="tokenizer cannot be read"):
        Tokenizer.kept(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "tokenizer cannot be read"),
        ("", "tokenizer.json is not whole JSON"),
        ("{}", "version is missing"),
        ('{"version": "1.0"}', "truncation is missing"),
    ],
)
def test_no_tokenizer(tmp_path: Path, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match=named):
        Tokenizer.open(tmp_path / "tokenizer.json")


def changed(path: Path, way: Sequence[str | int], value: object) -> Path:
    """A copy of the file beside it with another value in one place; left out for ``...``."""
    content = json.loads(path.read_text())
    *above, last = way
    place = content
    for part in above:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    copy = path.with_name("changed.json")
    copy.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("way", "value", "named"),
    [
        (("truncation",), {"max_length": 77}, "truncation must be that of CLIP's"),
        (("padding",), None, "padding must be an object"),
        (("padding", "strategy"), "BatchLongest", "padding.strategy must be an object"),
        (("padding", "strategy", "Fixed"), 2, "Fixed must be a whole number of 3 or more"),
        (("padding", "strategy", "Fixed"), 1025, "Fixed must be a whole number of 1024 at most"),
        (("padding", "strategy", "Fixed"), 76, "Fixed must be the 77 tokens that the text encoder takes"),
        (("padding", "direction"), "Left", "padding.direction must be 'Right'"),
        (("padding", "pad_to_multiple_of"), 8, "padding.pad_to_multiple_of must be None"),
        (("padding", "pad_type_id"), 1, "padding.pad_type_id must be 0"),
        (("padding", "pad_id"), 3, "padding.pad_token must be a token of the vocabulary, with its number"),
        (("padding", "novelty"), 3, "padding.novelty is not a field"),
        (("normalizer",), None, "normalizer must be that of CLIP's"),
        (("normalizer", "normalizers", 1, "pattern", "Regex"), "x", "normalizer must be that of CLIP's"),
        (("pre_tokenizer", "pretokenizers", 0, "behavior"), "Isolated", "pre_tokenizer must be that of CLIP's"),
        (("decoder", "use_regex"), 1, "decoder must be that of CLIP's"),
        (("post_processor",), None, "post_processor must be an object"),
        (("post_processor", "cls"), ["<|startoftext|>", 7], "post_processor.cls must be a token"),
        (("post_processor", "sep", 1), ..., "post_processor.sep must be a token and its number"),
        (("added_tokens", 0, "content"), "x" * 1025, "content must have at most 1024 characters"),
        (("added_tokens", 0, "special"), "yes", "special must be true or false"),
        (("added_tokens", 0, "id"), -1, "id must be a whole number of 0 or more"),
        (("model", "type"), "Unigram", "model.type must be that of CLIP's"),
        (("model", "dropout"), 0.5, "model.dropout must be that of CLIP's"),
        (("model", "end_of_word_suffix"), "", "model.end_of_word_suffix must be that of CLIP's"),
        (("model", "unk_token"), "no token", "model.unk_token must be a token of the vocabulary"),
        (("model", "vocab", "a"), 1.5, "model.vocab must give each token a number"),
        (("model", "vocab", "a"), 2**24, "model.vocab must give each token a number"),
        (("model", "vocab", "a"), 0, "model.vocab must give each token a number of its own"),
        (("model", "merges"), ["a b c"], r"model.merges\[0\] must be two tokens"),
        (("model", "merges"), [["a", "b"]], r"model.merges\[0\] must be of tokens of the vocabulary"),
        (("novelty",), 1, "novelty is not a field"),
    ],
    ids=str,
)
def test_settings_that_are_not_clips_are_refused_before_the_library_sees_them(
    path: Path, monkeypatch: pytest.MonkeyPatch, way: tuple[str | int, ...], value: object, named: str
) -> None:
    import tokenizers

    monkeypatch.setattr(tokenizers, "Tokenizer", None)
    with pytest.raises(BundleError, match=named) as caught:
        Tokenizer.open(changed(path, way, value), TOKENS)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (("post_processor", "trim_offsets"), True),
        (("pre_tokenizer", "pretokenizers", 1, "trim_offsets"), False),
        (("model", "continuing_subword_prefix"), ""),
        (("model", "vocab", "ab"), 514),
        (("added_tokens", 0, "normalized"), True),
    ],
    ids=str,
)
def test_what_differs_among_clips_tokenizers_is_taken(
    path: Path, tokenizer: Tokenizer, way: tuple[str | int, ...], value: object
) -> None:
    assert Tokenizer.open(changed(path, way, value), TOKENS).encode("a b") == tokenizer.encode("a b")


@pytest.mark.parametrize("merge", ["a b", ["a", "b"]], ids=["as older files write it", "as a pair"])
def test_merges_are_taken_as_both_are_written(path: Path, merge: object) -> None:
    path = changed(changed(path, ("model", "vocab", "ab"), 514), ("model", "merges"), [merge])
    assert Tokenizer.open(path).encode("abc").ids[1] == 514


def test_a_file_larger_than_any_tokenizer_is_not_read(path: Path) -> None:
    large = path.with_name("large.json")
    large.write_text(path.read_text() + " " * LARGEST)
    with pytest.raises(BundleError, match=f"larger than the {LARGEST} bytes that are read"):
        Tokenizer.open(large)
