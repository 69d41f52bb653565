from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import toy_pictures
from PIL import Image

from hidiff_runtime import Pipeline, Settings
from hidiff_runtime.errors import InputError, StorageError
from hidiff_runtime.pipeline.image_metadata import HIDIFF, PARAMETERS, describe, encoded, save_png


def picture(**info: str) -> Image.Image:
    made = Image.fromarray(np.random.RandomState(0).randint(0, 256, (48, 64, 3)).astype(np.uint8))
    made.info.update(info)
    return made


@pytest.mark.parametrize("prompt", ["a lighthouse", "ein Leuchtturm, größer", "灯台 at dusk 🌅"])
def test_text_is_read_back_from_the_file(tmp_path: Path, prompt: str) -> None:
    made = picture(parameters=f"{prompt}\nSteps: 2", hidiff=json.dumps({"prompt": prompt}, ensure_ascii=False))
    save_png(made, tmp_path / "out.png")
    content = (tmp_path / "out.png").read_bytes()
    latin = all(ord(character) < 256 for character in prompt)
    assert (b"tEXtparameters" in content, b"iTXtparameters" in content) == (latin, not latin)
    with Image.open(tmp_path / "out.png") as read:
        assert read.info["parameters"] == f"{prompt}\nSteps: 2"
        assert json.loads(read.info["hidiff"]) == {"prompt": prompt}
        assert np.array_equal(np.asarray(read), np.asarray(made))
    assert encoded(made) == content
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_text_that_cannot_be_encoded_is_written_out() -> None:
    content = encoded(picture(**{PARAMETERS: "a\ud800", HIDIFF: '{"model": "a\ud800"}'}))
    with Image.open(io.BytesIO(content)) as read:
        read.load()
        assert read.info[PARAMETERS] == "a\\ud800"
        assert json.loads(read.info[HIDIFF]) == {"model": "a\ud800"}


def test_what_a_bundle_was_built_from_is_named_without_its_folder(tmp_path: Path) -> None:
    with Pipeline.open(toy_pictures.make(tmp_path / "bundle"), backend=toy_pictures.Backend()) as pipe:
        manifest, table = pipe.bundle.manifest, pipe.bundle.sampler("plain")
        request = pipe.request("a boat", Settings(steps=4))
    recipe = {
        "source": "/home/me/models/mine.safetensors",
        "lora": [{"path": "C:\\loras\\ink.safetensors", "scale": 0.5}],
    }
    text = describe(dataclasses.replace(manifest, recipe=recipe), table, request, 0, ("the end",))
    facts = json.loads(text[HIDIFF])
    assert (facts["model"], facts["lora"], facts["cut"]) == ("mine", [{"name": "ink", "scale": 0.5}], ["the end"])
    assert "Model: mine, " in text[PARAMETERS]
    assert "home" not in "".join(text.values())
    for lora in ("ink", ["ink"], {"path": "ink"}):  # of no recipe there is, but not the picture's end
        text = describe(dataclasses.replace(manifest, recipe={"lora": lora}), table, request, 0, ())
        assert "lora" not in json.loads(text[HIDIFF])


def test_other_text_of_a_picture_stays_out(tmp_path: Path) -> None:
    save_png(picture(Comment="private"), tmp_path / "out.PNG")
    with Image.open(tmp_path / "out.PNG") as read:
        assert read.info == {}


def test_a_name_may_be_as_long_as_can_be(tmp_path: Path) -> None:
    name = "x" * 251 + ".png"
    save_png(picture(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_names_and_places_are_refused(tmp_path: Path) -> None:
    for name in ("out.jpg", "out"):
        with pytest.raises(InputError, match="written as PNG"):
            save_png(picture(), tmp_path / name)
    with pytest.raises(StorageError, match="nothing of it was kept"):
        save_png(picture(), tmp_path / "none" / "out.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StorageError):
        save_png(picture(), tmp_path / "folder.png")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_picture_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.png").write_bytes(b"before")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError) as caught:
        save_png(picture(), tmp_path / "out.png")
    assert "No space left" in str(caught.value)
    assert (tmp_path / "out.png").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1
