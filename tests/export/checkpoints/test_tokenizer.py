"""The tokenizer of a checkpoint as one file: from every kind of source, or a reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.tokenizer import END, START, tokenizer_json
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Width
from hidiff_runtime.format.tokenizer import Tokenizer

CASES = [
    (Family.SD15, Component.TEXT_ENCODER, "end"),
    (Family.SD21, Component.TEXT_ENCODER, "zero"),
    (Family.SDXL, Component.TEXT_ENCODER, "end"),
    (Family.SDXL, Component.TEXT_ENCODER_2, "zero"),
]


def opened(content: str, folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    return Tokenizer.open(folder / "tokenizer.json")


@pytest.mark.parametrize(("family", "component", "padding"), CASES)
@pytest.mark.parametrize(("width", "start"), [(Width.TINY, 512), (Width.FULL, 49406)])
def test_a_fabricated_one(
    tmp_path: Path, family: Family, component: Component, padding: str, width: Width, start: int
) -> None:
    content = tokenizer_json("random:0", component, family, width)
    assert content == tokenizer_json("random:1", component, family, width)
    found = opened(content, tmp_path).encode("a Cat")
    pad = start + 1 if padding == "end" else 0
    # CLIP's own numbers of these letters: inside a word as they come, 256 further at its end.
    assert found.ids == (start, 64 + 256, 66, 64, 83 + 256, start + 1, *[pad] * 71)


def folder_of(base: Path, name: str = "tokenizer", **settings: Any) -> Path:
    """A tokenizer of four tokens as the published ones lie there."""
    folder = base / name
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({"!": 0, "a</w>": 1, START: 2, END: 3}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **settings}))
    return base


@pytest.mark.parametrize(("settings", "pad"), [({}, 3), ({"pad_token": "!"}, 0), ({"pad_token": END}, 3)])
def test_a_folder_keeps_its_own_padding(tmp_path: Path, settings: dict[str, str], pad: int) -> None:
    source = str(folder_of(tmp_path, **settings))
    found = opened(tokenizer_json(source, Component.TEXT_ENCODER, Family.SDXL, Width.TINY), tmp_path)
    assert found.encode("a a").ids == (2, 1, 1, 3, *[pad] * 73)


@pytest.mark.parametrize("length", [77, 512, int(1e30)])
def test_a_length_that_ends_with_the_text_encoders_is_none(tmp_path: Path, length: int) -> None:
    source = str(folder_of(tmp_path, model_max_length=length))
    content = tokenizer_json(source, Component.TEXT_ENCODER, Family.SDXL, Width.TINY)
    assert len(opened(content, tmp_path).encode("a a").ids) == 77


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_max_length": 64}, "model_max_length 64, expected 77"),
        ({"padding_side": "left"}, "padding_side left, expected right"),
        ({"truncation_side": "left"}, "truncation_side left, expected right"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_settings_that_a_bundle_does_not_obey_are_refused(
    tmp_path: Path, settings: dict[str, Any], told: str, name: str
) -> None:
    source = str(folder_of(tmp_path, name, **settings))
    component = Component.TEXT_ENCODER if name == "tokenizer" else Component.TEXT_ENCODER_2
    with pytest.raises(CheckpointError, match=f"settings of the {name} are not CLIP's") as caught:
        tokenizer_json(source, component, Family.SDXL, Width.TINY)
    assert told in str(caught.value)
    assert "tokenizer_config.json" in caught.value.advice


def test_a_folder_with_a_whole_tokenizer(tmp_path: Path) -> None:
    source = folder_of(tmp_path)
    asked = (str(source), Component.TEXT_ENCODER, Family.SD15, Width.TINY)
    content = tokenizer_json(*asked)
    for name in ("vocab.json", "merges.txt"):
        (source / "tokenizer" / name).unlink()
    (source / "tokenizer" / "tokenizer.json").write_text(content, encoding="utf-8")
    assert json.loads(tokenizer_json(*asked)) == json.loads(content)


def test_the_second_one_is_in_a_folder_of_its_own(tmp_path: Path) -> None:
    source = str(folder_of(tmp_path, "tokenizer_2"))
    assert tokenizer_json(source, Component.TEXT_ENCODER_2, Family.SDXL, Width.TINY)
    with pytest.raises(CheckpointError, match="no tokenizer in this checkpoint"):
        tokenizer_json(source, Component.TEXT_ENCODER, Family.SDXL, Width.TINY)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_one_is_told(tmp_path: Path, content: str) -> None:
    source = folder_of(tmp_path)
    (source / "tokenizer" / "vocab.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizer_json(str(source), Component.TEXT_ENCODER, Family.SD15, Width.TINY)


def test_tokens_that_the_text_encoder_does_not_know_are_told(tmp_path: Path) -> None:
    source = folder_of(tmp_path)
    vocabulary = {"!": 0, START: 1, END: 2, "a</w>": 514}
    (source / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match="does not know"):
        tokenizer_json(str(source), Component.TEXT_ENCODER, Family.SD15, Width.TINY)


@pytest.mark.parametrize("source", ["somewhere/model.safetensors", "org/name"])
def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    asked: list[str] = []

    def unreachable(repository: str, name: str, *, local_files_only: bool) -> NoReturn:  # noqa: ARG001 - the hub's
        asked.append(repository)
        raise LocalEntryNotFoundError(name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(CheckpointError, match="hub cannot be reached") as caught:
        tokenizer_json(source, Component.TEXT_ENCODER, Family.SD15, Width.FULL)
    assert set(asked) == {"org/name" if "." not in source else "openai/clip-vit-large-patch14"}
    assert "text: false" in caught.value.advice


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_git_lfs_pointer_is_told(tmp_path: Path, name: str) -> None:
    source = folder_of(tmp_path)
    (source / "tokenizer" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer") as caught:
        tokenizer_json(str(source), Component.TEXT_ENCODER, Family.SDXL, Width.TINY)
    assert name in str(caught.value)
    assert "git lfs pull" in caught.value.advice
