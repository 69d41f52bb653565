from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import toy

from hidiff_runtime import BundleError, EngineError, InputError, Phase, PhaseKind
from hidiff_runtime import open as open_bundle
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import verify_files
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest

STRIDED, WINDOWED = Phase(PhaseKind.STRIDED), Phase(PhaseKind.WINDOWED)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("pristine") / "bundle")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_one_engine_at_a_time_unless_all_may_stay(folder: Path) -> None:
    backend = toy.ToyBackend()
    with open_bundle(folder, backend=backend) as bundle:
        assert bundle.open_phases == ()
        bundle.engine(STRIDED)
        bundle.engine(STRIDED)
        bundle.engine(WINDOWED)
        assert bundle.open_phases == (WINDOWED,)
        assert backend.events == ["open strided", "close strided", "open windowed"]
    assert backend.events[-1] == "close windowed"

    backend = toy.ToyBackend()
    with open_bundle(folder, backend=backend, resident="all") as bundle:
        bundle.engine(STRIDED)
        bundle.engine(WINDOWED)
        bundle.engine(STRIDED)
        assert backend.events == ["open strided", "open windowed"]
    assert sorted(backend.events[2:]) == ["close strided", "close windowed"]


@pytest.mark.parametrize(
    ("resident", "opened"),
    [("current", ["open strided_pooled"]), ("all", ["open strided_pooled", "open strided", "open windowed"])],
)
def test_engines_open_ahead_when_asked(folder: Path, resident: str, opened: list[str]) -> None:
    backend = toy.ToyBackend()
    with open_bundle(folder, backend=backend, resident=resident, preload=True):
        assert backend.events == opened


def test_engines_that_opened_ahead_are_closed_where_another_does_not_open(folder: Path) -> None:
    backend = toy.ToyBackend()
    engine = folder / "unet/strided.toy"
    engine.write_text("?" * engine.stat().st_size)
    with pytest.raises(BundleError, match=r"strided.toy has changed"):
        open_bundle(folder, backend=backend, verify="size", resident="all", preload=True)
    assert backend.events == ["open strided_pooled", "close strided_pooled"]


def test_a_closed_bundle_opens_its_engines_again(folder: Path) -> None:
    backend = toy.ToyBackend()
    bundle = open_bundle(folder, backend=backend)
    bundle.engine(STRIDED)
    bundle.close()
    bundle.close()
    bundle.engine(STRIDED)
    assert backend.events == ["open strided", "close strided", "open strided"]


def test_an_engine_that_failed_to_open_is_tried_again(folder: Path) -> None:
    backend = toy.ToyBackend()
    bundle = open_bundle(folder, backend=backend, verify="size")
    bundle.engine(STRIDED)
    engine = folder / "unet/windowed.toy"
    content = engine.read_text()
    engine.write_text(content + " ")
    with pytest.raises(BundleError, match=r"unet/windowed.toy has \d+ bytes"):
        bundle.engine(WINDOWED)
    engine.write_text(content)
    bundle.engine(WINDOWED)
    assert bundle.open_phases == (WINDOWED,)


@pytest.mark.parametrize("option", [{"verify": "none"}, {"resident": "some"}, {"backend": "tensorflow"}], ids=str)
def test_an_unknown_option_is_refused(folder: Path, option: dict[str, str]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))}.*"):
        open_bundle(folder, **{"backend": toy.ToyBackend(), **option})  # type: ignore[arg-type]


def test_a_backend_without_engines_here_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="no engines of this backend") as caught:
        open_bundle(folder, backend=toy.ToyBackend(name="other"))
    assert "toy" in caught.value.advice


def test_a_bundle_with_engines_for_some_graphs_alone_is_broken(folder: Path) -> None:
    manifest = Manifest.read(folder)
    first, *others = manifest.phases
    renamed = dataclasses.replace(first, engines={"other": first.engines["toy"]})
    toy.seal(folder, dataclasses.replace(manifest, phases=(renamed, *others)))
    with pytest.raises(BundleError, match="has engines of toy, but not for all of its graphs") as caught:
        open_bundle(folder, backend=toy.ToyBackend())
    assert first.graph in str(caught.value.given)


def test_no_flipped_bit_in_any_file_goes_unnoticed(folder: Path) -> None:
    for path in files_of(folder):
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            flipped = bytearray(whole)
            flipped[place] ^= 4
            path.write_bytes(flipped)
            with pytest.raises(BundleError) as caught:
                open_bundle(folder, backend=toy.ToyBackend())
            assert caught.value.exit_code == 4
            assert path.name in str(caught.value)
        path.write_bytes(whole)
    open_bundle(folder, backend=toy.ToyBackend())


def test_a_flipped_bit_in_an_engine_is_noticed_where_only_sizes_were_checked(folder: Path) -> None:
    engine = folder / "unet/strided.toy"
    flipped = bytearray(engine.read_bytes())
    flipped[-3] ^= 1
    engine.write_bytes(flipped)
    bundle = open_bundle(folder, backend=toy.ToyBackend(), verify="size")
    with pytest.raises(BundleError, match=r"unet/strided.toy has changed"):
        bundle.engine(STRIDED)


def test_every_file_that_an_engine_names_is_checked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in two parts, one of them shared: only sizes were checked when the bundle was opened."""
    (folder / "unet/shared.part").write_text("weights")
    toy.seal(folder)
    hashed: list[str] = []
    of = FileDigest.of
    monkeypatch.setattr(FileDigest, "of", lambda path: hashed.append(path.name) or of(path))

    class Backend(toy.ToyBackend):
        def files(self, engine: Path) -> tuple[Path, ...]:
            return engine, engine.with_name("shared.part")

    with open_bundle(folder, backend=Backend(), verify="size") as bundle:
        for phase in (STRIDED, WINDOWED, STRIDED):
            bundle.engine(phase)
    tables = ["plain.safetensors", "noisy.safetensors", "second.safetensors"]  # which are read when it is opened
    assert sorted(hashed[:3]) == sorted(tables)
    assert hashed[3:] == ["strided.toy", "shared.part", "windowed.toy"]
    hashed.clear()
    with open_bundle(folder, backend=Backend()) as bundle:
        assert sorted(hashed) == sorted(path.name for path in files_of(folder) if path.name != MANIFEST)
        bundle.engine(STRIDED)
    assert len(hashed) == len(files_of(folder)) - 1
    (folder / "unet/shared.part").write_text("Weights")
    with (
        open_bundle(folder, backend=Backend(), verify="size") as bundle,
        pytest.raises(BundleError, match=r"unet/shared.part has changed"),
    ):
        bundle.engine(STRIDED)


@pytest.mark.parametrize("part", ["unet/strided.toy", "unet/shared.part", "unet/weights.safetensors"])
@pytest.mark.parametrize("verify", ["hash", "size"])
def test_an_engine_is_not_opened_from_files_that_took_the_place_of_the_bundle_s(
    folder: Path, part: str, verify: str
) -> None:
    """As when a bundle is updated in place while it is served: all was right when it was opened."""
    (folder / "unet/shared.part").write_text("weights")
    toy.seal(folder)

    class Backend(toy.ToyBackend):
        def files(self, engine: Path) -> tuple[Path, ...]:
            return engine, engine.with_name("shared.part")

    with open_bundle(folder, backend=Backend(), verify=verify) as bundle:
        bundle.engine(STRIDED)
        bundle.engine(WINDOWED)
        own = (folder / part).read_bytes()
        (folder / part).rename(folder / "aside")
        (folder / part).write_bytes(own.swapcase())
        with pytest.raises(BundleError, match=f"{part} has changed"):
            bundle.engine(STRIDED)
        (folder / part).unlink()
        with pytest.raises(BundleError, match=f"{part} is missing"):
            bundle.engine(STRIDED)
        (folder / part).write_bytes(own)
        bundle.engine(STRIDED)
        assert bundle.open_phases == (STRIDED,)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("../../elsewhere", "no file of the bundle"),
        ("unknown", "no file of the bundle"),
        ("/etc/hosts", "names a file outside the bundle"),
    ],
)
def test_an_engine_may_name_files_of_the_bundle_alone(folder: Path, named: str, message: str) -> None:
    (folder.parent / "elsewhere").write_text("a plan")
    (folder / "unet/unknown").write_text("a plan")

    class Backend(toy.ToyBackend):
        def files(self, engine: Path) -> tuple[Path, ...]:
            return engine, engine.parent / named

    with open_bundle(folder, backend=Backend()) as bundle, pytest.raises(BundleError, match=message):
        bundle.engine(STRIDED)


@pytest.mark.parametrize("verify", ["hash", "size"])
def test_a_missing_or_truncated_file_is_named(folder: Path, verify: str) -> None:
    for path in files_of(folder):
        whole = path.read_bytes()
        for content in (None, whole[:-1]):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            with pytest.raises(BundleError, match=path.name):
                open_bundle(folder, backend=toy.ToyBackend(), verify=verify)
        path.write_bytes(whole)


def test_every_broken_file_is_named_at_once(folder: Path) -> None:
    (folder / "unet/strided.toy").unlink()
    (folder / "unet/windowed.toy").write_text("short")
    with pytest.raises(BundleError) as caught:
        open_bundle(folder, backend=toy.ToyBackend())
    assert "unet/strided.toy is missing" in str(caught.value)
    assert "unet/windowed.toy has 5 bytes instead of" in str(caught.value)


def test_a_symbolic_link_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    weights = folder / "unet/weights.safetensors"
    shutil.copy(weights, outside)
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(BundleError, match="leaves the bundle through a symbolic link"):
        open_bundle(folder, backend=toy.ToyBackend())


def test_a_linked_folder_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "unet", tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    with pytest.raises(BundleError, match="leaves the bundle through a symbolic link"):
        open_bundle(folder, backend=toy.ToyBackend())


def test_a_bundle_may_itself_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    open_bundle(tmp_path / "link", backend=toy.ToyBackend())


def test_other_files_in_the_folder_are_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    open_bundle(folder, backend=toy.ToyBackend())


def test_a_phase_the_rule_never_reaches_is_refused(folder: Path) -> None:
    manifest = Manifest.read(folder)
    extra = dataclasses.replace(manifest.phases[0], phase=Phase(PhaseKind.POOLED))
    toy.seal(folder, dataclasses.replace(manifest, phases=(*manifest.phases, extra)))
    with pytest.raises(BundleError, match=r"phases\[3\].*never reaches"):
        open_bundle(folder, backend=toy.ToyBackend())


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "clip", "format": "pt"}', "not json"])
def test_a_foreign_folder_is_told_apart(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path)
    assert caught.value.advice


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a finished bundle"):
        open_bundle(tmp_path / "nowhere")


def test_a_newer_bundle_says_what_to_install(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data |= {"format": 9, "tools": {"hidiff-runtime": "9.1"}, "parts": []}
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="format 9") as caught:
        open_bundle(folder)
    assert "pip install --upgrade 'hidiff-runtime>=9.1'" in caught.value.advice


def test_a_missing_backend_library_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    manifest = Manifest.read(folder)
    renamed = [
        dataclasses.replace(record, engines={"onnxruntime": record.engines["toy"]}) for record in manifest.phases
    ]
    toy.seal(folder, dataclasses.replace(manifest, phases=tuple(renamed)))
    with pytest.raises(EngineError) as caught:
        open_bundle(folder)
    assert "pip install 'hidiff-runtime[cpu]'" in caught.value.advice
    assert caught.value.exit_code == 5


def test_samplers_are_read_once_and_by_name(folder: Path) -> None:
    bundle = open_bundle(folder, backend=toy.ToyBackend())
    assert bundle.sampler() is bundle.sampler("plain")
    with pytest.raises(InputError, match="no such sampler") as caught:
        bundle.sampler("euler")
    assert "noisy, plain, second" in caught.value.advice


def test_verification_compares_with_the_records(folder: Path) -> None:
    manifest = Manifest.read(folder)
    verify_files(BundleFolder(folder), manifest.files)
    record = dataclasses.replace(manifest.files["unet/strided.toy"], sha256="0" * 64)
    verify_files(BundleFolder(folder), {"unet/strided.toy": record}, "size")
    with pytest.raises(BundleError, match="has changed"):
        verify_files(BundleFolder(folder), {"unet/strided.toy": record})
