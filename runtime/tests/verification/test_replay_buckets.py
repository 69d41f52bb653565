"""Reference samples of a bundle of two sizes: each bucket is asked, or those that are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy
import toy_pictures
import toy_reference
import toy_sizes

from hidiff_runtime import BundleError, InputError, check
from hidiff_runtime.bundle import open as open_bundle
from hidiff_runtime.serving.service import Service


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("pristine") / "bundle")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "bundle")


def made(folder: Path) -> Path:
    toy_pictures.make(folder, toy.Toy())
    toy_reference.record(folder, toy.Toy())
    toy_sizes.add_turned(folder)
    toy_reference.record_others(folder, toy.Toy())
    return folder


def test_every_bucket_is_asked_and_named(pristine: Path) -> None:
    report = check(pristine, backend=toy_pictures.Backend())
    assert report.ok, report.render()
    assert {verdict.bucket for verdict in report.verdicts} == {"64x48", "48x64"}
    assert {"64x48", "48x64"} <= set(report.render().split())
    assert report.to_dict()["verdicts"][-1]["bucket"] == "48x64"


def test_those_that_are_named_alone(pristine: Path) -> None:
    report = check(pristine, backend=toy_pictures.Backend(), sizes=[(48, 64)])
    assert report.ok
    assert {verdict.bucket for verdict in report.verdicts} == {"48x64"}
    with pytest.raises(InputError, match="no such width and height"):
        check(pristine, backend=toy_pictures.Backend(), sizes=[(8, 8)])


def test_a_bundle_of_one_size_has_no_column_for_it(tmp_path: Path, pristine: Path) -> None:
    alone = toy_sizes.alone(pristine, 0, tmp_path / "alone")
    report = check(alone, backend=toy_pictures.Backend())
    assert report.ok
    assert "bucket" not in report.render()
    assert not any("bucket" in verdict for verdict in report.to_dict()["verdicts"])


def test_a_wrong_engine_of_the_second_bucket_is_found_there(folder: Path) -> None:
    engine = folder / "unet/windowed-turned.toy"
    engine.write_text(json.dumps({"phase": "strided"}))
    toy.seal(folder)
    report = check(folder, backend=toy_pictures.Backend())
    failed = [verdict for verdict in report.verdicts if not verdict.ok]
    assert [(verdict.bucket, verdict.phase) for verdict in failed] == [("48x64", "windowed")]
    with pytest.raises(Exception, match="do not compute what PyTorch computed"):
        Service.open(folder, backend=toy_pictures.Backend())


def test_a_bucket_without_samples_is_refused(folder: Path) -> None:
    toy_sizes.without_second_reference(folder)
    with pytest.raises(BundleError, match="no reference samples"):
        check(folder, backend=toy_pictures.Backend())
    with open_bundle(folder, backend=toy_pictures.Backend()) as bundle:
        assert check(bundle, sizes=[(64, 48)]).ok
