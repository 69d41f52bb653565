"""A bundle of two sizes draws what two bundles of one size draw, and says what it has where it lacks one."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
import toy_sizes
from PIL import Image

import hidiff_runtime
from hidiff_runtime import BundleError, InputError, Pipeline, Settings, read_parameters
from hidiff_runtime.cli import main
from hidiff_runtime.pipeline.image_metadata import save_png
from hidiff_runtime.pipeline.image_settings import settings_like
from hidiff_runtime.pipeline.request_values import Limits, read_request

KINDS = {
    "sd": toy.Toy(),
    "sdxl": toy.Toy(sdxl=True),
    "batch": toy.Toy(batch=2),
    "inpainting": toy.Toy(inpainting=True),
    "control": toy.Toy(control=True),
}
SIZES = ((toy_pictures.WIDTH, toy_pictures.HEIGHT), (toy_pictures.HEIGHT, toy_pictures.WIDTH))
PROMPT = "a lighthouse"
BACKEND = toy_pictures.Backend()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """By kind: the bundle of both sizes, and one of each alone."""
    home = tmp_path_factory.mktemp("bundles")
    found = {}
    for name, kind in KINDS.items():
        both = toy_sizes.add_turned(toy_pictures.make(home / name, kind))
        found[name] = (both, *(toy_sizes.alone(both, bucket, home / f"{name}-{bucket}") for bucket in (0, 1)))
    return found


@pytest.fixture
def pipe(folders: dict[str, tuple[Path, Path, Path]]) -> Iterator[Pipeline]:
    with Pipeline.open(folders["sd"][0], backend=toy_pictures.Backend()) as opened:
        yield opened


def given(kind: toy.Toy, size: tuple[int, int]) -> dict[str, Any]:
    """Pictures of this size where the kind needs some."""
    levels = np.random.RandomState(5).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(levels)
    found: dict[str, Any] = {}
    if kind.inpainting:
        found |= {"image": image, "mask": image.convert("L").point(lambda level: 255 * (level > 128))}
    if kind.control:
        found["control_image"] = image
    return found


def drawn(folder: Path, settings: dict[str, Any], **size: int) -> list[np.ndarray]:
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as opened:
        images = opened(PROMPT, seed=3, steps=6, sampler="noisy", **settings, **size)
        return [np.asarray(image) for image in (images if isinstance(images, list) else [images])]


@pytest.mark.parametrize("name", KINDS)
def test_pictures_are_those_of_bundles_of_one_size(folders: dict[str, tuple[Path, Path, Path]], name: str) -> None:
    both, *single = folders[name]
    for (width, height), folder in zip(SIZES, single, strict=True):
        settings = given(KINDS[name], (width, height))
        found, expected = drawn(both, settings, width=width, height=height), drawn(folder, settings)
        assert [picture.shape for picture in found] == [(height, width, 3)] * KINDS[name].batch
        assert all(map(np.array_equal, found, expected))
        # A picture of another seed is another: equality says something.
        with Pipeline.open(folder, backend=toy_pictures.Backend()) as opened:
            other = opened(PROMPT, seed=4, steps=6, sampler="noisy", **settings)
        assert not np.array_equal(np.asarray(other[0] if isinstance(other, list) else other), expected[0])


def test_requests_of_several_sizes_are_drawn_in_one_go(pipe: Pipeline) -> None:
    asked = [pipe.request(PROMPT, Settings(seed=3, steps=4, width=w, height=h)) for w, h in (*SIZES, *SIZES[::-1])]
    results = list(pipe.run(asked))
    assert [result.images[0].size for result in results] == [*SIZES, *SIZES[::-1]]
    first, second, third, fourth = (np.asarray(result.images[0]) for result in results)
    assert np.array_equal(first, fourth)
    assert np.array_equal(second, third)
    assert [json.loads(result.images[0].info["hidiff"])["width"] for result in results] == [64, 48, 48, 64]


def test_left_out_it_is_the_first_size_and_one_side_alone_is_beside_the_firsts(pipe: Pipeline) -> None:
    assert pipe(PROMPT, steps=2).size == SIZES[0]
    assert pipe.request(PROMPT, Settings(width=64)).size == SIZES[0]
    with pytest.raises(InputError, match="no such width and height") as caught:
        pipe(PROMPT, width=48)
    assert (caught.value.given, caught.value.advice) == (
        "48x48",
        "Use one that it has: 64x48, 48x64. 'hidiff-export add' adds one.",
    )


def test_one_phase_of_one_size_is_open_at_a_time(folders: dict[str, tuple[Path, Path, Path]]) -> None:
    backend = toy_pictures.Backend()
    with Pipeline.open(folders["sd"][0], backend=backend) as opened:
        other = opened.bundle.sized(*SIZES[1])
        for width, height in (*SIZES, *SIZES):
            opened(PROMPT, steps=4, width=width, height=height)
            opened.bundle.engine(opened.bundle.manifest.phases[0].phase)
            assert (len(opened.bundle.open_phases), other.open_phases) == (1, ())
        assert [bundle.manifest.width for bundle in opened.bundle.buckets] == [64, 48]
    held = most = 0
    for event in backend.events:
        held += 1 if event.startswith("open") else -1
        most = max(most, held)
    assert (held, most) == (0, 2)  # beside the first phase there may be a text encoder or the VAE
    assert len(backend.events) > 40


def test_a_picture_is_drawn_again_at_its_own_size(pipe: Pipeline, tmp_path: Path) -> None:
    expected = pipe(PROMPT, seed=8, steps=4, width=48, height=64)
    save_png(expected, tmp_path / "picture.png")
    like = settings_like(pipe.bundle, read_parameters(tmp_path / "picture.png"))
    assert like.warnings == ()
    assert np.array_equal(np.asarray(pipe(like.prompt, **like.settings)), np.asarray(expected))
    turned = settings_like(pipe.bundle, read_parameters(tmp_path / "picture.png"), {"width": 64, "height": 48})
    assert turned.warnings == ("the picture is 48x64, this bundle draws 64x48",)


def test_values_from_outside_have_a_size_and_pictures_are_fitted_to_it(pipe: Pipeline) -> None:
    content = io.BytesIO()
    Image.new("RGB", (96, 128), (200, 30, 30)).save(content, "PNG")
    values = {"prompt": PROMPT, "steps": 4, "width": 48, "height": 64, "image": content.getvalue(), "resize": True}
    request = read_request(pipe, values, Limits())
    assert (request.size, request.settings.image.size) == ((48, 64), (48, 64))
    with pytest.raises(InputError, match="width must be a whole number"):
        read_request(pipe, {"prompt": PROMPT, "width": "48"}, Limits())


def test_commands_take_a_size_and_files_of_prompts_a_column_for_each_side(
    folders: dict[str, tuple[Path, Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = hidiff_runtime.bundle.open
    monkeypatch.setattr(
        hidiff_runtime.bundle, "open", lambda folder, **options: real(folder, **{**options, "backend": BACKEND})
    )
    folder = str(folders["sd"][0])
    plain = ["generate", folder, "--steps", "2", "-o"]
    assert main([*plain, str(tmp_path / "a.png"), "-p", PROMPT, "--size", "48x64"]) == 0
    assert size_of(tmp_path / "a.png") == (48, 64)
    (tmp_path / "prompts.csv").write_text("prompt,width,height\na boat,48,64\na tree,,\n")
    assert main([*plain, f"{tmp_path}/out/", "--prompts", str(tmp_path / "prompts.csv")]) == 0
    sizes = [size_of(path) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert sizes == [(48, 64), (64, 48)]
    capsys.readouterr()
    assert main([*plain, str(tmp_path / "b.png"), "-p", PROMPT, "--size", "32x32"]) == 2
    assert "64x48, 48x64" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_a_size_that_is_taken_out_of_an_open_bundle_is_missed_by_its_file_and_no_other_is(
    folders: dict[str, tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    both, first, _ = folders["sd"]
    folder = Path(shutil.copytree(both, tmp_path / "bundle"))
    (width, height), (other_width, other_height) = SIZES
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as opened:
        before = np.asarray(opened(PROMPT, seed=3, steps=6, width=width, height=height))
        folder.rename(tmp_path / "old")
        shutil.copytree(first, folder, ignore=shutil.ignore_patterns("*-turned*"))
        assert np.array_equal(before, np.asarray(opened(PROMPT, seed=3, steps=6, width=width, height=height)))
        with pytest.raises(BundleError, match=r"unet/strided_pooled-turned\.toy is missing"):
            opened(PROMPT, seed=3, steps=6, width=other_width, height=other_height)
        assert opened.bundle.lost_files()
