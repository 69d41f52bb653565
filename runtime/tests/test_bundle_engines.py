"""A bundle of two sizes below a memory limit: what is counted, what stays open, what opens ahead."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_device
import toy_pictures
import toy_sizes
from toy_sessions import PATIENCE

from hidiff_runtime import InputError, Pipeline
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.manifest import Manifest

PROMPT = "a lighthouse"
SIZES = ((toy_pictures.WIDTH, toy_pictures.HEIGHT), (toy_pictures.HEIGHT, toy_pictures.WIDTH))
PLENTY = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_sizes.add_turned(toy_pictures.make(tmp_path_factory.mktemp("sizes") / "bundle"))


class Stored(toy_pictures.Backend):
    """Engines that name their weight stores, as ONNX graphs do; each open session is noted by its file."""

    maps_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def files(self, engine: Path) -> tuple[Path, ...]:
        store = engine.parent / "weights.safetensors"
        return (engine, store) if store.exists() else (engine,)

    def device(self, _options: Any) -> toy.ToyDevice:
        return toy.ToyDevice(self, maps_weights=self.maps_weights)

    def open(self, engine: Path, weights: Any, record: Any) -> Any:
        self.opened.append(record.graph)
        return super().open(engine, weights, record)


class Mapped(Stored):
    """The same where sessions use stores as they lie on the disk."""

    maps_weights = True


def draw_alternately(folder: Path, backend: toy.ToyBackend, **options: Any) -> list[np.ndarray]:
    with Pipeline.open(folder, backend=backend, **options) as pipe:
        asked = [*SIZES, *SIZES, *SIZES]
        return [np.asarray(pipe(PROMPT, seed=3, steps=6, width=w, height=h)) for w, h in asked]


def bytes_of(folder: Path, *, mapped: bool) -> int:
    """What all engines take that pictures of both sizes need."""
    manifest = Manifest.read(folder)
    buckets = manifest.whole.manifests
    records = {
        record.graph: record
        for bucket in buckets
        for record in (*bucket.phases, *bucket.text_encoders, *([bucket.vae.decoder] if bucket.vae else []))
    }
    stores = [manifest.weights[Path(graph).parent.name] for graph in records]
    engines = sum(manifest.files[record.engines["toy"]].size for record in records.values())
    return engines + sum(manifest.files[store].size for store in (set(stores) if mapped else stores))


@pytest.mark.parametrize("kind", [Stored, Mapped])
def test_a_limit_that_holds_two_sizes_opens_each_engine_once(folder: Path, kind: type[Stored]) -> None:
    needed = bytes_of(folder, mapped=kind.maps_weights)
    found = {}
    for limit in (needed, needed - 1, None):
        backend = kind()
        found[limit] = draw_alternately(folder, backend, memory_limit=limit), Counter(backend.opened)
    pictures, opened = found[needed]
    phases = len(Manifest.read(folder).phases)
    assert (len(opened), set(opened.values())) == (2 * phases + 3, {1})
    for limit in (needed - 1, None):
        others, again = found[limit]
        assert max(again.values()) > 1
        assert all(map(np.array_equal, pictures, others))
    assert sum(found[None][1].values()) > sum(found[needed - 1][1].values())
    assert min(found[None][1].values()) == 3


def test_a_store_counts_once_for_all_that_map_it_alone(folder: Path) -> None:
    mapped, own = bytes_of(folder, mapped=True), bytes_of(folder, mapped=False)
    assert mapped < own
    backend = Stored()
    draw_alternately(folder, backend, memory_limit=mapped)
    assert max(Counter(backend.opened).values()) > 1


def test_a_limit_below_one_phase_is_as_none(folder: Path) -> None:
    events = []
    for limit in (1, None):
        backend = toy_pictures.Backend()
        draw_alternately(folder, backend, memory_limit=limit)
        events.append(backend.events)
    assert events[0] == events[1]
    assert len(events[0]) > 40


def test_a_request_of_another_size_waits_and_closes_nothing_of_the_run_before(folder: Path) -> None:
    """With a limit that holds one phase alone, so that each engine of the other size would close this one's."""
    inside, go_on = threading.Event(), threading.Event()

    def hold(outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
        if "noise_pred" in outputs and outputs["noise_pred"].shape[2] == toy.HEIGHT and not inside.is_set():
            inside.set()
            assert go_on.wait(PATIENCE)
        return outputs

    backend = toy_pictures.Backend(spoil=hold)
    drawn: dict[tuple[int, int], Any] = {}

    with Pipeline.open(folder, backend=backend, memory_limit=1) as pipe:

        def draw(size: tuple[int, int]) -> None:
            drawn[size] = pipe(PROMPT, steps=4, width=size[0], height=size[1])

        first, second = (threading.Thread(target=draw, args=(size,)) for size in SIZES)
        first.start()
        assert inside.wait(PATIENCE)
        events = list(backend.events)
        held = pipe.bundle.open_phases
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert backend.events == events
        assert pipe.bundle.open_phases == held != ()
        go_on.set()
        first.join(PATIENCE)
        second.join(PATIENCE)
    assert {size: image.size for size, image in drawn.items()} == {size: size for size in SIZES}


@pytest.mark.parametrize("value", [0, -1, True, "6GiB", float("nan"), 1e9])
def test_what_is_no_number_of_bytes_is_refused(folder: Path, value: Any) -> None:
    with pytest.raises(InputError, match="memory_limit must be a whole number of bytes") as caught:
        open_bundle(folder, backend=toy_pictures.Backend(), memory_limit=value)
    assert caught.value.given == repr(value)


def test_it_does_not_go_with_all(folder: Path) -> None:
    with pytest.raises(InputError, match="memory_limit does not go with resident='all'"):
        open_bundle(folder, backend=toy_pictures.Backend(), resident="all", memory_limit=PLENTY)


def phases_of(folder: Path) -> list[list[str]]:
    return [[record.graph for record in bucket.phases] for bucket in Manifest.read(folder).whole.manifests]


def test_every_buckets_engines_open_ahead_where_all_stay(folder: Path) -> None:
    first, second = phases_of(folder)
    backend = Stored()
    with open_bundle(folder, backend=backend, resident="all", preload=True):
        assert backend.opened == [*first, *second]
    backend = Stored()
    with open_bundle(folder, backend=backend, resident="all") as bundle:
        bundle.sized(*SIZES[1]).preload()
        assert backend.opened == [*second, *first]


@pytest.mark.parametrize("held", [1, 2, 4, 6])
def test_with_a_limit_the_first_that_fit_open_ahead(folder: Path, held: int) -> None:
    manifest = Manifest.read(folder)
    records = [record for bucket in manifest.whole.manifests for record in bucket.phases]
    sizes = [manifest.files[record.engines["toy"]].size for record in records]
    for limit, count in ((sum(sizes[:held]), held), (sum(sizes[:held]) - 1, max(1, held - 1))):
        backend = Stored()
        backend.files = lambda engine: (engine,)  # type: ignore[method-assign]
        with open_bundle(folder, backend=backend, memory_limit=limit, preload=True) as bundle:
            assert set(backend.opened) == {record.graph for record in records[:count]}
            assert len(backend.opened) == count
            assert set(bundle._engines.open_graphs) == set(backend.opened)


def test_on_a_device_each_buckets_step_graph_opens_ahead(tmp_path: Path) -> None:
    folder = toy_sizes.add_turned(toy.make(tmp_path / "bundle", toy.Toy(reference=False)))
    with open_bundle(folder, backend=toy_device.Backend(), resident="all", preload=True) as bundle:
        steps = {bucket.manifest.step.graph for bucket in bundle.buckets if bucket.manifest.step}
        assert len(steps) == 2
        assert steps < set(bundle._engines.open_graphs)
        assert len(bundle._engines.open_graphs) == 2 * len(bundle.manifest.phases) + 2


def test_pictures_are_the_same_on_a_device_with_any_limit(tmp_path: Path) -> None:
    kind = toy.Toy(reference=False)
    folder = toy_sizes.add_turned(toy.make(tmp_path / "bundle", kind))
    given: dict[str, Any] = {**kind.given(), "steps": 8, "seed": 1, "guidance_scale": 3.0}
    found = []
    for options in ({}, {"memory_limit": 1}, {"memory_limit": 150, "prefetch": True}, {"memory_limit": PLENTY}):
        with open_bundle(folder, backend=toy_device.Backend(), **options) as bundle:
            drawn = [bucket.denoiser().denoise(**given) for bucket in (*bundle.buckets, *bundle.buckets)]
        assert np.array_equal(drawn[0], drawn[2])
        found.append(drawn)
    for drawn in found[1:]:
        assert all(map(np.array_equal, found[0], drawn))
