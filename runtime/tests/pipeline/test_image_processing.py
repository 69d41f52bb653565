from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hidiff_runtime.errors import EngineError, InputError
from hidiff_runtime.pipeline.image_processing import (
    control_array,
    decode_picture,
    fitted_pictures,
    from_bytes,
    image_array,
    latent_mask,
    mask_array,
    pillow,
    read_picture,
    to_pictures,
)

SIZE = (16, 8)


def noise(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    colours = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(colours)


def fitted(images: object, size: tuple[int, int] = SIZE, **options: Any) -> list[Image.Image]:
    return fitted_pictures(images, size, "image", **options)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("resize", [False, True])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int], resize: bool) -> None:
    with pytest.raises(InputError, match="has no pixels") as caught:
        fitted(Image.new("RGB", size), (64, 48), resize=resize)
    assert caught.value.given == f"{size[0]}x{size[1]}"


def test_a_picture_is_read_without_its_files_texts_unless_they_are_wanted() -> None:
    content, texts = io.BytesIO(), PngInfo()
    texts.add_text("comment", "a" * 500_000, zip=True)
    picture = Image.new("P", (4, 4))
    picture.save(content, "PNG", pnginfo=texts, transparency=0)
    assert decode_picture(content.getvalue(), texts=True).info["comment"] == "a" * 500_000
    found = decode_picture(content.getvalue())
    assert found.info == {"transparency": 0}
    assert found.has_transparency_data


def test_colours_become_numbers_and_back() -> None:
    picture = noise()
    seen, control = image_array([picture]), control_array([picture])
    assert seen.shape == control.shape == (1, 3, 8, 16)
    assert seen.dtype == control.dtype == np.float32
    red = np.asarray(picture)[2, 5, 0]
    np.testing.assert_allclose(control[0, 0, 2, 5], red / 255, rtol=1e-6)
    np.testing.assert_allclose(seen, control * 2 - 1, atol=1e-6)
    (back,) = to_pictures(seen)
    assert np.array_equal(np.asarray(back), np.asarray(picture))


def test_what_is_beyond_black_and_white_is_clipped() -> None:
    beyond = np.array([-3, -1, 0, 1, 7], np.float32).reshape(1, 1, 1, 5).repeat(3, axis=1)
    assert np.asarray(to_pictures(beyond)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_grey_and_opaque_pictures_are_taken_as_rgb() -> None:
    grey = noise().convert("L")
    assert np.array_equal(image_array(fitted(grey)), image_array([grey.convert("RGB")]))
    opaque = noise().convert("RGBA")
    assert np.array_equal(image_array(fitted(opaque)), image_array([noise()]))


def test_a_mask_is_black_or_white() -> None:
    levels = np.array([[0, 127, 128, 255] * 4] * 8, np.uint8)
    mask = mask_array([Image.fromarray(levels)])
    assert mask.shape == (1, 1, 8, 16)
    assert mask[0, 0, 0, :4].tolist() == [0, 0, 1, 1]
    assert latent_mask(mask, (4, 1, 2)).tolist() == [[[[0, 0]]]]
    assert latent_mask(1 - mask, (4, 2, 4))[0, 0].tolist() == (1 - mask)[0, 0, ::4, ::4].tolist()


def test_one_picture_or_one_for_each_of_the_batch() -> None:
    two = [noise(seed=1), noise(seed=2)]
    assert image_array(fitted(two, batch=2)).shape[0] == 2
    assert image_array(fitted(two[0], batch=2)).shape[0] == 1
    for wrong in ([], two, [*two, *two]):
        with pytest.raises(InputError, match="one for each of the batch"):
            fitted(wrong, batch=3)


def test_another_size_is_resized_only_where_that_is_asked_for() -> None:
    with pytest.raises(InputError) as caught:
        fitted(noise((8, 8)))
    assert "8x8, the bundle is for 16x8" in str(caught.value)
    assert "--resize" in caught.value.advice
    expected = noise((8, 8)).resize(SIZE, Image.Resampling.LANCZOS)
    assert np.array_equal(image_array(fitted(noise((8, 8)), resize=True)), image_array([expected]))


@pytest.mark.parametrize("mode", ["P", "CMYK", "I;16", "LA", "1", "F"])
def test_other_modes_are_refused_by_name(mode: str) -> None:
    with pytest.raises(InputError) as caught:
        fitted(Image.new(mode, SIZE))
    assert caught.value.given == f"mode {mode}"


def test_transparency_is_refused() -> None:
    picture = noise().convert("RGBA")
    picture.putpixel((3, 3), (1, 2, 3, 254))
    with pytest.raises(InputError, match="transparent"):
        fitted(picture)


def test_what_is_no_picture_is_refused() -> None:
    for wrong in ("photo.png", 3, np.zeros((8, 16, 3), np.uint8), [None]):
        with pytest.raises(InputError, match="must be a Pillow image"):
            fitted(wrong)


def written(path: Path, picture: Image.Image | None = None, form: str = "PNG") -> Path:
    (picture or noise((64, 64))).save(path, form)
    return path


def test_files_are_read_whole_and_turned_as_they_say(tmp_path: Path) -> None:
    picture = noise((64, 48))
    assert np.array_equal(np.asarray(read_picture(written(tmp_path / "a.png", picture))), np.asarray(picture))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (48, 64)
    assert read_picture(written(tmp_path / "a.webp", form="WEBP")).size == (64, 64)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.png").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    jpeg = written(tmp_path / "whole.jpg", form="JPEG").read_bytes()
    broken = {
        "short.png": whole[: len(whole) // 2],
        "flipped.png": bytes(flipped),
        "header.png": whole[:20],
        "short.jpg": jpeg[: len(jpeg) // 2],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_picture(tmp_path / name, "mask")
        assert name in str(caught.value)
        assert "mask" in caught.value.summary


@pytest.mark.parametrize("content", [b"", b"text", b"GIF89a" + b"\0" * 40, b"%PDF-1.7"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(InputError, match="no picture that can be read"):
        read_picture(tmp_path / "file.png")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path, "nul\0.png"):
        with pytest.raises(InputError, match="cannot be read"):
            read_picture(path)


def png_of(width: int, height: int) -> bytes:
    """A small file that claims to be a picture of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000], ids=["warned of", "refused"])
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(side, side))
    with pytest.raises(InputError, match="too large to be opened safely"):
        read_picture(tmp_path / "bomb.png")


def test_a_picture_that_was_not_loaded_yet_and_is_cut_short() -> None:
    content = io.BytesIO()
    noise((64, 64)).save(content, "PNG")
    lazy = Image.open(io.BytesIO(content.getvalue()[:3000]))
    with pytest.raises(InputError, match="broken or cut short"):
        fitted(lazy, (64, 64))


def test_bytes_become_pictures() -> None:
    colours = np.random.RandomState(0).randint(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in from_bytes(colours)]), colours)
    assert from_bytes(colours)[0].size == (6, 4)


def test_without_pillow_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(EngineError) as caught:
        pillow()
    assert "pip install 'hidiff-runtime[pictures]'" in caught.value.advice
