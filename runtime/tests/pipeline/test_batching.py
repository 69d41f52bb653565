"""Pictures that are drawn together are those that each request draws by itself."""

from __future__ import annotations

import itertools
import json
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
from hidiff_runtime import InputError, Pipeline, Settings
from hidiff_runtime.cli import main
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.sampling.torch_rng import SEED_MAX

KINDS = {
    "sd": toy.Toy(),
    "without guidance": toy.Toy(guidance=False),
    "sdxl": toy.Toy(sdxl=True),
    "inpainting": toy.Toy(inpainting=True),
    "control": toy.Toy(control=True),
}
PROMPTS = ("a lighthouse", "a boat", "two gulls", "the sea")
SIZE = (toy_pictures.WIDTH, toy_pictures.HEIGHT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By kind: a bundle that draws one picture a run, and one that also draws two and four."""
    home = tmp_path_factory.mktemp("bundles")
    found = {}
    for name, kind in KINDS.items():
        single = toy_pictures.make(home / f"{name} 1", kind)
        many = toy_pictures.make(home / f"{name} 124", kind)
        for batch in (2, 4):
            toy_sizes.add_batch(many, kind, batch)
        found[name] = (single, many)
    return found


@pytest.fixture
def many(folders: dict[str, tuple[Path, Path]]) -> Iterator[Pipeline]:
    with Pipeline.open(folders["sd"][1], backend=toy_pictures.Backend()) as opened:
        yield opened


def picture(seed: int) -> Image.Image:
    levels = np.random.RandomState(seed).randint(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
    return Image.fromarray(levels)


def given(kind: toy.Toy, seed: int, *, start: bool = False) -> dict[str, Any]:
    """Pictures where the kind needs some, or to start from."""
    found: dict[str, Any] = {"image": picture(seed), "strength": 0.7} if start or kind.inpainting else {}
    if kind.inpainting:
        found["mask"] = picture(seed + 1).convert("L").point(lambda level: 255 * (level > 128))
    if kind.control:
        found["control_image"] = picture(seed + 2)
    return found


def asked(pipe: Pipeline, kind: toy.Toy, **changes: Any) -> list[Request]:
    """A request a prompt, whose seeds and pictures differ."""
    start = changes.pop("start", False)
    return [
        pipe.request(prompt, Settings(seed=10 + 7 * index, steps=6, **given(kind, index, start=start), **changes))
        for index, prompt in enumerate(PROMPTS)
    ]


def drawn(pipe: Pipeline, requests: list[Request]) -> list[tuple[np.ndarray, str]]:
    """Pixels, and what is told of them."""
    results = list(pipe.run(requests))
    assert [result.request for result in results] == requests
    images = [image for result in results for image in result.images]
    return [(np.asarray(image), image.info["hidiff"]) for image in images]


@pytest.mark.parametrize("start", [False, True], ids=["noise", "image"])
@pytest.mark.parametrize("sampler", ["plain", "noisy", "second"])
@pytest.mark.parametrize("name", KINDS)
def test_together_each_is_as_it_is_alone(
    folders: dict[str, tuple[Path, Path]], name: str, sampler: str, start: bool
) -> None:
    kind, found = KINDS[name], []
    for folder in folders[name]:
        with Pipeline.open(folder, backend=toy_pictures.Backend()) as pipe:
            requests = asked(pipe, kind, sampler=sampler, start=start)
            runs = [len(run) for run in pipe.batches(requests)]
            assert runs == ([4] if folder is folders[name][1] else [1, 1, 1, 1])
            found.append(drawn(pipe, requests))
    for (alone, told), (beside, also_told) in zip(*found, strict=True):
        np.testing.assert_allclose(beside.astype(int), alone.astype(int), atol=1)
        facts, others = (json.loads(text) for text in (told, also_told))
        assert others == facts
        assert "batch" not in facts
    pictures = [pixels for pixels, _ in found[1]]
    assert all((one != other).mean() > 0.2 for one, other in itertools.pairwise(pictures))


def test_a_picture_does_not_depend_on_its_neighbors(many: Pipeline) -> None:
    requests = asked(many, KINDS["sd"])
    together = drawn(many, requests)
    others = drawn(many, [requests[2], *requests[:2], requests[3]])
    for number, place in enumerate((1, 2, 0, 3)):
        np.testing.assert_array_equal(together[number][0], others[place][0])


def test_one_stream_for_all_couples_them(folders: dict[str, tuple[Path, Path]]) -> None:
    """The control: drawn from one stream, a picture depends on its place."""
    with Pipeline.open(folders["sd"][1], backend=toy_pictures.Backend()) as pipe:
        (result,) = pipe.run([pipe.request(list(PROMPTS), Settings(seed=10, steps=6))])
        assert len(result.images) == 4
        with pytest.raises(InputError, match="1 picture a run"):
            pipe.request(PROMPTS[:3])
        alone = drawn(pipe, asked(pipe, KINDS["sd"]))
    assert (np.asarray(result.images[1]) != alone[1][0]).mean() > 0.2
    assert json.loads(result.images[1].info["hidiff"])["index"] == 1


@pytest.mark.parametrize(("count", "runs"), [(1, [1]), (2, [2]), (3, [2, 1]), (4, [4]), (7, [4, 2, 1]), (8, [4, 4])])
def test_pictures_fill_the_largest_batches(many: Pipeline, count: int, runs: list[int]) -> None:
    request = many.request("a boat", Settings(seed=3, steps=2))
    requests = [request.seeded(seed) for seed in range(3, 3 + count)]
    assert [len(run) for run in many.batches(requests)] == runs


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 3},
        {"guidance_scale": 2.0},
        {"guidance_rescale": 0.5},
        {"sampler": "noisy"},
        {"image": picture(1)},
        {"negative_prompt": "fog"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_run_has_once_is_never_mixed(many: Pipeline, change: dict[str, Any]) -> None:
    first = many.request("a boat", Settings(**{"seed": 3, "steps": 2}))
    other = many.request("a boat", Settings(**{"seed": 4, "steps": 2, **change}))
    assert [len(run) for run in many.batches([first, other, first])] == [1, 1, 1]
    assert [len(run) for run in many.batches([first, first, other])] == [2, 1]


def test_scales_of_pictures_and_controls_are_never_mixed(folders: dict[str, tuple[Path, Path]]) -> None:
    for name, change in (("inpainting", {"strength": 0.5}), ("control", {"conditioning_scale": 0.5})):
        with Pipeline.open(folders[name][1], backend=toy_pictures.Backend()) as pipe:
            first, *_ = asked(pipe, KINDS[name])
            other = pipe.request("a boat", Settings(**{"steps": 6, **given(KINDS[name], 0), **change}))
            assert [len(run) for run in pipe.batches([first, other])] == [1, 1]
            assert [len(run) for run in pipe.batches([first, first])] == [2]


def test_num_images_count_their_seeds_up(folders: dict[str, tuple[Path, Path]]) -> None:
    single, several = folders["sd"]
    with Pipeline.open(single, backend=toy_pictures.Backend()) as pipe:
        alone = [pipe("a boat", seed=seed, steps=3) for seed in range(5, 10)]
        one_by_one = pipe("a boat", seed=5, steps=3, num_images=5)
    with Pipeline.open(several, backend=(backend := toy_pictures.Backend())) as pipe:
        together = pipe("a boat", seed=5, steps=3, num_images=5)
        assert isinstance(pipe("a boat", steps=1, num_images=1), list)
    assert [
        len(inputs["latents"]) // 2 for name, inputs in backend.calls if "latents" in inputs and "timestep" in inputs
    ][:6] == [4, 4, 4, 1, 1, 1]
    for image, expected, other in zip(together, alone, one_by_one, strict=True):
        np.testing.assert_allclose(np.asarray(image).astype(int), np.asarray(expected).astype(int), atol=1)
        np.testing.assert_array_equal(np.asarray(other), np.asarray(expected))
        assert json.loads(image.info["hidiff"]) == json.loads(expected.info["hidiff"])


def test_a_batch_alone_takes_seeds_too(tmp_path: Path, folders: dict[str, tuple[Path, Path]]) -> None:
    single, several = folders["sd"]
    four = toy_sizes.alone(several, 2, tmp_path / "four")
    with Pipeline.open(single, backend=toy_pictures.Backend()) as pipe:
        alone = pipe("a boat", seed=5, steps=3, num_images=4)
    with Pipeline.open(four, backend=toy_pictures.Backend()) as pipe:
        for image, expected in zip(pipe("a boat", seed=5, steps=3, num_images=4), alone, strict=True):
            np.testing.assert_allclose(np.asarray(image).astype(int), np.asarray(expected).astype(int), atol=1)
            assert json.loads(image.info["hidiff"])["seed"] == json.loads(expected.info["hidiff"])["seed"]
        started = pipe("a boat", seed=5, steps=3, num_images=4, image=picture(1), strength=0.7)
        with pytest.raises(InputError, match="4 pictures of this size"):
            pipe("a boat", num_images=3)
        with pytest.raises(InputError, match="one prompt"):
            pipe(list(PROMPTS), num_images=4)
    with Pipeline.open(single, backend=toy_pictures.Backend()) as pipe:
        for seed, image in enumerate(started, start=5):
            expected = pipe("a boat", seed=seed, steps=3, image=picture(1), strength=0.7)
            np.testing.assert_allclose(np.asarray(image).astype(int), np.asarray(expected).astype(int), atol=1)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_num_images_is_a_number_of_pictures(many: Pipeline, count: Any) -> None:
    with pytest.raises(InputError, match="num_images"):
        many("a boat", num_images=count)


def test_seeds_end_with_the_last(many: Pipeline) -> None:
    with pytest.raises(InputError, match="num_images"):
        many("a boat", seed=SEED_MAX, num_images=2)


def test_a_bundle_that_shifts_its_batch_alike_says_so(tmp_path: Path) -> None:
    with Pipeline.open(toy_pictures.make(tmp_path / "old", toy.Toy(batch=2)), backend=toy_pictures.Backend()) as pipe:
        assert len(pipe("a boat", seed=1, steps=2)) == 2
        with pytest.raises(InputError, match="build the bundle again"):
            pipe("a boat", num_images=2)


def test_neighbors_in_a_file_of_prompts_are_drawn_together(
    folders: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, backend = hidiff_runtime.open, toy_pictures.Backend()
    monkeypatch.setattr(
        hidiff_runtime.bundle, "open", lambda folder, **options: opened(folder, **{**options, "backend": backend})
    )
    rows = [{"prompt": prompt, "seed": seed, "steps": 3} for seed, prompt in enumerate((*PROMPTS, *PROMPTS))]
    rows[5]["steps"] = 2
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = []
    for place, folder in zip(("alone", "together"), folders["sd"], strict=True):
        words = ["generate", str(folder), "--prompts", str(tmp_path / "prompts.jsonl"), "-o", f"{tmp_path / place}/"]
        assert main([*words, "--previews", str(tmp_path / f"{place}.png")]) == 0
        shown.append(capsys.readouterr().err)
    assert "run 8/8" in shown[0]
    assert "run 4/4" in shown[1]
    assert "run 5/" not in shown[1]
    alone, together = (sorted((tmp_path / place).iterdir()) for place in ("alone", "together"))
    assert [path.name for path in alone] == [path.name for path in together]
    assert len(alone) == len(rows)
    for one, other in zip(alone, together, strict=True):
        first, second = (np.asarray(Image.open(path)).astype(int) for path in (one, other))
        np.testing.assert_allclose(second, first, atol=1)
