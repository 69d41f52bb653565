"""The tokenizer of a text encoder as one ``tokenizer.json``, which the `tokenizers` library reads without transformers.

transformers' own ``CLIPTokenizer`` is such a tokenizer inside; what is written here is that one, with the padding that
pipelines ask for built in. Cutting is left out: whoever cuts wants to know what.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from hidiff_export.checkpoints.checkpoint_file import refuse_lfs_pointer
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.sources import find_tokenizer, is_single_file
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.families.graph_io import PROMPT_TOKENS
from hidiff_export.recipe.field_types import random_seed

START = "<|startoftext|>"
END = "<|endoftext|>"
_FIRST = "!"
"""The first token of every CLIP vocabulary, which OpenCLIP's encoders are padded with: its number is 0."""

_FOLDERS = {Component.TEXT_ENCODER: "tokenizer", Component.TEXT_ENCODER_2: "tokenizer_2"}


def tokenizer_json(source: str, component: Component, family: Family, width: Width) -> str:
    """Returns the content of a ``tokenizer.json``: a prompt becomes start, tokens, end, and padding up to 77.

    Args:
        source: of the checkpoint, as `hidiff_export.checkpoints.load.load` takes it. A folder's or the hub's tokenizer
            is taken with its own settings; a single file gets CLIP's, from the hub or its cache, and the family's
            padding; a fabricated checkpoint gets one token for each byte, and no merges.
        component: the text encoder.
        family: decides what to pad with where the source does not say.
        width: of the text encoder, whose vocabulary has to hold every token.

    Raises:
        CheckpointError: there is no tokenizer, it is damaged, or has more tokens than the text encoder.
        StorageError: when a download cannot be written.
    """
    from transformers import CLIPTokenizer

    tokens: int = component.config(family, Task.TEXT_TO_IMAGE, width)["vocab_size"]
    if random_seed(source) is not None:
        tokenizer: Any = CLIPTokenizer(vocab=_byte_vocabulary(tokens), merges=[], pad_token=_padding(component, family))
    else:
        tokenizer = _read(source, component, family)
    backend, last = tokenizer.backend_tokenizer, max(tokenizer.get_vocab().values())
    if last >= tokens:
        raise CheckpointError(
            "The tokenizer has tokens that the text encoder does not know.",
            given=f"token {last}, and {tokens} embeddings",
            advice="Give a checkpoint without added tokens: textual inversions are not taken.",
        )
    backend.no_truncation()
    backend.enable_padding(length=PROMPT_TOKENS, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return str(backend.to_str(pretty=False))


def _read(source: str, component: Component, family: Family) -> Any:
    from transformers import CLIPTokenizer

    files = find_tokenizer(source, _FOLDERS[component])
    for path in files.values():
        refuse_lfs_pointer(path)
    own = {"pad_token": _padding(component, family)} if is_single_file(source) else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            shutil.copyfile(path, Path(folder, name))
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **own)
        except Exception as error:  # the library raises bare Exception for a file that it cannot parse
            raise CheckpointError(
                "The checkpoint's tokenizer cannot be read.",
                given=f"{', '.join(map(str, files.values()))}: {error}",
                advice="Take these files from where the checkpoint or its base model was published.",
            ) from error
    _check_settings(tokenizer, source, component)
    return tokenizer


def _check_settings(tokenizer: Any, source: str, component: Component) -> None:
    """Refuses what diffusers obeys and a bundle's tokenizer does not do: fewer tokens, and work from the left.

    A length above the text encoder's, as files without one come to, is no setting: its positions end at 77.
    """
    given = []
    if tokenizer.model_max_length < PROMPT_TOKENS:
        given.append(f"model_max_length {tokenizer.model_max_length}, expected {PROMPT_TOKENS}")
    for side in ("padding_side", "truncation_side"):
        if getattr(tokenizer, side) != "right":
            given.append(f"{side} {getattr(tokenizer, side)}, expected right")
    if given:
        raise CheckpointError(
            f"The settings of the {_FOLDERS[component]} are not CLIP's.",
            given=f"{source}: {'; '.join(given)}",
            advice="Take the tokenizer_config.json that the family's base model was published with.",
        )


def _padding(component: Component, family: Family) -> str:
    """Returns what the published tokenizers pad with: CLIP's with the end, OpenCLIP's with their first token."""
    return _FIRST if component is Component.TEXT_ENCODER_2 or family is Family.SD21 else END


def _byte_vocabulary(tokens: int) -> dict[str, int]:
    """Returns a vocabulary of the given size: 256 bytes inside a word, 256 at its end, start and end of a prompt.

    The first 512 and the last two are those of CLIP's own vocabulary. What would be merges in between is never made.
    """
    bytes_ = sorted(ByteLevel.alphabet())
    unmade = [f"<|{number}|>" for number in range(2 * len(bytes_), tokens - 2)]
    names = [*bytes_, *(f"{character}</w>" for character in bytes_), *unmade, START, END]
    return {name: number for number, name in enumerate(names)}
