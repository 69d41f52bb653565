"""The tokenizer: byte pairs learned from the words of the scenes' prompts, in the files of CLIP's tokenizer."""

import json
from pathlib import Path

from scenes import Library
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 1632
"""Tokens but for start and end; the text encoder of `Width.DEMO` has room for all."""
LENGTH = 77


def make_tokenizer(library: Library, folder: Path) -> CLIPTokenizer:
    """Learns merges from every phrase of the prompts. Any other word is spelled in shorter pieces, to single bytes.

    What was learned is kept in the folder and read from there, for a model knows its tokens by their numbers.
    """
    if not (folder / "merges.txt").exists():
        _learn(library, folder)
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH, pad_token=END, unk_token=END
    )


def _learn(library: Library, folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Last letters are named, though merges alone are read: what the trainer finds by itself it numbers in the order
    # of a hash table, another one each time, and of equally frequent pairs it merges the one of lower numbers.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        special_tokens=[f"{letter}</w>" for letter in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(library.texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]
    tokens += [first + second for first, second in pairs if first + second not in tokens]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
