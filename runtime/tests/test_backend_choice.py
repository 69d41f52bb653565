"""The fastest backend that is here runs a bundle, by times that are kept; one that is named is obeyed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import toy

from hidiff_runtime import BundleError, EngineError, InputError, backend_choice, backends
from hidiff_runtime.backend_choice import BackendChoice, Measured
from hidiff_runtime.backends.protocol import Availability
from hidiff_runtime.format.manifest import Contents, GraphRecord, Manifest

NAMES = ("first", "second")


@dataclass
class Backend(toy.ToyBackend):
    """A toy that may be missing here, and has an option of its own."""

    here: bool = True
    version: str = "1"

    def available(self) -> Availability:
        return Availability(self.here, f"{self.name} {self.version}", "" if self.here else "Install it.")

    def device(self, options: Any) -> toy.ToyDevice:
        if set(options) - {"threads", self.name}:
            raise InputError("There is no such option.", given=sorted(options))
        return super().device(options)


@dataclass
class Clock:
    """Times backends as it is told to, and counts how often."""

    seconds: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, names: Sequence[str]) -> Measured:
        self.asked.append(tuple(names))
        return Measured({name: self.seconds[name] for name in names if name not in self.failed}, self.failed)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Backend]:
    """The backends of this machine, whose cache is the test's own."""
    found = {name: Backend(name=name) for name in NAMES}
    monkeypatch.setattr(backends, "NAMES", NAMES)
    monkeypatch.setattr(backends, "get", found.__getitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def bundle(folder: Path, *, names: Sequence[str] = NAMES, timed: bool = True) -> tuple[Path, Contents]:
    """A toy with engines of these backends."""
    manifest = Manifest.read(toy.make(folder))
    phases = []
    for record in manifest.phases:
        content = (folder / record.engines["toy"]).read_text()
        engines = {name: f"unet/{record.phase.name}.{name}" for name in names}
        for path in engines.values():
            (folder / path).write_text(content)
        phases.append(replace(record, engines=engines))
    phase = phases[-1]
    timing = GraphRecord(phase.graph, phase.engines, phase.inputs, phase.outputs) if timed else None
    return folder, toy.seal(folder, replace(manifest, phases=tuple(phases), timing=timing)).whole


def choose(
    made: tuple[Path, Contents], clock: Clock | None, wanted: str | None = None, **options: Any
) -> BackendChoice:
    return backend_choice.choose(*made, wanted, options, clock)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [((2.0, 1.0), "second"), ((1.0, 2.0), "first"), ((1.0, 0.98), "first"), ((1.0, 0.96), "second")],
)
def test_the_fastest_is_chosen_and_near_ties_go_to_the_preferred(
    here: dict[str, Backend], tmp_path: Path, seconds: tuple[float, float], chosen: str
) -> None:
    choice = choose(bundle(tmp_path / "bundle"), Clock(dict(zip(NAMES, seconds, strict=True))))
    assert choice.backend is here[chosen]
    assert choice.reason.startswith("the fastest here")
    assert all(f"{name} {value:.3g} s" in choice.reason for name, value in zip(NAMES, seconds, strict=True))


@pytest.mark.usefixtures("here")
def test_times_are_measured_once_and_kept_beside_the_bundle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, clock = bundle(tmp_path / "bundle"), Clock({"first": 2.0, "second": 1.0})
    with caplog.at_level(logging.INFO):
        before = choose(made, clock)
    (kept,) = (tmp_path / "bundle.cache").iterdir()
    assert [record.getMessage() for record in caplog.records] == [
        "Timing first and second on this machine, once. --backend NAME (backend= in Python) skips that.",
        f"second: {before.reason}; kept in {kept}",
    ]
    assert clock.asked == [NAMES]
    assert choose(made, clock) == choose(made, None) == before
    assert clock.asked == [NAMES]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", ["bundle", "version", "processor", "cores", "options"])
def test_times_of_other_circumstances_say_nothing(
    here: dict[str, Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    made, clock, options = bundle(tmp_path / "bundle"), Clock({"first": 2.0, "second": 1.0}), {}
    choose(made, clock)
    if change == "bundle":
        made = made[0], toy.seal(made[0], replace(made[1].manifests[0], precision="float16")).whole
    elif change == "version":
        here["second"].version = "2"
    elif change == "options":
        options = {"threads": 1}
    else:
        name = {"processor": "processor_model", "cores": "usable_cores"}[change]
        monkeypatch.setattr(backend_choice, name, lambda: 99)
    assert choose(made, None, **options).reason.startswith("the first that can run here, until")
    clock.seconds["second"] = 3.0
    assert choose(made, clock, **options).backend.name == "first"
    assert len(clock.asked) == 2
    assert len([*(tmp_path / "bundle.cache").iterdir()]) == 2


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"measured_for": [], "seconds": {}, "format": 1}', "\x00"])
def test_a_broken_file_is_measured_anew(tmp_path: Path, content: str) -> None:
    made, clock = bundle(tmp_path / "bundle"), Clock({"first": 2.0, "second": 1.0})
    choose(made, clock)
    (kept,) = (tmp_path / "bundle.cache").iterdir()
    whole = kept.read_text()
    kept.write_text(content)
    assert choose(made, clock).backend.name == "second"
    assert len(clock.asked) == 2
    assert kept.read_text() == whole


@pytest.mark.usefixtures("here")
def test_beside_a_bundle_that_nothing_can_be_written_to_the_users_cache_is_used(tmp_path: Path) -> None:
    made, clock = bundle(tmp_path / "bundle"), Clock({"first": 2.0, "second": 1.0})
    (tmp_path / "bundle.cache").write_text("a file where the folder would be")
    choose(made, clock)
    (kept,) = (tmp_path / "cache/hidiff-runtime").iterdir()
    assert json.loads(kept.read_text())["seconds"] == clock.seconds
    choose(made, clock)
    assert len(clock.asked) == 1


@pytest.mark.usefixtures("here")
def test_where_nothing_can_be_written_each_process_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, clock = bundle(tmp_path / "bundle"), Clock({"first": 2.0, "second": 1.0})
    (tmp_path / "bundle.cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "bundle.cache"))
    assert [choose(made, clock).backend.name for _ in range(2)] == ["second", "second"]
    assert len(clock.asked) == 2


@pytest.mark.usefixtures("here")
def test_one_that_fails_is_left_out_and_tried_again(tmp_path: Path) -> None:
    made = bundle(tmp_path / "bundle")
    choice = choose(made, Clock({"first": 1.0, "second": 2.0}, {"first": "its driver is too old"}))
    assert choice.backend.name == "second"
    assert choice.reason.endswith("first: its driver is too old")
    assert not (tmp_path / "bundle.cache").exists()
    none = choose(made, Clock({}, dict.fromkeys(NAMES, "no memory")))
    assert none.backend.name == "first"
    assert "timing failed" in none.reason
    assert choose(made, Clock({"first": 1.0, "second": 2.0})).backend.name == "first"


def test_nothing_is_timed_where_there_is_no_choice(here: dict[str, Backend], tmp_path: Path) -> None:
    made, clock = bundle(tmp_path / "bundle"), Clock({})
    named = choose(made, clock, "second")
    assert (named.backend, named.reason) == (here["second"], "it was named")
    own = choose(made, clock, first=1)
    assert (own.backend, own.reason) == (here["first"], "no other that can run here takes first")
    with pytest.raises(InputError, match="no such option"):
        choose(made, clock, nobodys=1).backend.device({"nobodys": 1})
    here["first"].here = False
    assert choose(made, clock).backend is here["second"]
    alone = choose(bundle(tmp_path / "alone", names=["second"]), clock)
    assert (alone.backend, alone.reason) == (here["second"], "the bundle has engines of no other")
    here["second"].here = False
    with pytest.raises(EngineError, match="first cannot run here"):
        choose(made, clock)
    with pytest.raises(EngineError, match="second cannot run here"):
        choose(made, clock, "second")
    assert not clock.asked


@pytest.mark.usefixtures("here")
def test_a_bundle_from_before_is_run_by_the_first(tmp_path: Path) -> None:
    made, clock = bundle(tmp_path / "bundle", timed=False), Clock({})
    choice = choose(made, clock)
    assert choice.backend.name == "first"
    assert "from before backends were timed" in choice.reason
    assert not clock.asked


@pytest.mark.usefixtures("here")
def test_backends_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no engines that this hidiff-runtime knows"):
        choose(bundle(tmp_path / "bundle", names=["later"]), None)
