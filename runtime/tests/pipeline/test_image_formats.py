"""Pictures as files of each format, with how they were made in them."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from hidiff_runtime.pipeline.image_metadata import HIDIFF, LARGEST_EXIF, PARAMETERS, FileFormat, FormatName, encoded
from hidiff_runtime.pipeline.request_values import Limits

TEXTS = {
    PARAMETERS: "a lighthouse 🗼, dusk\nSteps: 4, Seed: 3",
    HIDIFF: '{"prompt": "a lighthouse 🗼, dusk", "seed": 3}',
}
LOSSY: list[FormatName] = ["jpeg", "webp"]


def picture(texts: dict[str, str]) -> Image.Image:
    noise = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    image.info.update(texts)
    return image


def read(content: bytes) -> tuple[str | None, Image.Image, dict[int, Any]]:
    image = Image.open(io.BytesIO(content))
    return image.format, image, dict(image.getexif().get_ifd(ExifTags.IFD.Exif))


def test_a_png_file_is_the_one_that_is_written_elsewhere() -> None:
    image = picture(TEXTS)
    assert FileFormat().encode(image) == encoded(image)


@pytest.mark.parametrize("name", LOSSY)
def test_others_keep_the_texts_in_exif(name: FormatName) -> None:
    image = picture(TEXTS)
    content = FileFormat(name).encode(image)
    kind, found, exif = read(content)
    assert (kind, found.size) == (name.upper(), image.size)
    comment = exif[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == TEXTS[PARAMETERS]
    assert exif[ExifTags.Base.MakerNote].decode() == TEXTS[HIDIFF]
    assert content == FileFormat(name).encode(image)
    assert content != FileFormat(name).encode(picture({}))


@pytest.mark.parametrize("name", LOSSY)
def test_a_picture_without_texts_has_no_exif(name: FormatName) -> None:
    _, found, exif = read(FileFormat(name).encode(picture({})))
    assert not exif
    assert "exif" not in found.info


@pytest.mark.parametrize("name", LOSSY)
def test_a_lower_quality_is_a_smaller_file_that_is_less_like_the_picture(name: FormatName) -> None:
    image = picture({})
    files = [FileFormat(name, quality).encode(image) for quality in (100, 90, 50, 0)]
    errors = [np.abs(np.asarray(read(file)[1], float) - np.asarray(image, float)).mean() for file in files]
    assert [len(file) for file in files] == sorted((len(file) for file in files), reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 4 < errors[-1]


def test_a_jpeg_file_of_high_quality_keeps_the_color_of_each_pixel() -> None:
    def sampling(quality: int) -> set[tuple[int, int]]:
        found: Any = read(FileFormat("jpeg", quality).encode(picture({})))[1]
        return {(across, down) for _, across, down, _ in found.layer}

    assert sampling(90) == {(1, 1)}
    assert sampling(89) == {(2, 2), (1, 1)}


def test_a_jpeg_file_keeps_prompts_of_the_usual_limits_whatever_their_characters() -> None:
    prompts = "🗼" * 2 * Limits().prompt_characters
    texts = {PARAMETERS: prompts, HIDIFF: json.dumps({"prompts": prompts, "cut": prompts}, ensure_ascii=False)}
    _, _, exif = read(FileFormat("jpeg").encode(picture(texts)))
    assert exif[ExifTags.Base.MakerNote].decode() == texts[HIDIFF]


@pytest.mark.parametrize(("prompt", "kept"), [(12_000, {"comment", "note"}), (25_000, {"comment"}), (40_000, set())])
def test_a_jpeg_file_keeps_what_fits(prompt: int, kept: set[str]) -> None:
    texts = {PARAMETERS: "a" * prompt, HIDIFF: "b" * prompt}
    assert (2 * prompt + prompt < LARGEST_EXIF, 2 * prompt < LARGEST_EXIF) == ("note" in kept, "comment" in kept)
    _, _, exif = read(FileFormat("jpeg").encode(picture(texts)))
    tags = {ExifTags.Base.UserComment: "comment", ExifTags.Base.MakerNote: "note"}
    assert {tags[ExifTags.Base(tag)] for tag in exif} == kept
    _, _, whole = read(FileFormat("webp").encode(picture(texts)))
    assert whole[ExifTags.Base.MakerNote].decode() == texts[HIDIFF]
