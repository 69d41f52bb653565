"""Prompts as the tokens of a text encoder, by a ``tokenizer.json`` of the bundle and the `tokenizers` library."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hidiff_runtime.errors import BundleError, EngineError
from hidiff_runtime.format.integrity import State, state_of
from hidiff_runtime.format.tokenizer_file import read_tokenizer


@dataclass(frozen=True)
class Tokens:
    """What a text encoder is given.

    Args:
        ids: start, the prompt's tokens, end, and padding: as many as the text encoder has places.
        cut: the end of the prompt that had no place, as it was written; empty where all had.
    """

    ids: tuple[int, ...]
    cut: str


class Tokenizer:
    """A tokenizer that :meth:`open` opened."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        empty = tokenizer.encode("")
        self._start, self._end = empty.ids[: sum(empty.attention_mask)]
        self._places = len(empty.ids)
        if self._places < 3:
            raise ValueError("it adds no padding, so that a prompt has no place")
        self._padding = empty.ids[-1]

    @classmethod
    def open(cls, path: str | Path, places: int | None = None) -> Tokenizer:
        """Returns the tokenizer in a ``tokenizer.json`` that adds start, end and padding itself, and cuts nothing.

        Args:
            path: of the file, whose settings are compared with CLIP's before the library sees them.
            places: tokens that the text encoder takes; any number of them if left out.

        Raises:
            EngineError: the `tokenizers` library is missing.
            BundleError: the file is missing, damaged, or another kind of tokenizer.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise EngineError(
                "Prompts need the tokenizers library.",
                given=str(error),
                advice="Install it: pip install 'hidiff-runtime[pictures]'. Or give embeddings.",
            ) from error
        try:
            content = read_tokenizer(Path(path), places)
            return cls(tokenizers.Tokenizer.from_buffer(content))
        except BundleError:
            raise
        except Exception as error:  # the library raises bare Exception for any file that it does not take
            raise BundleError(
                "The bundle's tokenizer cannot be read.",
                given=f"{path}: {error}",
                advice="Fetch the bundle again, or build it again.",
            ) from error

    @staticmethod
    def kept(path: str | Path, places: int | None = None) -> Tokenizer:
        """Returns as `open`, but a file is read once as long as it stays as it is: reading CLIP's takes a while."""
        return _kept(Path(path), places, state_of(Path(path)))

    def encode(self, prompt: str) -> Tokens:
        """Returns the prompt's tokens, cut where the text encoder's places end."""
        found = self._tokenizer.encode(prompt)
        if len(found.ids) <= self._places:
            return Tokens(tuple(found.ids), "")
        kept = self._places - 1
        return Tokens((*found.ids[:kept], self._end), prompt[found.offsets[kept][0] :])

    def count(self, prompt: str) -> int:
        """Returns how many tokens the prompt has, start and end left out."""
        return int(sum(self._tokenizer.encode(prompt).attention_mask)) - 2

    def chunks(self, prompt: str) -> tuple[Tokens, ...]:
        """Returns all of the prompt, in as many rows as it takes, each with a start, an end and padding of its own."""
        found = self._tokenizer.encode(prompt)
        words = found.ids[1 : sum(found.attention_mask) - 1]
        size = self._places - 2
        pieces = [words[first : first + size] for first in range(0, max(len(words), 1), size)]
        return tuple(Tokens(self._row(piece), "") for piece in pieces)

    def _row(self, words: list[int]) -> tuple[int, ...]:
        row = (self._start, *words, self._end)
        return (*row, *[self._padding] * (self._places - len(row)))


@lru_cache(maxsize=4)
def _kept(path: Path, places: int | None, _state: State | None) -> Tokenizer:
    return Tokenizer.open(path, places)
