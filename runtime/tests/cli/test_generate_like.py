"""``generate --like``: our pictures to the same pixels, options that win, and what is warned of and refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
import web_ui
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hidiff_runtime import bundle as bundle_module
from hidiff_runtime import cli
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.safetensors import write

Run = Callable[..., int]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bundles")
    kinds = {
        "sd": toy.Toy(),
        "sdxl": toy.Toy(sdxl=True),
        "batch": toy.Toy(batch=2),
        "control": toy.Toy(control=True),
        "unguided": toy.Toy(guidance=False),
    }
    made = {name: toy_pictures.add_samplers(toy_pictures.make(home / name, kind)) for name, kind in kinds.items()}
    made["chunks"] = toy_pictures.make(home / "chunks", chunks=2)
    other = toy_pictures.add_samplers(toy_pictures.make(home / "other"), source="org/other")
    stored = toy.stored_weights(toy.Toy())
    write(other / "unet/weights.safetensors", {name: array * 2 for name, array in stored.items()})
    toy.seal(other)
    made["rescaled"] = toy_pictures.make(home / "rescaled")
    toy.seal(made["rescaled"], dataclasses.replace(Manifest.read(made["rescaled"]), guidance_rescale=0.7))
    return {**made, "other": other}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    size = (toy_pictures.HEIGHT, toy_pictures.WIDTH, 3)
    Image.fromarray(np.random.RandomState(0).randint(0, 256, size).astype(np.uint8)).save("image.png")
    Image.new("L", size[1::-1], 255).save("mask.png")
    return tmp_path


@pytest.fixture
def generate(folders: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch) -> Run:  # noqa: ARG001 - made ready
    real = bundle_module.open

    def opened(folder: Path, *, backend: str | None, **options: Any) -> Bundle:
        assert backend is None
        return real(folder, backend=toy_pictures.Backend(), **options)

    monkeypatch.setattr(bundle_module, "open", opened)

    def run(*arguments: str, bundle: str = "sd") -> int:
        return cli.main(["generate", str(folders[bundle]), *arguments])

    return run


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def facts(path: str) -> dict[str, Any]:
    with Image.open(path) as picture:
        return dict(json.loads(picture.info["hidiff"]))


EXACT: dict[str, tuple[str, list[str], list[str]]] = {
    "everything": (
        "sd",
        ["-n", "fog", "--steps", "5", "--sampler", "dpmpp_2m_karras", "--guidance", "3", "--clip-skip", "2"],
        [],
    ),
    "an image": ("sd", ["--steps", "6", "--strength", "0.6", "--sampler", "noisy"], ["--image", "image.png"]),
    "a mask": ("sd", ["--steps", "6", "--strength", "0.8"], ["--image", "image.png", "--mask", "mask.png"]),
    "sizes": ("sdxl", ["--steps", "3", "--original-size", "200x100", "--crop", "4,3", "--target-size", "60x50"], []),
    "sizes with an image": ("sdxl", ["--steps", "8", "--crop", "4,3"], ["--image", "image.png"]),
    "an empty negative prompt": ("sdxl", ["--steps", "3", "-n", ""], []),
    "a control image": ("control", ["--steps", "3", "--conditioning-scale", "0.5"], ["--control", "image.png"]),
    "eta": ("sd", ["--steps", "3", "--sampler", "ddim", "--eta", "0.5"], []),
    "no guidance": ("unguided", ["--steps", "3"], []),
    "chunks": ("chunks", ["--steps", "3", "--long-prompt", "chunk"], []),
}


@pytest.mark.parametrize("case", EXACT)
def test_our_own_picture_is_drawn_again_to_the_same_pixels(
    generate: Run, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    bundle, options, pictures = EXACT[case]
    prompt = "a boat\nNegative prompt: x\nSteps: 1, Sampler: y, Seed: 2"  # nothing of it is taken for settings
    assert generate("-p", prompt, "--seed", "7", *options, *pictures, "-o", "first.png", bundle=bundle) == 0
    capsys.readouterr()
    assert generate("--like", "first.png", *pictures, "-o", "again.png", bundle=bundle) == 0
    assert "warning" not in capsys.readouterr().err
    assert np.array_equal(pixels("first.png"), pixels("again.png"))
    assert facts("first.png") == facts("again.png")
    assert generate("--like", "first.png", *pictures, "--seed", "8", "-o", "other.png", bundle=bundle) == 0
    assert not np.array_equal(pixels("first.png"), pixels("other.png"))


def test_a_picture_without_guidance_is_drawn_without_where_there_is_some(generate: Run) -> None:
    """A bundle's own guidance would make it another."""
    assert generate("-p", "a boat", "--seed", "7", "--steps", "3", "-o", "first.png", bundle="unguided") == 0
    assert "guidance_scale" not in facts("first.png")
    assert generate("--like", "first.png", "-o", "again.png") == 0
    assert facts("again.png")["guidance_scale"] == 1.0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("rescale", "bundle"), [("0.7", "sd"), ("0", "rescaled")])
def test_a_pictures_rescale_is_drawn_again_whatever_the_bundles_own_is(
    generate: Run, capsys: pytest.CaptureFixture[str], rescale: str, bundle: str, *, exact: bool
) -> None:
    assert generate("-p", "a boat", "--steps", "3", "--guidance-rescale", rescale, "-o", "a.png", bundle=bundle) == 0
    if not exact:
        with Image.open("a.png") as picture:
            chunks = PngInfo()
            chunks.add_text("parameters", picture.info["parameters"])
            picture.save("a.png", pnginfo=chunks)
    assert generate("--like", "a.png", "-o", "again.png", bundle=bundle) == 0
    assert facts("again.png").get("guidance_rescale", 0) == float(rescale)
    assert generate("--like", "a.png", "--guidance-rescale", "0.5", "-o", "other.png", bundle=bundle) == 0
    assert facts("other.png")["guidance_rescale"] == 0.5
    capsys.readouterr()
    assert generate("--like", "a.png", "-o", "unguided.png", bundle="unguided") == 0
    assert "left out, as this bundle was built without guidance" in capsys.readouterr().err


def test_options_win_and_the_rest_is_the_pictures(generate: Run) -> None:
    run = ["-p", "a boat", "-n", "fog", "--seed", "7", "--steps", "5", "--sampler", "noisy", "--clip-skip", "2"]
    assert generate(*run, "--guidance", "3", "-o", "first.png") == 0
    changed = ["-p", "a tree", "--seed", "0", "--clip-skip", "0", "--sampler", "euler"]
    assert generate("--like", "first.png", *changed, "-o", "other.png") == 0
    found = facts("other.png")
    wanted = {"prompt": "a tree", "seed": 0, "sampler": "euler", "steps": 5, "guidance_scale": 3.0}
    assert {name: found[name] for name in wanted} == wanted
    assert found["negative_prompt"] == "fog"
    assert "clip_skip" not in found


def test_prompts_of_a_file_take_a_pictures_settings(generate: Run, work: Path) -> None:
    assert generate("-p", "a boat", "--seed", "7", "--steps", "5", "-o", "first.png") == 0
    (work / "prompts.txt").write_text('a tree\n{"prompt": "a cat", "seed": 1}\n')
    assert generate("--like", "first.png", "--prompts", "prompts.txt", "-o", "made/") == 0
    found = [facts(f"made/00{index}.png") for index in (0, 1)]
    assert [(each["prompt"], each["seed"], each["steps"]) for each in found] == [("a tree", 7, 5), ("a cat", 1, 5)]


def test_a_picture_without_its_exact_text_is_drawn_from_the_other(
    generate: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [
        "-p",
        "a boat",
        "-n",
        "fog",
        "--seed",
        "7",
        "--steps",
        "5",
        "--sampler",
        "dpmpp_2m_karras",
        "--clip-skip",
        "2",
    ]
    for bundle in ("sd", "sdxl"):
        assert generate(*run, "-o", f"{bundle}.png", bundle=bundle) == 0
        with Image.open(f"{bundle}.png") as picture:
            chunks = PngInfo()
            chunks.add_text("parameters", picture.info["parameters"])
            assert f"Clip skip: {4 if bundle == 'sdxl' else 3}" in picture.info["parameters"]
            picture.save("stripped.png", pnginfo=chunks)
        capsys.readouterr()
        assert generate("--like", "stripped.png", "-o", f"{bundle}-again.png", bundle=bundle) == 0
        assert "warning" not in capsys.readouterr().err
        assert np.array_equal(pixels(f"{bundle}.png"), pixels(f"{bundle}-again.png"))


def test_warnings_are_lines_and_in_json(generate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "a boat", "--steps", "3", "-o", "first.png") == 0
    capsys.readouterr()
    assert generate("--like", "first.png", "--json", "-o", "other.png", bundle="other") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)["warnings"]
    assert len(told) == 1
    assert told[0].startswith("the picture was drawn with the weights of sd15 (")
    assert "this bundle has those of other (" in told[0]
    assert f"warning: {told[0]}\n" in err
    assert generate("--like", "first.png", "--dry-run", "--json", "-o", "dry.png", bundle="other") == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == told
    assert generate("-p", "x", "--steps", "1", "--json", "-o", "plain.png") == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"width": 512}, "the picture is 512x48, this bundle draws 64x48"),
        ({"precision": "float16"}, "computed in float16, this bundle computes in float32"),
        ({"batch": 2, "index": 1}, "number 2 of a batch of 2, this bundle draws 1 at once"),
        ({"phases": {"windowed": [0, 3]}}, "other phases of HiDiffusion"),
        ({"phases": {"windowed": [0, 10**12]}}, "other phases of HiDiffusion"),
        ({"phases": {"windowed": "all"}}, "other phases of HiDiffusion"),
        (
            {"model_sha256": "f" * 64, "model": "x", "lora": [{"name": "ink", "scale": 0.5}]},
            "the weights of x with ink at 0.5 (ffffffffff), this bundle has those of sd15 (",
        ),
        ({"model_sha256": "f" * 64, "model": "\x1b[2Jx"}, r"the weights of \x1b[2Jx (ffffffffff)"),
        (
            {"schedule": "SGM Uniform", "sampler": "euler"},
            "schedule was SGM Uniform, that of this bundle's euler is Uniform",
        ),
    ],
)
def test_what_another_bundle_drew_is_drawn_with_a_warning(
    generate: Run, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], warning: str
) -> None:
    assert generate("-p", "a boat", "--steps", "4", "-o", "first.png") == 0
    web_ui.png("changed.png", hidiff=json.dumps({**facts("first.png"), **changes}))
    capsys.readouterr()
    assert generate("--like", "changed.png", "-o", "again.png") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1
    assert warning in told[0]


def test_all_pictures_of_a_batch_are_drawn_again(generate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "a boat", "--steps", "3", "--seed", "7", "-o", "{seed}-{index}.png", bundle="batch") == 0
    capsys.readouterr()
    assert generate("--like", "7-001.png", "-o", "again-{index}.png", bundle="batch") == 0
    assert "number 2 of a batch of 2; all of them are drawn" in capsys.readouterr().err
    assert np.array_equal(pixels("7-001.png"), pixels("again-001.png"))


BAD: dict[str, tuple[str, dict[str, str], list[str], list[str]]] = {
    "no such sampler": (
        "sd",
        {"Sampler": "DPM++ SDE"},
        [],
        ["DPM++ SDE, which is none of ddim, dpmpp_2m, dpmpp_2m_karras", "--sampler dpmpp_2m, the", "differs.\n"],
    ),
    "a sampler of a schedule": ("sd", {"Sampler": "DPM++ SDE Karras"}, [], ["Give --sampler dpmpp_2m_karras, the"]),
    "a sampler that can be built": ("sd", {"Sampler": "Heun"}, [], ["differs; or build the bundle with heun."]),
    "no sampler like it": ("sd", {"Sampler": "Restart"}, [], ["Restart, which is none of", "Give --sampler NAME,"]),
    "no such steps": ("sd", {"Steps": "30"}, [], ["30 steps of euler", "Give --steps 12, the nearest there is"]),
    "an image that is not given": ("sd", {"Denoising strength": "0.5"}, [], ["with an image", "--image FILE"]),
    "a mask that is not given": (
        "sd",
        {"Denoising strength": "0.5", "Mask blur": "4"},
        ["--image", "image.png"],
        ["with a mask", "--mask FILE"],
    ),
    "no number": ("sd", {"Clip skip": "two"}, [], ["Clip skip is not a whole number", "Clip skip: two"]),
    "too many layers": ("sd", {"Clip skip": "9"}, [], ["clip_skip must be a whole number from 0 to 4"]),
    "no such steps of a sampler that is given": (
        "sd",
        {"Steps": "30"},
        ["--sampler", "noisy"],
        ["30 steps of noisy", "Give --steps 12, the nearest there is"],
    ),
    "steps asked for": ("sd", {}, ["--steps", "99"], ["no table for this number of steps"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_drawn_is_refused_with_the_nearest_there_is(
    generate: Run, work: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    bundle, changes, options, messages = BAD[case]
    web_ui.png("web.png", parameters=web_ui.text(**changes))
    assert generate("--like", "web.png", *options, "-o", "out.png", bundle=bundle) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for message in messages:
        assert message in err
    assert not (work / "out.png").exists()


def test_options_make_drawable_what_a_picture_asks_in_vain(generate: Run) -> None:
    web_ui.png("web.png", parameters=web_ui.text(Steps="30", Sampler="DPM++ SDE"))
    assert generate("--like", "web.png", "--steps", "12", "--sampler", "dpmpp_2m", "-o", "out.png") == 0
    assert (facts("out.png")["steps"], facts("out.png")["sampler"]) == (12, "dpmpp_2m")


def test_a_picture_of_a_controlnet_needs_a_bundle_with_one(generate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "x", "--steps", "2", "--control", "image.png", "-o", "first.png", bundle="control") == 0
    assert generate("--like", "first.png", "-o", "a.png", bundle="control") == 2
    assert "with a control image, which is not in its file" in capsys.readouterr().err
    assert generate("--like", "first.png", "-o", "a.png") == 2
    assert "drawn with a ControlNet, which this bundle does not have" in capsys.readouterr().err


def test_sizes_of_sdxl_do_not_stop_another_family(generate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "x", "--steps", "2", "--crop", "4,3", "-o", "first.png", bundle="sdxl") == 0
    assert generate("--like", "first.png", "-o", "other.png") == 0
    assert "the picture is of sdxl, this bundle of sd15" in capsys.readouterr().err
