"""Pictures from prompts on the toy: what is drawn in which order, what goes where, what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
from PIL import Image

from hidiff_runtime import BundleError, Cancelled, InputError, PictureStep, Pipeline, Settings, TorchGenerator
from hidiff_runtime.pipeline.prompt_encoding import TruncationWarning, encode_prompts
from hidiff_runtime.pipeline.vae import sample

KINDS = {
    "sd": toy.Toy(),
    "turbo": toy.Toy(guidance=False, sdxl=True),
    "sdxl": toy.Toy(sdxl=True),
    "batch": toy.Toy(batch=2),
    "inpainting": toy.Toy(inpainting=True),
    "sdxl-inpainting": toy.Toy(inpainting=True, sdxl=True),
    "control": toy.Toy(control=True),
}
PROMPT = "a lighthouse"
SIZE = (toy_pictures.WIDTH, toy_pictures.HEIGHT)
Open = Callable[[str], Pipeline]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bundles")
    return {name: toy_pictures.make(home / name, kind) for name, kind in KINDS.items()}


@pytest.fixture
def backend() -> toy_pictures.Backend:
    return toy_pictures.Backend()


@pytest.fixture
def opened(folders: dict[str, Path], backend: toy_pictures.Backend) -> Any:
    pipelines = []

    def opener(name: str) -> Pipeline:
        pipelines.append(Pipeline.open(folders[name], backend=backend, verify="size"))
        return pipelines[-1]

    yield opener
    for pipeline in pipelines:
        pipeline.close()


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8))


def mask() -> Image.Image:
    """White on the left half."""
    levels = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    levels[:, : SIZE[0] // 2] = 255
    return Image.fromarray(levels)


def scaled(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255) * 2 - 1


def encoded(pixels: np.ndarray, stream: TorchGenerator) -> np.ndarray:
    return sample(toy_pictures.encode(pixels), stream) * np.float32(toy_pictures.SCALING_FACTOR)


def as_picture(latents: np.ndarray) -> np.ndarray:
    bright = toy_pictures.decode(latents / np.float32(toy_pictures.SCALING_FACTOR)) * 0.5 + 0.5
    return (bright * 255).round().astype(np.uint8)[0].transpose(1, 2, 0)


def denoised(pipeline: Pipeline, prompt: str = PROMPT, negative: str | None = None, **given: Any) -> np.ndarray:
    """The picture by hand: prompts encoded, the denoiser called, latents decoded."""
    bundle = pipeline.bundle
    embeds, _ = encode_prompts(bundle, [prompt], None if negative is None else [negative])
    guidance = {"guidance_scale": 7.5} if bundle.manifest.guidance else {}
    return as_picture(bundle.denoiser().denoise(**{"steps": 6, "seed": 3, **guidance, **embeds, **given}))


def same(found: Any, expected: np.ndarray) -> bool:
    return np.array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("name", ["sd", "turbo"])
def test_a_prompt_becomes_a_picture(opened: Open, name: str) -> None:
    pipe = opened(name)
    found = pipe(PROMPT, seed=3, steps=6)
    assert (found.size, found.mode) == (SIZE, "RGB")
    assert same(found, denoised(pipe))
    assert not same(pipe("a lighthouSe!", seed=3, steps=6), denoised(pipe))
    assert not same(pipe(PROMPT, seed=4, steps=6), denoised(pipe))


def test_settings_reach_the_run(opened: Open) -> None:
    pipe = opened("sd")
    plain = pipe(PROMPT, seed=3, steps=6)
    found = pipe(PROMPT, seed=3, steps=5, guidance_scale=3, sampler="noisy", negative_prompt="fog")
    assert same(found, denoised(pipe, negative="fog", steps=5, guidance_scale=3.0, sampler="noisy"))
    for changed in ({"negative_prompt": "fog"}, {"clip_skip": 1}, {"guidance_scale": 3}, {"sampler": "noisy"}):
        assert not same(pipe(PROMPT, seed=3, steps=6, **changed), np.asarray(plain))


def test_what_is_left_out_is_as_in_diffusers(opened: Open) -> None:
    image, both = {"image": picture()}, {"image": picture(), "mask": mask()}
    expected: list[tuple[str, dict[str, Any], float | None, float | None]] = [
        ("sd", {}, 7.5, None),
        ("sd", image, 7.5, 0.8),
        ("sd", both, 7.5, 1.0),
        ("sdxl", {}, 5.0, None),
        ("sdxl", image, 5.0, 0.3),
        ("sdxl", both, 7.5, 0.9999),
        ("turbo", image, None, 0.3),
        ("control", {"control_image": picture(), **image}, 7.5, 0.8),
    ]
    for name, given, guidance, strength in expected:
        settings = opened(name).request(PROMPT, Settings(**given)).settings
        assert (settings.guidance_scale, settings.strength) == (guidance, strength)
        assert settings.steps == toy.MAX_STEPS  # the tabulated count nearest to 50
        assert settings.sampler == "plain"


def test_a_batch_has_one_stream_and_a_prompt_for_each_picture(opened: Open) -> None:
    pipe = opened("batch")
    two = pipe(["a lighthouse", "a boat"], seed=3, steps=4)
    assert len(two) == 2
    both = pipe("a lighthouse", seed=3, steps=4)
    assert same(both[0], np.asarray(two[0]))
    assert not same(both[1], np.asarray(two[1]))
    assert [json.loads(image.info["hidiff"])["prompt"] for image in two] == ["a lighthouse", "a boat"]
    assert [json.loads(image.info["hidiff"])["index"] for image in two] == [0, 1]
    with pytest.raises(InputError, match="2 pictures a run"):
        pipe(["a lighthouse"])
    with pytest.raises(InputError, match="2 pictures a run"):
        pipe("a lighthouse", negative_prompt=["fog"])


def test_a_list_of_one_gives_a_list(opened: Open) -> None:
    assert isinstance(opened("sd")([PROMPT], steps=1), list)


def test_an_image_is_encoded_before_noise_is_drawn(opened: Open) -> None:
    pipe, start = opened("sd"), picture()
    stream = TorchGenerator(3)
    latents = encoded(scaled(start), stream)
    expected = denoised(pipe, seed=stream, image_latents=latents, strength=0.5)
    assert same(pipe(PROMPT, image=start, strength=0.5, seed=3, steps=6), expected)
    assert not same(pipe(PROMPT, image=picture(1), strength=0.5, seed=3, steps=6), expected)
    stream = TorchGenerator(3)
    other_order = {"latents": stream.randn(latents.shape), "image_latents": encoded(scaled(start), stream)}
    assert not same(denoised(pipe, seed=stream, strength=0.5, **other_order), expected)


def test_one_image_serves_the_whole_batch(opened: Open) -> None:
    pipe, stream = opened("batch"), TorchGenerator(3)
    latents = np.concatenate([encoded(scaled(picture()), stream)] * 2)
    embeds, _ = encode_prompts(pipe.bundle, [PROMPT, PROMPT])
    expected = pipe.bundle.denoiser().denoise(
        **embeds, steps=6, seed=stream, guidance_scale=7.5, image_latents=latents, strength=0.5
    )
    found = pipe(PROMPT, image=picture(), strength=0.5, seed=3, steps=6)
    assert [same(image, as_picture(one[None])) for image, one in zip(found, expected, strict=True)] == [True, True]
    two = pipe(PROMPT, image=[picture(), picture(1)], strength=0.5, seed=3, steps=6)
    assert not same(two[1], np.asarray(found[1]))


def test_a_mask_on_four_channels_blends_and_draws_for_the_masked_image_too(opened: Open) -> None:
    pipe, stream = opened("sd"), TorchGenerator(3)
    latents = encoded(scaled(picture()), stream)
    noise = stream.randn(latents.shape)
    stream.randn(latents.shape)  # the masked image's, which nothing takes
    small = np.zeros((1, 1, toy.HEIGHT, toy.WIDTH), np.float32)
    small[..., : toy.WIDTH // 2] = 1
    given = {"image_latents": latents, "latents": noise, "mask": small}
    expected = denoised(pipe, seed=stream, strength=0.5, sampler="noisy", **given)
    assert same(pipe(PROMPT, image=picture(), mask=mask(), strength=0.5, seed=3, steps=6, sampler="noisy"), expected)
    whole = pipe(PROMPT, image=picture(), mask=mask(), seed=3, steps=6)
    kept = as_picture(latents)[:, SIZE[0] // 2 :]
    assert same(np.asarray(whole)[:, SIZE[0] // 2 :], kept)


@pytest.mark.parametrize(("name", "strength"), [("inpainting", 1.0), ("inpainting", 0.5), ("sdxl-inpainting", 1.0)])
def test_an_inpainting_unet_takes_mask_and_masked_image(
    opened: Open, backend: toy_pictures.Backend, name: str, strength: float
) -> None:
    pipe, stream = opened(name), TorchGenerator(3)
    shape = (1, 4, toy.HEIGHT, toy.WIDTH)
    given: dict[str, Any] = {}
    if strength < 1:
        given = {"image_latents": encoded(scaled(picture()), stream), "strength": strength}
    given["latents"] = stream.randn(shape)
    white = np.asarray(mask())[None, None] >= 128
    given["masked_image_latents"] = encoded((scaled(picture()) * ~white).astype(np.float32), stream)
    given["mask"] = white[:, :, ::8, ::8].astype(np.float32)
    expected = denoised(pipe, seed=stream, **given)
    backend.events.clear()
    assert same(pipe(PROMPT, image=picture(), mask=mask(), strength=strength, seed=3, steps=6), expected)
    assert backend.events.count("open encoder") == (1 if strength == 1 else 2)


def test_a_control_image_reaches_the_controlnet(opened: Open, backend: toy_pictures.Backend) -> None:
    pipe = opened("control")
    seen = (scaled(picture()) + 1) / 2
    expected = denoised(pipe, control_image=seen, conditioning_scale=0.5)
    assert same(pipe(PROMPT, control_image=picture(), conditioning_scale=0.5, seed=3, steps=6), expected)
    assert not same(pipe(PROMPT, control_image=picture(1), conditioning_scale=0.5, seed=3, steps=6), expected)
    given = next(inputs for name, inputs in backend.calls if name == "controlnet")
    np.testing.assert_allclose(given["control_image"], np.concatenate([seen] * 2), atol=1e-6)
    image = pipe(PROMPT, control_image=picture(), image=picture(1), strength=0.5, seed=3, steps=6)
    assert not same(image, np.asarray(pipe(PROMPT, control_image=picture(), seed=3, steps=6)))


def test_sizes_and_crop_condition_sdxl(opened: Open, backend: toy_pictures.Backend) -> None:
    pipe = opened("sdxl")
    size = [toy_pictures.HEIGHT, toy_pictures.WIDTH]

    def told(**given: Any) -> list[list[float]]:
        backend.calls.clear()
        pipe(PROMPT, steps=1, **given)
        return next(inputs["time_ids"].tolist() for _, inputs in backend.calls if "time_ids" in inputs)

    assert told() == [[*size, 0, 0, *size]] * 2
    assert told(original_size=(100, 200), crops=(3, 4), target_size=(50, 60)) == [[100, 200, 3, 4, 50, 60]] * 2
    negative = told(negative_original_size=(9, 8), negative_crops=(7, 6), negative_target_size=(5, 4))
    assert negative == [[9, 8, 7, 6, 5, 4], [*size, 0, 0, *size]]
    # What diffusers' pipelines take for negative prompts depends on the task.
    crop = {"crops": (3, 4), "strength": 1}
    for given in ({"image": picture()}, {"image": picture(), "mask": mask()}):
        assert told(**crop, **given) == [[*size, 0, 0, *size], [*size, 3, 4, *size]]
    sizes = {"negative_original_size": (9, 8), "negative_target_size": (5, 4)}
    assert told(crops=(3, 4), **sizes)[0] == [9, 8, 0, 0, 5, 4]
    assert told(crops=(3, 4), negative_original_size=(9, 8))[0] == [9, 8, 3, 4, *size]


def test_a_callback_sees_previews_and_can_cancel(opened: Open) -> None:
    pipe = opened("sd")
    seen: list[PictureStep] = []
    pipe(PROMPT, steps=4, callback=seen.append)
    assert [(info.step, info.steps) for info in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    preview = seen[0].preview()
    assert (preview.size, preview.mode) == ((toy.WIDTH, toy.HEIGHT), "RGB")
    assert not same(seen[-1].preview(), np.asarray(preview))
    with pytest.raises(Cancelled):
        pipe(PROMPT, steps=4, callback=lambda info: info.step < 1)
    assert pipe(PROMPT, steps=1).size == SIZE


def test_many_runs_encode_their_prompts_first_and_each_once(opened: Open, backend: toy_pictures.Backend) -> None:
    pipe = opened("sd")
    texts = ["a boat", "a tree", "a boat"]
    requests = [pipe.request(text, Settings(seed=seed, steps=2)) for seed, text in enumerate(texts)]
    results = list(pipe.run(requests))
    opens = [event for event in backend.events if event.startswith("open") and "strided" not in event]
    assert opens[0] == "open text_encoder"
    assert backend.events.count("open text_encoder") == 1
    assert len([name for name, _ in backend.calls if name == "text_encoder"]) == 3  # both texts, and the empty one
    for result, seed, text in zip(results, range(3), texts, strict=True):
        assert same(result.images[0], np.asarray(pipe(text, seed=seed, steps=2)))
        assert result.seconds > 0


def test_a_long_prompt_is_cut_with_a_warning_that_quotes_it(opened: Open) -> None:
    pipe = opened("sd")
    with pytest.warns(TruncationWarning, match="END"):
        image = pipe("x" * 75 + "END", steps=1)
    assert json.loads(image.info["hidiff"])["cut"] == ["END"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        requests = [pipe.request(text, Settings(steps=1)) for text in ("short", "THE END", "x" * 75 + "END")]
        assert [result.cut for result in pipe.run(requests)] == [(), (), ("END",)]


def test_a_picture_tells_how_it_was_made(opened: Open) -> None:
    image = opened("sd")(PROMPT, negative_prompt="fog", seed=3, steps=4, sampler="noisy")
    assert image.info["parameters"].startswith("a lighthouse\nNegative prompt: fog\nSteps: 4, Sampler: noisy, ")
    facts = json.loads(image.info["hidiff"])
    assert (facts["seed"], facts["steps"], facts["guidance_scale"]) == (3, 4, 7.5)
    assert facts["phases"] == {"strided_pooled": [0, 0], "strided": [1, 1], "windowed": [2, 3]}
    assert "time_ids" not in facts


def test_rescaled_guidance_is_told_where_there_is_some(opened: Open) -> None:
    pipe = opened("sd")
    plain, rescaled = pipe(PROMPT, steps=4), pipe(PROMPT, steps=4, guidance_rescale=0.7)
    assert not same(plain, rescaled)
    assert "guidance_rescale" not in json.loads(plain.info["hidiff"])
    assert json.loads(rescaled.info["hidiff"])["guidance_rescale"] == 0.7
    assert "CFG scale: 7.5, CFG rescale: 0.7, " in rescaled.info["parameters"]


def test_numbers_may_be_those_of_numpy(opened: Open) -> None:
    given = {"seed": np.int64(3), "steps": np.int32(4), "eta": np.float32(0), "guidance_scale": np.int64(3)}
    given |= {"clip_skip": np.int64(1)}
    image = opened("sd")(PROMPT, image=picture(), strength=np.float32(0.5), **given)
    facts = json.loads(image.info["hidiff"])
    wanted = {"seed": 3, "steps": 4, "guidance_scale": 3.0, "strength": 0.5}
    assert {name: facts[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sd", {"prompt": "  \n"}, "prompt is empty"),
        ("sd", {"prompt": "a\0b"}, "control character"),
        ("sd", {"negative_prompt": "a\x1bb"}, "control character"),
        ("sd", {"prompt": 3}, "must be text"),
        ("sd", {"mask": mask()}, "mask needs an image"),
        ("sd", {"strength": 0.5}, "start from an image"),
        ("sd", {"image": picture(), "strength": -0.1}, "strength"),
        ("sd", {"image": picture(), "strength": 1.1}, "strength"),
        ("sd", {"image": picture(), "strength": float("nan")}, "strength"),
        ("sd", {"image": picture(), "strength": 0.01, "steps": 4}, "no step"),
        ("sd", {"image": picture(size=(8, 8))}, "not of the bundle's size"),
        ("sd", {"image": picture().convert("CMYK")}, "mode that is not taken"),
        ("sd", {"control_image": picture()}, "has no ControlNet"),
        ("sd", {"conditioning_scale": 0.5}, "does not have"),
        ("sd", {"steps": 99}, "no table"),
        ("sd", {"steps": np.array([4, 5])}, "steps must be a whole number"),
        ("sd", {"steps": True}, "steps must be a whole number"),
        ("sd", {"sampler": "brush"}, "no such sampler"),
        ("sd", {"sampler": []}, "no such sampler"),
        ("sd", {"sampler": np.array(["plain"])}, "no such sampler"),
        ("sd", {"clip_skip": np.array([1])}, "clip_skip"),
        ("sd", {"clip_skip": True}, "clip_skip"),
        ("sd", {"eta": 0.5}, "takes no eta"),
        ("sd", {"eta": "much"}, "eta"),
        ("sd", {"seed": 1.5}, "not a seed"),
        ("sd", {"steps": 4.0}, "steps must be a whole number"),
        ("sd", {"steps": [4]}, "steps must be a whole number"),
        ("sd", {"guidance_scale": float("inf")}, "finite"),
        ("sd", {"guidance_scale": 10**400}, "finite"),
        ("sd", {"guidance_rescale": 1.5}, "guidance_rescale must be a number from 0 to 1"),
        ("turbo", {"guidance_rescale": 0.7}, "nothing to rescale"),
        ("sd", {"eta": 10**400}, "eta"),
        ("sd", {"crops": 3}, "top and left"),
        ("sdxl", {"target_size": (10**400, 8)}, "height and width"),
        ("control", {"control_image": picture(), "conditioning_scale": 10**400}, "finite"),
        ("sd", {"clip_skip": toy_pictures.CLIP_SKIP + 1}, "clip_skip"),
        ("sd", {"long_prompt": "shrink"}, "long_prompt"),
        ("sd", {"original_size": (8, 8)}, "SDXL alone"),
        ("sdxl", {"original_size": (8,)}, "height and width"),
        ("sdxl", {"crops": (0, -1)}, "top and left"),
        ("turbo", {"negative_prompt": "fog"}, "without guidance"),
        ("turbo", {"guidance_scale": 5.0}, "without guidance"),
        ("control", {}, "needs a control image"),
        ("inpainting", {}, "needs an image and a mask"),
        ("inpainting", {"image": picture()}, "needs an image and a mask"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    opened: Open, backend: toy_pictures.Backend, name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opened(name)(**{"prompt": PROMPT, **given})
    assert backend.events == []


def test_a_bundle_that_cannot_make_pictures_is_refused(tmp_path: Path, backend: toy_pictures.Backend) -> None:
    cases = [
        ((False, True), "no text encoder,"),
        ((True, False), "no VAE,"),
        ((False, False), "no text encoder and no VAE"),
    ]
    for number, ((with_text, with_vae), message) in enumerate(cases):
        folder = toy_pictures.make(tmp_path / str(number), with_text=with_text, with_vae=with_vae)
        with pytest.raises(BundleError, match=message):
            Pipeline.open(folder, backend=backend)
    outside = toy.make(tmp_path / "outside", toy.Toy(control=True))
    with pytest.raises(BundleError):
        Pipeline.open(outside, backend=backend)
