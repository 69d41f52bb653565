"""CLIP's real byte-pair vocabulary in the layout of a diffusers checkpoint."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from needs import clip_vocabulary

START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49408 - 2 * 256 - 2


def write_tokenizer(folder: Path, pad_token: str = END) -> Path:
    """Writes ``vocab.json``, ``merges.txt`` and settings as the published checkpoints have them."""
    source = clip_vocabulary()
    assert source is not None  # by the marker needs
    lines = gzip.decompress(source.read_bytes()).decode().split("\n")
    merges = lines[1 : 1 + _MERGES]
    characters = _byte_characters()
    names = [*characters, *(f"{character}</w>" for character in characters)]
    names += ["".join(merge.split()) for merge in merges]
    names += [START, END]
    assert len(set(names)) == 49408
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    return folder


def _byte_characters() -> list[str]:
    """How OpenAI's vocabularies write bytes: printable ones as they are, and first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]
