"""Token ids of the runtime's tokenizer against transformers' own, with CLIP's real vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import CLIPTokenizer

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.tokenizer import tokenizer_json
from hidiff_export.families.family import Family, Width
from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.tokenizer import Tokenizer
from tests.clip_vocabulary import END, write_tokenizer
from tests.prompts import prompts

pytestmark = pytest.mark.needs("clip-vocabulary")
PROMPTS = prompts()


class Both:
    """A checkpoint's tokenizer as transformers reads it, and as the runtime does."""

    def __init__(self, folder: Path, pad_token: str) -> None:
        component = Component.TEXT_ENCODER if pad_token == END else Component.TEXT_ENCODER_2
        name = "tokenizer" if pad_token == END else "tokenizer_2"
        write_tokenizer(folder / name, pad_token)
        self.theirs = CLIPTokenizer.from_pretrained(folder / name)
        self.file = folder / "tokenizer.json"
        self.content = tokenizer_json(str(folder), component, Family.SDXL, Width.FULL)
        self.file.write_text(self.content, encoding="utf-8")
        self.ours = Tokenizer.open(self.file)

    @cached_property
    def wanted(self) -> list[tuple[int, ...]]:
        """As the pipelines ask for them."""
        found = self.theirs(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids
        return [tuple(ids) for ids in found]

    @cached_property
    def whole(self) -> list[list[int]]:
        """With nothing cut off, and no padding."""
        found: list[list[int]] = self.theirs(PROMPTS, truncation=False).input_ids
        return found


@pytest.fixture(scope="module", params=[END, "!"], ids=["padded with the end", "padded with !"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("tokenizers"), request.param)


def test_there_are_a_thousand_prompts_of_every_length() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 1000
    lengths = [len(prompt) for prompt in PROMPTS]
    assert min(lengths) == 0
    assert max(lengths) >= 500


def test_every_prompt_has_the_same_ids(both: Both) -> None:
    different = [p for p, ids in zip(PROMPTS, both.wanted, strict=True) if both.ours.encode(p).ids != ids]
    assert different == []


def test_what_was_cut_is_quoted(both: Both) -> None:
    """Its tokens are those that transformers leaves out, and those of a character that was cut in two."""
    cut = 0
    for prompt, ids in zip(PROMPTS, both.whole, strict=True):
        found = both.ours.encode(prompt).cut
        assert bool(found) is (len(ids) > 77)
        assert prompt.endswith(found)
        if found and prompt[-len(found) - 1] == " ":
            tokens, left = both.theirs(found).input_ids[1:-1], ids[76:-1]
            assert tokens[-len(left) :] == left
            assert len(tokens) - len(left) < 4
            cut += 1
    assert cut > 50


def test_chunks_hold_all_tokens(both: Both) -> None:
    for prompt, ids in zip(PROMPTS, both.whole, strict=True):
        rows = [tokens.ids for tokens in both.ours.chunks(prompt)]
        assert len(rows) == max(1, -(-(len(ids) - 2) // 75))
        joined = [id for row in rows for id in row[1:76]]
        assert joined[: len(ids) - 2] == ids[1:-1]


def test_a_single_file_gets_the_familys_padding(both: Both, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With CLIP's tokenizer from the hub's cache."""
    folder = write_tokenizer(tmp_path)

    def cached(_repository: str, name: str, *, local_files_only: bool) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert local_files_only  # the cache is asked first
        if not (folder / name).is_file():
            raise LocalEntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    component = Component.TEXT_ENCODER if both.theirs.pad_token == END else Component.TEXT_ENCODER_2
    found = tokenizer_json("somewhere/model.safetensors", component, Family.SDXL, Width.FULL)
    assert json.loads(found) == json.loads(both.content)


def _without(kind: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        steps = content["normalizer"]["normalizers"]
        steps[:] = [step for step in steps if step["type"] != kind]

    return change


def _numbers_whole(content: dict[str, Any]) -> None:
    (split, _) = content["pre_tokenizer"]["pretokenizers"]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"[\p{N}]", r"[\p{N}]+")


def _no_contractions(content: dict[str, Any]) -> None:
    (split, _) = content["pre_tokenizer"]["pretokenizers"]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace("'s|'t|'re|'ve|'m|'ll|'d|", "")


def _other_padding(content: dict[str, Any]) -> None:
    content["padding"]["pad_id"] = 320


def _one_merge_less(content: dict[str, Any]) -> None:
    del content["model"]["merges"][0]


@pytest.mark.parametrize("both", [END], ids=["padded with the end"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [_without("NFC"), _without("Lowercase"), _numbers_whole, _no_contractions, _other_padding, _one_merge_less],
    ids=["no NFC", "case kept", "numbers whole", "no contractions", "padding", "a merge less"],
)
def test_the_prompts_tell_another_tokenizer_apart(
    both: Both, change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    content = json.loads(both.content)
    change(content)
    changed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    assert any(changed.encode(p).ids != ids for p, ids in zip(PROMPTS, both.wanted, strict=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if change is not _one_merge_less:  # which another checkpoint's vocabulary may be
        with pytest.raises(BundleError, match=r"tokenizer\.json: "):
            Tokenizer.open(tmp_path / "tokenizer.json")
