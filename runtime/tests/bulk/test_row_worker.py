"""A worker of a bulk job on the toy bundle: what it makes, what it finds made, and what it cannot do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import toy
import toy_pictures
from PIL import Image
from toy_reference import record

from hidiff_runtime import EngineError, Pipeline
from hidiff_runtime.bulk import row_worker as maker_module
from hidiff_runtime.bulk.row_worker import MOST_ATTEMPTS, Outcome, RowWorker, Work
from hidiff_runtime.bulk.rows import Row
from hidiff_runtime.bulk.storage import Location
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.image_metadata import encoded
from hidiff_runtime.pipeline.pipeline import Result
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.serving.service import Service

pytestmark = pytest.mark.needs("pyarrow")

MakeMaker = Callable[..., RowWorker]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = toy_pictures.make(tmp_path_factory.mktemp("bulk") / "bundle")
    record(made, toy.Toy())
    return made


@pytest.fixture
def begun() -> Counter[int]:
    return Counter()


@pytest.fixture
def worker(folder: Path, tmp_path: Path, begun: Counter[int]) -> MakeMaker:
    """Makes workers that write into the same place and know of each other's beginnings."""

    def begin(row: int) -> int:
        begun[row] += 1
        return begun[row]

    def end() -> NoReturn:
        raise Ended

    def make(backend: toy.ToyBackend | None = None, home: Path = folder, **changes: Any) -> RowWorker:
        manifest = Manifest.read(home)
        given: dict[str, Any] = {
            "folder": str(home),
            "opening": {"backend": backend or toy_pictures.Backend()},
            "bundle": manifest.digest,
            "batch": manifest.batch,
            "output": Location(str(tmp_path / "out")),
            "inputs": Location(str(tmp_path)),
            **changes,
        }
        return RowWorker(Work(**given), begin, end)

    return make


def row(row_id: str = "a", **values: Any) -> Row:
    return Row(0, "line 1", row_id, {"prompt": "a lighthouse", "seed": 3, "steps": 4, **values})


def pixels(tmp_path: Path, file: str = "pictures/a.png") -> np.ndarray:
    with Image.open(tmp_path / "out" / file) as image:
        return np.asarray(image)


class Ended(BaseException):
    """The worker's process ended."""


class Failing(toy_pictures.Backend):
    """UNet engines that give NaN as often as ``left`` says."""

    def __init__(self) -> None:
        super().__init__(spoil=self._spoil)
        self.left = 0

    def _spoil(self, outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
        if self.left == 0 or "noise_pred" not in outputs:
            return outputs
        self.left -= 1
        return {name: np.full_like(array, np.nan) for name, array in outputs.items()}


def test_a_picture_is_the_pipelines_and_tells_its_row(worker: MakeMaker, folder: Path, tmp_path: Path) -> None:
    outcome = worker().make(row())
    (picture,) = outcome.pictures
    with Pipeline.open(folder, backend=toy_pictures.Backend()) as pipe:
        assert np.array_equal(pixels(tmp_path), pipe("a lighthouse", seed=3, steps=4))
        assert not np.array_equal(pixels(tmp_path), pipe("a lighthouse", seed=4, steps=4))
    content = (tmp_path / "out" / picture.file).read_bytes()
    assert (picture.id, picture.seed, picture.bytes, outcome.attempts) == ("a", 3, len(content), 1)
    assert json.loads(picture.parameters)["prompt"] == "a lighthouse"
    with Image.open(tmp_path / "out" / picture.file) as image:
        assert json.loads(image.info["hidiff"])["bulk"]["row"] == picture.fingerprint
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_a_picture_that_is_there_is_found_without_opening_anything(worker: MakeMaker, begun: Counter[int]) -> None:
    first = worker().make(row()).pictures[0]
    backend = toy_pictures.Backend()
    outcome = worker(backend).make(row())
    (found,) = outcome.pictures
    assert (found.sha256, found.fingerprint, found.seconds) == (first.sha256, first.fingerprint, None)
    assert (outcome.attempts, backend.events, begun[0]) == (0, [], 1)


@pytest.mark.parametrize("fault", ["other row", "cut short", "painted over", "no text", "no picture"])
def test_a_picture_that_is_not_the_rows_is_made_again(worker: MakeMaker, tmp_path: Path, fault: str) -> None:
    worker().make(row(prompt="a tree") if fault == "other row" else row())
    path = tmp_path / "out/pictures/a.png"
    content = path.read_bytes()
    with Image.open(path) as image:
        image.load()
    if fault == "cut short":
        path.write_bytes(content[:-20])
    elif fault == "painted over":
        image.putpixel((0, 0), (1, 2, 3))
        path.write_bytes(encoded(image))  # with all its text
    elif fault == "no text":
        image.info.clear()
        path.write_bytes(encoded(image))
    elif fault == "no picture":
        path.write_text("none")
    outcome = worker().make(row())
    assert outcome.attempts == 2  # not found, but made
    assert outcome.pictures[0].seconds is not None
    worked = pixels(tmp_path)
    assert worker().make(row("b")).pictures
    assert np.array_equal(worked, pixels(tmp_path, "pictures/b.png"))


def test_a_batch_has_a_file_for_each_picture(worker: MakeMaker, tmp_path: Path) -> None:
    kind = toy.Toy(batch=2)
    bundle = toy_pictures.make(tmp_path / "batch", kind)
    record(bundle, kind)
    outcome = worker(home=bundle).make(row("x/y"))
    assert [picture.file for picture in outcome.pictures] == ["pictures/x%2Fy.0.png", "pictures/x%2Fy.1.png"]
    assert worker(home=bundle).make(row("x/y")).attempts == 0
    (tmp_path / "out/pictures/x%2Fy.1.png").unlink()
    assert worker(home=bundle).make(row("x/y")).attempts == 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"steps": 99}, "no table"),
        ({"prompt": " "}, "prompt is empty"),
        ({"image": "none.png"}, "image is not there"),
        ({"image": "broken.png"}, "no picture that can be read"),
        ({"image": "data:;base64,AAAA"}, "no picture that can be read"),
        ({"image": "small.png"}, "not of the bundle's size"),
        ({"control_image": "small.png"}, "no ControlNet"),
        ({"seed": 2**64}, "seed must be a whole number from 0"),
        ({"guidance_scale": 1e39}, "guidance_scale must be a number from -1000 to 1000"),
        ({"conditioning_scale": -1e39}, "conditioning_scale must be a number from -1000 to 1000"),
        ({"image": "small.png\0"}, "image cannot be read"),
    ],
)
def test_a_row_that_is_wrong_has_a_dead_letter(
    worker: MakeMaker, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    (tmp_path / "broken.png").write_text("none")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    made = worker()
    assert made.make(row("first")).pictures
    opened = made._service
    (tmp_path / "out/pictures/first.png").unlink()
    outcome = made.make(row(**values))
    assert made._service is opened  # which a failing engine is not
    assert outcome.letter is not None
    assert reason in outcome.letter.reason
    assert outcome.letter.kind == "input"
    assert not list((tmp_path / "out/pictures").iterdir())
    assert Outcome.from_json(outcome.to_json()) == outcome
    assert made.make(row()).pictures  # the next one is made


def test_pictures_to_start_from_are_read_where_the_prompts_are(worker: MakeMaker, tmp_path: Path) -> None:
    Image.new("RGB", (toy_pictures.WIDTH, toy_pictures.HEIGHT), (200, 30, 90)).save(tmp_path / "in.png")
    outcome = worker().make(row(image="in.png", strength=0.5))
    assert json.loads(outcome.pictures[0].parameters)["given"] == ["image"]
    assert worker().make(row("b", image=str(tmp_path / "in.png"), strength=0.5)).pictures
    assert np.array_equal(pixels(tmp_path), pixels(tmp_path, "pictures/b.png"))


def test_an_engine_that_fails_once_is_proven_anew(worker: MakeMaker) -> None:
    backend = Failing()
    made = worker(backend)
    assert made.make(row("first")).pictures
    backend.left = 1
    outcome = made.make(row())
    assert outcome.pictures
    assert outcome.attempts == 2  # both rows have the number 0


def test_an_engine_that_fails_for_good_ends_its_process_for_another_to_be_proven(worker: MakeMaker) -> None:
    backend = Failing()
    made = worker(backend)
    assert made.make(row("first")).pictures
    backend.left = 10**9
    with pytest.raises(Ended):
        made.make(row())
    outcome = worker(backend).make(row())  # the next one, on the same machine
    assert outcome.fault is not None
    assert outcome.fault.error().exit_code == 1


def test_a_row_that_fails_on_a_machine_that_is_proven_twice_has_a_dead_letter(
    worker: MakeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = worker()
    assert made.make(row("first")).pictures
    real = Service.generate

    def fail(service: Service, request: Request) -> Result:
        if request.prompts == ("bad",):
            raise EngineError("It gave NaN.", advice="Ask for another.")
        return real(service, request)

    monkeypatch.setattr(Service, "generate", fail)
    outcome = made.make(row(prompt="bad"))
    assert outcome.letter is not None
    assert (outcome.letter.kind, outcome.letter.reason) == ("engine", "It gave NaN.")
    assert outcome.letter.advice == "Ask for another."
    assert made.make(row("b")).pictures


def test_a_machine_that_computes_something_else_makes_nothing(worker: MakeMaker, tmp_path: Path) -> None:
    spoilt = toy_pictures.Backend(spoil=lambda outputs, _: {name: array * 1.01 for name, array in outputs.items()})
    outcome = worker(spoilt).make(row())
    assert outcome.fault is not None
    assert (outcome.fault.name, outcome.fault.error().exit_code) == ("ParityError", 1)
    assert not (tmp_path / "out").exists()


def test_another_bundle_or_version_is_a_fault(worker: MakeMaker, tmp_path: Path) -> None:
    for changes, message, code in (
        ({"bundle": "0" * 64}, "another bundle", 4),
        ({"version": "0.0.0"}, "another version", 5),
        ({"folder": str(tmp_path / "nowhere")}, "", 4),
        ({"opening": {"backend": toy_pictures.Backend(), "verify": "nothing"}}, "verify", 2),
    ):
        outcome = worker(**changes).make(row())
        assert outcome.fault is not None
        assert message in outcome.fault.summary
        assert outcome.fault.error().exit_code == code


def test_an_output_that_cannot_be_written_is_a_fault(worker: MakeMaker, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pictures").write_text("a file")
    outcome = worker().make(row())
    assert outcome.fault is not None
    assert outcome.fault.error().exit_code == 6


def test_a_row_that_was_begun_too_often_is_given_up(worker: MakeMaker, begun: Counter[int]) -> None:
    begun[0] = MOST_ATTEMPTS - 1
    assert worker().make(row()).pictures
    outcome = worker().make(row("b"))
    assert outcome.letter is not None
    assert outcome.letter.kind == "died"


def test_what_nobody_expected_is_told_of_the_row(worker: MakeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(maker_module, "request_values", fail)
    outcome = worker().make(row())
    assert outcome.letter is not None
    assert (outcome.letter.kind, outcome.letter.reason) == ("internal", "ZeroDivisionError: by nought")
