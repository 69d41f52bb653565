from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from hidiff_runtime import Bundle, Cancelled, EngineError, InputError, StepInfo, TorchGenerator
from hidiff_runtime import open as open_bundle
from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.manifest import Manifest

KINDS = {
    "plain": toy.Toy(),
    "unguided": toy.Toy(guidance=False),
    "batch of 2": toy.Toy(batch=2),
    "sdxl": toy.Toy(sdxl=True),
    "inpainting": toy.Toy(inpainting=True),
    "control": toy.Toy(control=True),
    "unguided sdxl": toy.Toy(sdxl=True, guidance=False),
}


@pytest.fixture
def backend() -> toy.ToyBackend:
    return toy.ToyBackend()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("toy") / "bundle", toy.Toy(reference=False))


@pytest.fixture
def bundle(folder: Path, backend: toy.ToyBackend) -> Bundle:
    return open_bundle(folder, backend=backend, verify="size")


def run(bundle: Bundle, **changes: Any) -> np.ndarray:
    arguments = {**toy.Toy().given(), "steps": 4, "seed": 1, "guidance_scale": 3.0, **changes}
    return bundle.denoiser().denoise(**arguments)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_run_is_the_one_written_out_by_hand(tmp_path: Path, kind: toy.Toy) -> None:
    folder = toy.make(tmp_path / "bundle", kind)
    reference = toy.reference_run(kind, Manifest.read(folder), toy.stored_weights(kind))
    residuals = {name: drawn.array() for name, drawn in reference["control"].items()}
    steps: list[StepInfo] = []
    with open_bundle(folder, backend=toy.ToyBackend()) as bundle:
        latents = bundle.denoiser().denoise(
            **reference["inputs"],
            steps=reference["steps"],
            sampler=reference["sampler"],
            seed=reference["seed"],
            guidance_scale=reference["guidance_scale"],
            control=(lambda _: residuals) if residuals else None,
            callback=steps.append,
        )
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, reference["latents"], rtol=1e-5, atol=1e-5)
    for info, expected in zip(steps, reference["trajectory"], strict=True):
        np.testing.assert_allclose(info.latents, expected, rtol=1e-5, atol=1e-5)


def test_each_step_runs_in_its_phase(bundle: Bundle, backend: toy.ToyBackend) -> None:
    seen: list[StepInfo] = []
    run(bundle, steps=8, callback=seen.append)
    phases = ["strided_pooled"] * 2 + ["strided"] * 2 + ["windowed"] * 4
    assert [info.phase.name for info in seen] == phases == [phase for phase, _ in backend.calls]
    assert [info.step for info in seen] == list(range(8))
    assert {info.steps for info in seen} == {8}
    assert seen[0].timestep == 999
    assert seen[-1].timestep == 0
    assert all(info.seconds >= 0 for info in seen)


def test_a_second_order_sampler_changes_phase_between_steps_only(bundle: Bundle, backend: toy.ToyBackend) -> None:
    seen: list[StepInfo] = []
    run(bundle, steps=8, sampler="second", callback=seen.append)
    assert len(backend.calls) == 15
    assert [info.step for info in seen] == list(range(8))
    called = [phase for phase, _ in backend.calls]
    assert called == ["strided_pooled"] * 4 + ["strided"] * 4 + ["windowed"] * 7


def test_the_random_stream_is_latents_then_shifts_then_noise(bundle: Bundle, backend: toy.ToyBackend) -> None:
    run(bundle, steps=2, sampler="noisy", seed=11)
    generator = TorchGenerator(11)
    start = generator.randn((1, 4, toy.HEIGHT, toy.WIDTH))
    np.testing.assert_allclose(backend.calls[0][1]["latents"][0], start[0] * 1.5 * 0.8, rtol=1e-6)
    for _, inputs in backend.calls:
        uniforms = generator.rand(len(toy.BLOCKS))
        expected = [0 if r <= 0.25 else 1 if r <= 0.5 else 2 if r <= 0.75 else 3 for r in uniforms]
        assert inputs["window_shifts"].tolist() == expected
        generator.randn(start.shape)


def test_given_latents_are_used_and_take_nothing_from_the_stream(bundle: Bundle, backend: toy.ToyBackend) -> None:
    latents = TorchGenerator(5).randn((1, 4, toy.HEIGHT, toy.WIDTH))
    before = latents.copy()
    run(bundle, latents=latents, seed=11)
    assert np.array_equal(latents, before)
    uniforms = TorchGenerator(11).rand(len(toy.BLOCKS))
    assert backend.calls[0][1]["window_shifts"].tolist() == [int(np.ceil(r * 4)) - 1 for r in uniforms]


def test_a_stream_goes_on_from_where_it_is(bundle: Bundle) -> None:
    stream, whole = TorchGenerator(11), run(bundle, steps=2, sampler="noisy", seed=11)
    drawn = stream.randn((1, 4, toy.HEIGHT, toy.WIDTH))
    assert np.array_equal(run(bundle, steps=2, sampler="noisy", seed=stream, latents=drawn), whole)
    assert not np.array_equal(run(bundle, steps=2, sampler="noisy", seed=11, latents=drawn), whole)


def test_the_same_seed_gives_the_same_latents_and_another_seed_others(bundle: Bundle) -> None:
    assert np.array_equal(run(bundle, seed=-5), run(bundle, seed=-5))
    assert not np.array_equal(run(bundle, seed=1), run(bundle, seed=2))


def test_negative_embeddings_come_first(bundle: Bundle, backend: toy.ToyBackend) -> None:
    given = toy.Toy().given()
    run(bundle)
    sent = backend.calls[0][1]["prompt_embeds"]
    assert np.array_equal(sent, np.concatenate([given["negative_prompt_embeds"], given["prompt_embeds"]]))


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_scale_of_at_most_one_is_the_prompt_alone(bundle: Bundle, scale: float) -> None:
    other = toy.Toy().given(seed=9)["negative_prompt_embeds"]
    same = run(bundle, guidance_scale=scale)
    assert np.array_equal(same, run(bundle, guidance_scale=scale, negative_prompt_embeds=other))
    assert not np.array_equal(run(bundle), run(bundle, negative_prompt_embeds=other))


def test_time_ids_default_to_an_uncropped_picture(tmp_path: Path) -> None:
    kind = toy.Toy(sdxl=True)
    backend = toy.ToyBackend()
    given = {name: value for name, value in kind.given().items() if not name.endswith("time_ids")}
    with open_bundle(toy.make(tmp_path / "bundle", kind), backend=backend) as bundle:
        bundle.denoiser().denoise(**given, steps=1, seed=0, guidance_scale=2.0)
    size = [toy.HEIGHT * 8, toy.WIDTH * 8]
    assert backend.calls[0][1]["time_ids"].tolist() == [[*size, 0, 0, *size]] * 2


def test_control_is_asked_in_its_phases_alone(tmp_path: Path) -> None:
    kind = toy.Toy(control=True)
    folder = toy.make(tmp_path / "bundle", kind)
    asked: list[int] = []

    def control(request: Any) -> dict[str, np.ndarray]:
        asked.append(request.step)
        assert request.steps == 10
        assert request.inputs["latents"].shape == (2, 4, toy.HEIGHT, toy.WIDTH)
        return {spec.name: np.zeros(spec.shape, np.float32) for spec in Manifest.read(folder).phases[0].residuals}

    with open_bundle(folder, backend=toy.ToyBackend()) as bundle:
        denoise = bundle.denoiser().denoise
        arguments = {**kind.given(), "steps": 10, "seed": 0, "guidance_scale": 2.0}
        denoise(**arguments, control=control)
        assert asked == list(range(6))
        with pytest.raises(InputError, match="takes a ControlNet's residuals"):
            denoise(**arguments)
        with pytest.raises(InputError, match="down_residual_00 must be"):
            denoise(**arguments, control=lambda _: {})


@pytest.mark.parametrize("stop", [lambda _: False, lambda _: 1 / 0], ids=["returns False", "raises"])
def test_a_cancelled_run_leaves_the_next_one_unharmed(bundle: Bundle, stop: Callable[[StepInfo], object]) -> None:
    untouched = run(bundle, steps=8)
    for at in range(8):
        with pytest.raises(Cancelled, match=f"step {at + 1} of 8") as caught:
            run(bundle, steps=8, callback=lambda info, at=at: stop(info) if info.step == at else None)
        assert caught.value.exit_code == 130
        assert np.array_equal(run(bundle, steps=8), untouched)


def test_a_callback_may_raise_cancelled_and_interrupts_pass(bundle: Bundle) -> None:
    def cancel(_: StepInfo) -> None:
        raise Cancelled("enough")

    def interrupt(_: StepInfo) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Cancelled, match=r"^enough"):
        run(bundle, callback=cancel)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, callback=interrupt)
    assert np.isfinite(run(bundle)).all()


def test_a_callback_cannot_change_the_run(bundle: Bundle) -> None:
    untouched = run(bundle)
    assert np.array_equal(run(bundle, callback=lambda info: info.latents.fill(0)), untouched)


def test_nan_from_an_engine_names_phase_and_step(folder: Path) -> None:
    def spoil(outputs: dict[str, np.ndarray], call: int) -> dict[str, np.ndarray]:
        if call == 3:
            outputs["noise_pred"][0, 0, 0, 0] = np.nan
        return outputs

    bundle = open_bundle(folder, backend=toy.ToyBackend(spoil))
    with pytest.raises(EngineError, match="phase strided, step 3 of 8") as caught:
        run(bundle, steps=8)
    assert caught.value.exit_code == 5
    assert np.isfinite(run(bundle, steps=8)).all()


def test_an_engine_that_fails_says_in_which_phase_and_step(folder: Path) -> None:
    def fail(outputs: dict[str, np.ndarray], call: int) -> dict[str, np.ndarray]:
        if call == 5:
            raise EngineError("Out of memory.", given="4 GB", advice="Use a smaller bundle.")
        return outputs

    bundle = open_bundle(folder, backend=toy.ToyBackend(fail))
    with pytest.raises(EngineError, match=r"Out of memory.*phase windowed, step 5 of 8") as caught:
        run(bundle, steps=8)
    assert caught.value.advice == "Use a smaller bundle."
    assert np.isfinite(run(bundle, steps=8)).all()


def test_an_output_of_another_shape_is_an_error(folder: Path) -> None:
    def cut(outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
        return {"noise_pred": outputs["noise_pred"][:, :3]}

    bundle = open_bundle(folder, backend=toy.ToyBackend(cut))
    with pytest.raises(EngineError, match="noise_pred of another shape"):
        run(bundle)


def test_an_engine_without_the_output_is_an_error(folder: Path) -> None:
    bundle = open_bundle(folder, backend=toy.ToyBackend(lambda _outputs, _call: {}))
    with pytest.raises(EngineError, match="no noise_pred"):
        run(bundle)


def test_runs_of_two_threads_follow_each_other(bundle: Bundle) -> None:
    alone = [run(bundle, steps=8, seed=seed) for seed in range(4)]
    results: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: run(bundle, steps=8, seed=seed)}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[seed], alone[seed]) for seed in range(4))


EMBEDS = toy.Toy().given()["prompt_embeds"]
IMAGE = TorchGenerator(8).randn((1, 4, toy.HEIGHT, toy.WIDTH))
MASK = (TorchGenerator(9).rand((1, 1, toy.HEIGHT, toy.WIDTH)) > 0.5).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_embeds": EMBEDS[:, :2]}, r"prompt_embeds must be .* \[1, 3, 5\]"),
        ({"prompt_embeds": EMBEDS[0]}, "prompt_embeds must be"),
        ({"prompt_embeds": np.concatenate([EMBEDS, EMBEDS])}, "prompt_embeds must be"),
        ({"prompt_embeds": EMBEDS.astype(np.float64)}, "prompt_embeds must be"),
        ({"prompt_embeds": EMBEDS.astype(np.float16)}, "prompt_embeds must be"),
        ({"prompt_embeds": EMBEDS.tolist()}, "prompt_embeds must be"),
        ({"prompt_embeds": EMBEDS * np.float32(np.nan)}, "prompt_embeds holds NaN"),
        ({"prompt_embeds": None}, "prompt_embeds is missing"),
        ({"negative_prompt_embeds": None}, "negative_prompt_embeds is missing"),
        ({"negative_prompt_embeds": EMBEDS[:, :1]}, "negative_prompt_embeds must be"),
        ({"text_embeds": EMBEDS}, "takes no text_embeds"),
        ({"mask": MASK}, "A mask needs image_latents"),
        ({"masked_image_latents": IMAGE}, "takes no masked_image_latents"),
        ({"image_latents": IMAGE}, "strength is missing"),
        ({"strength": 0.5}, "strength is for runs that start from a picture"),
        ({"image_latents": IMAGE, "strength": -0.5}, "strength must be a number above 0, up to 1"),
        ({"image_latents": IMAGE, "strength": 1.5}, "strength must be a number"),
        ({"image_latents": IMAGE, "strength": float("nan")}, "strength must be a number"),
        ({"image_latents": IMAGE, "strength": 0.2}, "leaves no step"),
        ({"image_latents": IMAGE[:, :3], "strength": 0.5}, "image_latents must be"),
        ({"image_latents": IMAGE * np.float32(np.inf), "strength": 0.5}, "image_latents holds NaN"),
        ({"image_latents": IMAGE, "strength": 0.5, "mask": MASK[:, :, 1:]}, "mask must be"),
        ({"image_latents": IMAGE, "strength": 0.5, "mask": MASK * 255}, "mask must lie between 0 and 1"),
        ({"latents": np.zeros((1, 4, 8, 6), np.float32)}, r"latents must be .* \[1, 4, 6, 8\]"),
        ({"latents": np.zeros((1, 4, 6, 8), np.int32)}, "latents must be"),
        ({"steps": 0}, "no table for this number of steps"),
        ({"steps": 13}, "no table for this number of steps"),
        ({"steps": "4"}, "steps"),
        ({"steps": 4.5}, "steps"),
        ({"sampler": "euler_b"}, "no such sampler"),
        ({"seed": -(2**63) - 1}, "not a seed"),
        ({"seed": 2**64}, "not a seed"),
        ({"seed": 1.5}, "not a seed"),
        ({"guidance_scale": None}, "needs a guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number"),
        *(
            ({"guidance_rescale": value}, "must be a number from 0 to 1")
            for value in (-0.1, 1.1, float("nan"), "1", True)
        ),
        ({"eta": 0.5}, "takes no eta"),
        ({"control": lambda _: {}}, "takes no ControlNet"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_is_refused_before_anything_runs(
    bundle: Bundle, backend: toy.ToyBackend, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(bundle, **changes)
    assert caught.value.exit_code == 2
    assert not backend.events


def test_a_bundle_without_guidance_takes_none(tmp_path: Path) -> None:
    kind = toy.Toy(guidance=False)
    with open_bundle(toy.make(tmp_path / "bundle", kind), backend=toy.ToyBackend()) as bundle:
        denoise = bundle.denoiser().denoise
        with pytest.raises(InputError, match="built without guidance"):
            denoise(**kind.given(), steps=1, seed=0, guidance_scale=7.5)
        with pytest.raises(InputError, match="takes no negative_prompt_embeds"):
            denoise(**kind.given(), negative_prompt_embeds=EMBEDS, steps=1, seed=0)
        off = denoise(**kind.given(), steps=1, seed=0, guidance_scale=0.0)
        assert np.array_equal(off, denoise(**kind.given(), steps=1, seed=0))


@pytest.mark.parametrize("missing", ["mask", "masked_image_latents"])
def test_inpainting_needs_its_channels(tmp_path: Path, missing: str) -> None:
    kind = toy.Toy(inpainting=True)
    given = {name: value for name, value in kind.given().items() if name != missing}
    bundle = open_bundle(toy.make(tmp_path / "bundle", kind), backend=toy.ToyBackend())
    with pytest.raises(InputError, match=f"^{missing} is missing"):
        bundle.denoiser().denoise(**given, steps=1, seed=0, guidance_scale=2.0)


def test_a_phase_without_a_graph_is_refused_before_anything_runs(bundle: Bundle, backend: toy.ToyBackend) -> None:
    bundle.manifest = dataclasses.replace(bundle.manifest, phases=bundle.manifest.phases[1:])
    with pytest.raises(BundleError, match="no graph for the phase strided_pooled"):
        run(bundle, steps=8)
    assert not backend.events


def test_a_picture_is_noised_and_phases_are_of_the_steps_left(bundle: Bundle, backend: toy.ToyBackend) -> None:
    seen: list[StepInfo] = []
    run(bundle, steps=12, seed=11, image_latents=IMAGE, strength=0.7, callback=seen.append)
    assert [info.phase.name for info in seen] == ["strided_pooled"] * 2 + ["strided"] * 2 + ["windowed"] * 4
    assert [(info.step, info.steps) for info in seen] == [(step, 8) for step in range(8)]
    generator = TorchGenerator(11)
    noised = bundle.sampler().schedule(12, strength=0.7).noised(IMAGE, generator.randn(IMAGE.shape))
    np.testing.assert_allclose(backend.calls[0][1]["latents"][0], noised[0] * 0.8, rtol=1e-6)
    uniforms = generator.rand(len(toy.BLOCKS))
    assert backend.calls[0][1]["window_shifts"].tolist() == [int(np.ceil(r * 4)) - 1 for r in uniforms]


def test_given_latents_are_the_noise_for_a_picture(bundle: Bundle) -> None:
    noise = TorchGenerator(1).randn(IMAGE.shape)
    given: dict[str, Any] = {"image_latents": IMAGE, "strength": 0.75, "mask": MASK}
    generator = TorchGenerator(1)
    generator.randn(IMAGE.shape)
    assert np.array_equal(run(bundle, **given), run(bundle, **given, seed=generator, latents=noise))
    assert not np.array_equal(run(bundle, **given), run(bundle, **given, seed=1, latents=noise * np.float32(0.5)))


@pytest.mark.parametrize("sampler", ["plain", "noisy", "second"])
def test_the_picture_comes_back_outside_the_mask(bundle: Bundle, backend: toy.ToyBackend, sampler: str) -> None:
    seen: list[StepInfo] = []
    given: dict[str, Any] = {"steps": 5, "sampler": sampler, "image_latents": IMAGE, "strength": 0.8}
    latents = run(bundle, **given, mask=MASK, callback=seen.append)
    schedule = bundle.sampler(sampler).schedule(5, strength=0.8)
    noise, kept = TorchGenerator(1).randn(IMAGE.shape), MASK[0, 0] == 0
    for done, (_, inputs) in enumerate(backend.calls):
        expected = schedule.noised(IMAGE, noise, done) * np.float32(0.8)
        np.testing.assert_allclose(inputs["latents"][:, :, kept], np.repeat(expected, 2, axis=0)[:, :, kept], rtol=1e-5)
    assert np.array_equal(latents[:, :, kept], IMAGE[:, :, kept])
    assert np.array_equal(seen[-1].latents, latents)
    assert not np.allclose(latents[:, :, ~kept], run(bundle, **given)[:, :, ~kept])
    assert np.array_equal(run(bundle, **given, mask=np.ones_like(MASK)), run(bundle, **given))


def test_inpainting_at_full_strength_starts_from_noise_alone(bundle: Bundle, backend: toy.ToyBackend) -> None:
    noise = TorchGenerator(1).randn(IMAGE.shape)
    run(bundle, image_latents=IMAGE, strength=1.0, mask=MASK)
    np.testing.assert_allclose(backend.calls[0][1]["latents"][0], noise[0] * 1.5 * 0.8, rtol=1e-6)
    backend.calls.clear()
    run(bundle, image_latents=IMAGE, strength=1.0)
    noised = bundle.sampler().schedule(4).noised(IMAGE, noise)
    np.testing.assert_allclose(backend.calls[0][1]["latents"][0], noised[0] * 0.8, rtol=1e-6)


def test_an_inpainting_unet_may_start_from_a_picture(tmp_path: Path) -> None:
    kind, backend = toy.Toy(inpainting=True, reference=False), toy.ToyBackend()
    given: dict[str, Any] = {**kind.given(), "steps": 4, "seed": 1, "guidance_scale": 3.0}
    with open_bundle(toy.make(tmp_path / "bundle", kind), backend=backend) as bundle:
        denoise = bundle.denoiser().denoise
        from_noise = denoise(**given)
        assert np.array_equal(denoise(**given, image_latents=IMAGE, strength=1.0), from_noise)
        backend.calls.clear()
        latents = denoise(**given, image_latents=IMAGE, strength=0.5)
        noised = bundle.sampler().schedule(4, strength=0.5).noised(IMAGE, TorchGenerator(1).randn(IMAGE.shape))
        np.testing.assert_allclose(backend.calls[0][1]["latents"][0, :4], noised[0] * 0.8, rtol=1e-6)
        assert np.array_equal(backend.calls[0][1]["latents"][0, 4:5], given["mask"][0])
        kept = given["mask"][0, 0] <= 0
        assert not np.allclose(latents[:, :, kept], IMAGE[:, :, kept])  # the UNet sees the mask; nothing is put back
        with pytest.raises(InputError, match="strength is for runs"):
            denoise(**given, strength=0.5)
