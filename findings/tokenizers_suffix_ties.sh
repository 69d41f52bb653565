#!/usr/bin/env bash
# Training a CLIP-like tokenizer twice on the same words gives two tokenizers, whose numbers mean different pieces.
#
# The guess: byte-pair training is arithmetic on counts; the same words, trainer and library version give the same merges.
# Without an end-of-word suffix they do.
# What happens: with the suffix that CLIP's tokenizer has ("</w>"), the last letters become tokens in the order of a hash
# table, another one in each trainer, and ties between equally frequent pairs go to the lower numbers. So ids and merges
# differ from run to run, also with one thread. A model trained with one of them, and run with the other, reads some words
# as others, and nothing complains: sizes and names of files are the same.
# What helps: give the last letters as special_tokens of the trainer, so that their numbers are settled; and keep the files.
# Versions: tokenizers 0.23.3.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3 > "$folder/pip.log" 2>&1 \
  || { cat "$folder/pip.log"; exit 1; }

cat > "$folder/look.py" <<'PYTHON'
import hashlib
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WORDS = ["boat", "book", "boot", "ant", "and", "sea", "set", "ears", "eyes", "keys", "rays", "lid", "lip", "milk", "mild"]
LETTERS = sorted(set("".join(WORDS)))
TRIES = 20


def trained(suffix, named):
    """The hash of what one trainer learns."""
    ending = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**ending))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [letter + suffix for letter in LETTERS] if named else []
    trainer = trainers.BpeTrainer(
        vocab_size=60, initial_alphabet=LETTERS, special_tokens=special, show_progress=False, **ending
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:8]


print("tokenizers", tokenizers.__version__)
plain, suffixed, settled = (
    {trained(suffix, named) for _ in range(TRIES)} for suffix, named in (("", False), ("</w>", False), ("</w>", True))
)
print(f"different tokenizers in {TRIES} trainings: no suffix {len(plain)}, suffix {len(suffixed)}, named {len(settled)}")
seen = len(plain) == len(settled) == 1 < len(suffixed)
print("output seen: the same but for the suffix, and the same again with last letters named:", seen)
sys.exit(not seen)
PYTHON
RAYON_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/look.py"
