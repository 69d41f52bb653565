"""Prompts as tokens, by a tokenizer of single letters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_pictures
from toy_pictures import TOKENS

from hidiff_runtime.errors import BundleError
from hidiff_runtime.text.tokenizer import Tokenizer

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
def test_the_cut_is_found_behind_characters_of_many_bytes_and_normalisation(tokenizer: Tokenizer, before: str) -> None:
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


@pytest.mark.parametrize("content", [None, "", "{}", '{"version": "1.0"}'])
def test_no_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match="tokenizer cannot be read"):
        Tokenizer.open(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_adds_no_start_is_refused(tmp_path: Path) -> None:
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match="tokenizer cannot be read"):
        Tokenizer.open(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_adds_no_padding_is_refused(tmp_path: Path) -> None:
    toy_pictures.tokenizer(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "padding": None}))
    with pytest.raises(BundleError, match="tokenizer cannot be read"):
        Tokenizer.open(tmp_path / "tokenizer.json")
