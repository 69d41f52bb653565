"""A toy bundle in a server: proof before readiness, watching, cancelling, deadlines, what is counted."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
import toy_sizes
from serving_sink import Counts
from toy_reference import record, record_others

from hidiff_runtime import BundleError, Cancelled, EngineError, Expired, InputError, ParityError, Pipeline
from hidiff_runtime.format.safetensors import SafetensorsFile, write
from hidiff_runtime.phases import StepRange
from hidiff_runtime.pipeline.pipeline import PictureStep, Result
from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.reused_features import Reuse
from hidiff_runtime.sampling.torch_rng import TorchGenerator
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.service import Service, Ticket, generation_metadata

PROMPT = "a lighthouse"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven(tmp_path_factory.mktemp("served") / "bundle")


def proven(folder: Path, kind: toy.Toy | None = None) -> Path:
    """A bundle with reference samples."""
    toy_pictures.make(folder, kind)
    record(folder, kind or toy.Toy())
    return folder


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def service(folder: Path, counts: Counts) -> Iterator[Service]:
    with Service.open(folder, backend=toy_pictures.Backend(), meter=MetricsRecorder(counts)) as opened:
        yield opened


class Spoilt(toy_pictures.Backend):
    """A machine whose engines compute something a little different."""

    def __init__(self) -> None:
        super().__init__(spoil=lambda outputs, _call: {name: array * 1.01 for name, array in outputs.items()})


def test_pictures_are_the_pipelines_with_the_same_seed(service: Service, folder: Path) -> None:
    served = service.generate(service.request({"prompt": PROMPT, "seed": 3, "steps": 4})).images[0]
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as pipe:
        assert np.array_equal(served, pipe(PROMPT, seed=3, steps=4))
        assert not np.array_equal(served, pipe(PROMPT, seed=4, steps=4))


def test_tells_what_a_picture_was_made_with(service: Service) -> None:
    result = service.generate(service.request({"prompt": PROMPT, "steps": 4}))
    assert generation_metadata(result)["prompt"] == PROMPT
    assert (
        generation_metadata(result)["seed"],
        generation_metadata(result)["steps"],
        generation_metadata(result)["guidance_scale"],
    ) == (0, 4, 7.5)


def test_is_ready_only_where_the_reference_samples_hold(folder: Path, counts: Counts) -> None:
    with pytest.raises(ParityError, match="do not compute what PyTorch computed"):
        Service.open(folder, backend=Spoilt(), meter=MetricsRecorder(counts))
    assert not counts.gauges


def test_a_bundle_without_reference_samples_is_never_ready(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no reference samples"):
        Service.open(toy_pictures.make(tmp_path / "bundle"), backend=toy_pictures.Backend())


def test_a_changed_file_is_found_before_anything_opens(tmp_path: Path) -> None:
    bundle = proven(tmp_path / "bundle")
    weights = bundle / "unet/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError):
        Service.open(bundle, backend=toy_pictures.Backend())


def test_warm_up_visits_every_phase(folder: Path) -> None:
    backend = toy_pictures.Backend()
    with Service.open(folder, backend=backend) as service:
        phases = {record.phase.name for record in service.pipeline.bundle.manifest.phases}
        drawn = [name for name, _ in backend.calls[-30:]]
        assert phases <= set(drawn)


def test_warm_up_takes_shallow_and_unguided_graphs_too(tmp_path: Path) -> None:
    backend = toy_pictures.Backend()
    kind = toy.Toy(guided=StepRange(0, 0.6), reuse=Reuse(2))
    with Service.open(proven(tmp_path / "bundle", kind), backend=backend) as service:
        names = [record.phase.name for record in service.pipeline.bundle.manifest.phases]
        drawn = [name for name, _ in backend.calls[-30:]]
        assert {name for name in names if "shallow" in name or "unguided" in name} <= set(drawn)


def test_the_parity_hash_is_that_of_the_picture(service: Service, folder: Path, counts: Counts) -> None:
    with Service.open(folder, backend=toy_pictures.Backend()) as other:
        assert other.parity_hash == service.parity_hash
    manifest = service.pipeline.bundle.manifest
    assert counts.gauges["hidiff_parity_info"] == [
        ({"bundle": manifest.digest, "parity": service.parity_hash, "backend": "toy"}, 1)
    ]
    fewest = min(steps for steps in manifest.steps if len(_phases(service, steps)) == len(manifest.phases))
    image = service.generate(service.request({"prompt": "warm-up", "steps": fewest})).images[0]
    assert hashlib.sha256(image.tobytes()).hexdigest() == service.parity_hash


def _phases(service: Service, steps: int) -> set[str]:
    request = service.request({"prompt": PROMPT, "steps": steps})
    return {phase.name for phase in request.phases(service.pipeline.bundle.manifest).phases}


@pytest.mark.parametrize(
    "kind",
    [toy.Toy(inpainting=True), toy.Toy(control=True), toy.Toy(sdxl=True), toy.Toy(guidance=False, sdxl=True)],
    ids=["inpainting", "control", "sdxl", "turbo"],
)
def test_every_task_warms_up(kind: toy.Toy, tmp_path: Path) -> None:
    with Service.open(proven(tmp_path / "bundle", kind), backend=toy_pictures.Backend()) as service:
        assert len(service.parity_hash) == 64


def test_the_observer_sees_each_step_and_a_preview(service: Service) -> None:
    seen: list[tuple[int, int, str]] = []

    def observe(step: PictureStep) -> None:
        seen.append((step.step, step.steps, step.phase.name))
        assert step.preview().size == (toy.WIDTH, toy.HEIGHT)

    service.generate(service.request({"prompt": PROMPT, "steps": 4}), observer=observe)
    assert seen == [(0, 4, "strided_pooled"), (1, 4, "strided"), (2, 4, "windowed"), (3, 4, "windowed")]


def test_counts_pictures_steps_and_seconds(service: Service, counts: Counts) -> None:
    service.generate(service.request({"prompt": PROMPT, "steps": 4}))
    assert counts.counters == {("hidiff_pictures_total", (("size", "64x48"),)): 1}
    steps = [labels for labels, seconds in counts.observed["hidiff_step_seconds"] if seconds >= 0]
    assert [labels["phase"] for labels in steps] == ["strided_pooled", "strided", "windowed", "windowed"]
    assert {labels["size"] for labels in steps} == {"64x48"}
    assert [labels for labels, _ in counts.observed["hidiff_request_seconds"]] == [{"size": "64x48"}]


def of_two_sizes(folder: Path) -> Path:
    toy_pictures.make(folder)
    record(folder, toy.Toy())
    toy_sizes.add_turned(folder)
    record_others(folder, toy.Toy())
    return folder


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return of_two_sizes(tmp_path_factory.mktemp("two") / "bundle")


def test_what_is_counted_tells_sizes_apart(two_sizes: Path, counts: Counts) -> None:
    with Service.open(two_sizes, backend=toy_pictures.Backend(), meter=MetricsRecorder(counts)) as service:
        assert counts.begun == {("hidiff_pictures_total", (("size", size),)) for size in ("64x48", "48x64")}
        for sides in ({}, {"width": 48, "height": 64}, {"width": 48, "height": 64}):
            service.generate(service.request({"prompt": PROMPT, "steps": 1, **sides}))
    assert counts.counters == {
        ("hidiff_pictures_total", (("size", "64x48"),)): 1,
        ("hidiff_pictures_total", (("size", "48x64"),)): 2,
    }
    for name in ("hidiff_step_seconds", "hidiff_request_seconds"):
        assert [labels["size"] for labels, _ in counts.observed[name]] == ["64x48", "48x64", "48x64"]


@pytest.mark.parametrize("options", [{}, {"resident": "all"}, {"memory_limit": 2**30}], ids=str)
def test_every_size_is_proven_and_the_first_alone_is_warmed_up(
    two_sizes: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    backend = toy_pictures.Backend()
    with Service.open(two_sizes, backend=backend, **options) as service:
        shapes = [inputs["latents"].shape[2:] for name, inputs in backend.calls if name == "decoder"]
        assert {shapes[-1]} == {(toy.HEIGHT, toy.WIDTH)}
        assert (toy.WIDTH, toy.HEIGHT) in shapes
        opened = backend.events.count("open strided")
        assert opened == 2 if options else opened > 2
        with Service.open(toy_sizes.alone(two_sizes, 0, tmp_path / "alone"), backend=toy_pictures.Backend()) as alone:
            assert alone.parity_hash == service.parity_hash


def test_a_wrong_sample_of_the_second_size_keeps_the_server_from_starting(tmp_path: Path, counts: Counts) -> None:
    folder = of_two_sizes(tmp_path / "bundle")
    tensors = folder / "reference/1/samples.safetensors"
    with SafetensorsFile.open(tensors) as file:
        arrays = {name: np.array(array) for name, array in file.arrays().items()}
    write(tensors, {name: array * np.float32(1.01) for name, array in arrays.items()})
    toy.seal(folder)
    with pytest.raises(ParityError, match="do not compute what PyTorch computed") as caught:
        Service.open(folder, backend=toy_pictures.Backend(), meter=MetricsRecorder(counts))
    assert "48x64" in str(caught.value.given)
    assert "64x48" not in str(caught.value.given)
    assert not counts.gauges
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(BundleError, match="its files are not those it was written with"):
        Service.open(folder, backend=toy_pictures.Backend())


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_cancelling_ends_at_the_next_step(service: Service, counts: Counts, after: int) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(Cancelled):
        service.generate(service.request({"prompt": PROMPT, "steps": 4}), cancelled=cancelled)
    assert asked == after + 1
    assert counts.counters == {("hidiff_cancellations_total", ()): 1}
    assert len(counts.observed.get("hidiff_step_seconds", ())) == after
    again = service.generate(service.request({"prompt": PROMPT, "steps": 4})).images[0]
    assert np.array_equal(again, service.generate(service.request({"prompt": PROMPT, "steps": 4})).images[0])


def test_whoever_leaves_a_run_of_several_is_told_so_while_it_goes_on(tmp_path: Path, counts: Counts) -> None:
    folder = toy_sizes.add_batch(proven(tmp_path / "bundle"), toy.Toy(), 2)
    record_others(folder, toy.Toy())
    told: list[object] = []
    with Service.open(folder, backend=toy_pictures.Backend(), meter=MetricsRecorder(counts)) as service:
        stays, goes = (service.request({"prompt": PROMPT, "steps": 4, "seed": seed}) for seed in (1, 2))
        watched = Ticket(stays, lambda step: told.append(step.step))
        leaves = Ticket(goes, cancelled=lambda: told == [0], left=told.append)
        picture, error = service.outcomes([watched, leaves])
        assert isinstance(error, Cancelled)
        assert told == [0, error, 1, 2, 3]
        assert isinstance(picture, Result)
        alone = service.generate(stays).images[0]
    assert np.abs(np.subtract(picture.images[0], alone, dtype=int)).max() <= 1
    assert counts.counters["hidiff_cancellations_total", ()] == 1


def test_an_observer_that_fails_cancels(service: Service, counts: Counts) -> None:
    def gone(_step: PictureStep) -> None:
        raise BrokenPipeError

    with pytest.raises(Cancelled):
        service.generate(service.request({"prompt": PROMPT, "steps": 4}), observer=gone)
    assert counts.counters == {("hidiff_cancellations_total", ()): 1}


def test_a_deadline_ends_the_run(service: Service, counts: Counts) -> None:
    request = service.request({"prompt": PROMPT, "steps": 4})
    with pytest.raises(Expired):
        service.generate(request, deadline=time.monotonic() - 1)
    assert counts.counters == {("hidiff_failures_total", (("kind", "expired"),)): 1}
    service.generate(request, deadline=time.monotonic() + 600)


@pytest.mark.parametrize("broken", ["noise_pred", "prompt_embeds", "image"])
def test_counts_what_was_refused_and_what_failed(folder: Path, counts: Counts, broken: str) -> None:
    backend = toy_pictures.Backend()
    with Service.open(folder, backend=backend, meter=MetricsRecorder(counts), limits=Limits(steps=8)) as service:
        with pytest.raises(InputError):
            service.request({"prompt": PROMPT, "steps": 9})
        backend.spoil = lambda outputs, _call: {
            name: array * (np.nan if name == broken else 1) for name, array in outputs.items()
        }
        with pytest.raises(EngineError):
            service.generate(service.request({"prompt": PROMPT, "steps": 4}))
    assert counts.counters == {
        ("hidiff_failures_total", (("kind", "input"),)): 1,
        ("hidiff_failures_total", (("kind", "engine"),)): 1,
    }


def test_a_cut_prompt_is_told_in_the_result_alone(service: Service) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = service.generate(service.request({"prompt": "b" * 200, "steps": 4}))
    assert result.cut
    assert generation_metadata(result)["cut"] == list(result.cut)


def test_a_seed_of_minus_one_is_drawn_anew_for_each_request(service: Service) -> None:
    values = {"prompt": PROMPT, "seed": -1, "steps": 4}
    seeds = [service.request(values).settings.seed for _ in range(3)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert values["seed"] == -1
    assert service.request({"prompt": PROMPT, "seed": 2**64 - 1}).settings.seed == 2**64 - 1


@pytest.mark.parametrize("seed", [-2, -(2**63), -(2**70), 2**64])
def test_a_seed_that_is_none_is_refused_and_says_how_to_ask_for_a_random_one(service: Service, seed: int) -> None:
    with pytest.raises(InputError, match=r"-1 for a random one") as refused:
        service.request({"prompt": PROMPT, "seed": seed})
    same = seed % 2**64
    assert (str(same) in refused.value.advice) == (-(2**63) <= seed < 0)
    if -(2**63) <= seed < 0:
        assert np.array_equal(TorchGenerator(seed).randn((4,)), TorchGenerator(same).randn((4,)))
