"""Bundles whose files are symbolic links: those of known stores and of folders that the user names open, no others."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linked
import numpy as np
import pytest
import toy
import toy_pictures
from fake_cuda import FakeCuda
from fake_plans import KIND, add_engines, kernels, watched
from fake_trt import FakeTrt
from toy_reference import record

from hidiff_runtime import BundleError, InputError, Phase, PhaseKind, Pipeline, cli
from hidiff_runtime import bundle as bundle_module
from hidiff_runtime import open as open_bundle
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest
from hidiff_runtime.pipeline.prompt_encoding import TokenCounter, encode_prompts

STRIDED, WINDOWED = Phase(PhaseKind.STRIDED), Phase(PhaseKind.WINDOWED)
LEAVES = "leaves the bundle through a symbolic link"
CONSISTS = "consists of symbolic links that lead out"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make(tmp_path_factory.mktemp("pristine") / "bundle")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that makes pictures, with reference samples."""
    folder = tmp_path_factory.mktemp("pictured") / "bundle"
    toy_pictures.make(folder, toy.Toy())
    record(folder, toy.Toy())
    return folder


@pytest.fixture
def _toy_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the toy backend when none is asked for."""
    real = bundle_module.open

    def opened(folder: Path, *, backend: str | None, **options: Any) -> Bundle:
        return real(folder, backend=backend or toy_pictures.Backend(), **options)

    monkeypatch.setattr(bundle_module, "open", opened)


def denoised(folder: Path, **options: Any) -> np.ndarray:
    with open_bundle(folder, backend=toy.ToyBackend(), **options) as bundle:
        given = {**toy.Toy().given(), "steps": 8, "sampler": "noisy", "guidance_scale": 4.0}
        return np.asarray(bundle.denoiser().denoise(**given, seed=3))


def refused(folder: Path, **options: Any) -> BundleError:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder, backend=toy.ToyBackend(), **options)
    return caught.value


@pytest.mark.parametrize("verify", ["hash", "size"])
@pytest.mark.parametrize("layout", linked.KNOWN)
def test_a_bundle_in_the_store_of_a_known_tool_opens(pristine: Path, tmp_path: Path, layout: str, verify: str) -> None:
    folder = linked.KNOWN[layout](pristine, tmp_path / "home")
    assert (folder / MANIFEST).is_symlink()
    np.testing.assert_array_equal(denoised(folder, verify=verify), denoised(pristine))


def test_a_bundle_in_a_folder_of_a_snapshot_opens(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "repository/sizes/1024")
    folder = linked.hub(tmp_path / "repository", tmp_path / "home") / "sizes/1024"
    assert denoised(folder).any()


def test_a_linked_folder_of_a_known_store_opens(pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path / "home/bundle"))
    (tmp_path / "home/.git/annex").mkdir(parents=True)
    shutil.move(folder / "unet", tmp_path / "home/.git/annex/objects/unet")
    (folder / "unet").symlink_to("../.git/annex/objects/unet")
    assert denoised(folder).any()


@pytest.mark.needs("pyarrow")
@pytest.mark.usefixtures("_toy_backend")
@pytest.mark.parametrize("layout", linked.KNOWN)
def test_every_command_opens_it(
    pictured: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(linked.KNOWN[layout](pictured, tmp_path / "home"))
    embeds = ["--random-embeds", "3", "--steps", "4", "--guidance", "5", "-o", str(tmp_path / "latents.safetensors")]
    (tmp_path / "prompts.txt").write_text("a lighthouse\n")
    rows = ["--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "pictures"), "--set", "steps=4"]
    commands = [
        ["info", folder],
        ["check", folder],
        ["denoise", folder, *embeds],
        ["generate", folder, "-p", "a lighthouse", "--steps", "4", "-o", str(tmp_path / "a.png")],
        ["bulk", folder, *rows, "--dry-run"],
    ]
    assert [(command[0], cli.main(command)) for command in commands] == [(command[0], 0) for command in commands]
    assert "would make 1 rows" in capsys.readouterr().out


@pytest.mark.needs("pyarrow")
@pytest.mark.usefixtures("_toy_backend")
def test_every_command_refuses_the_same_and_takes_the_same_option(
    pictured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(linked.elsewhere(pictured, tmp_path))
    (tmp_path / "prompts.txt").write_text("a lighthouse\n")
    embeds = ["--random-embeds", "3", "--steps", "4", "--guidance", "5", "-o", str(tmp_path / "latents.safetensors")]
    rows = ["--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "pictures"), "--set", "steps=4"]
    commands = [
        ["info", folder],
        ["check", folder],
        ["denoise", folder, *embeds],
        ["generate", folder, "-p", "a lighthouse", "--steps", "4", "-o", str(tmp_path / "a.png")],
        ["bulk", folder, *rows, "--dry-run"],
    ]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert cli.main(command) == 4, command
        assert CONSISTS in capsys.readouterr().err
        assert cli.main([*command, "--allow-links", "nowhere"]) == 2, command
        assert "is not there" in capsys.readouterr().err
        assert cli.main([*command, "--allow-links", "store"]) == 0, command


@pytest.mark.parametrize("of", [str, Path, lambda store: [store], lambda store: ("/usr", str(store))])
def test_folders_to_allow_are_one_or_several(pristine: Path, tmp_path: Path, of: Callable[[Path], Any]) -> None:
    folder = linked.elsewhere(pristine, tmp_path)
    assert denoised(folder, allow_links=of(tmp_path / "store")).any()


def test_a_pipeline_takes_the_option_too(pictured: Path, tmp_path: Path) -> None:
    folder = linked.elsewhere(pictured, tmp_path)
    with pytest.raises(BundleError, match=CONSISTS):
        Pipeline.open(folder, backend=toy_pictures.Backend())
    Pipeline.open(folder, backend=toy_pictures.Backend(), allow_links=tmp_path / "store").close()


def test_another_folder_than_the_allowed_one_stays_refused(pristine: Path, tmp_path: Path) -> None:
    folder = linked.elsewhere(pristine, tmp_path)
    (tmp_path / "store of others").mkdir()
    assert CONSISTS in refused(folder, allow_links=tmp_path / "store of others").summary
    with pytest.raises(InputError, match="is not there"):
        open_bundle(folder, allow_links=tmp_path / "storage")


def test_the_refusal_says_where_links_lead_and_what_to_do(pristine: Path, tmp_path: Path) -> None:
    folder = linked.elsewhere(pristine, tmp_path / "my models")
    store, count = tmp_path / "my models/store", len([path for path in pristine.rglob("*") if path.is_file()])
    error = refused(folder)
    assert error.given == f"{count} of {count} entries lead into {store}"
    assert f"cp -rL '{folder}' DST" in error.advice
    assert f"--allow-links '{store}'" in error.advice


def test_links_into_several_folders_are_told_one_by_one(pristine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    for index, path in enumerate(sorted(path for path in pristine.rglob("*") if path.is_file())):
        target = tmp_path / f"disk{index % 5}" / str(index)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        link = folder / path.relative_to(pristine)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    error = refused(folder)
    assert str(error.given).endswith(f"{tmp_path}/disk0, {tmp_path}/disk1, {tmp_path}/disk2 and 2 more folders")
    disks = [tmp_path / f"disk{index}" for index in range(5)]
    assert denoised(folder, allow_links=disks).any()
    assert refused(folder, allow_links=disks[:4])


@pytest.mark.parametrize("layout", ["hub", "dvc", "annex"])
def test_one_link_out_of_a_known_store_is_refused(pristine: Path, tmp_path: Path, layout: str) -> None:
    """Whatever else lies in a store, a bundle may not reach what does not."""
    folder = linked.KNOWN[layout](pristine, tmp_path / "home")
    secret = tmp_path / "home/secret"
    shutil.copyfile(pristine / "unet/strided.toy", secret)
    linked.relink(folder / "unet/strided.toy", secret)
    error = refused(folder)
    assert error.summary == f"unet/strided.toy {LEAVES}."
    assert error.given == secret
    assert "Do not use this bundle" in error.advice
    assert f"cp -rL {folder} DST" in error.advice


def test_a_link_to_a_file_of_the_disk_s_root_suggests_no_folder() -> None:
    folder = Path("/nowhere/bundle")
    error = BundleFolder(folder)._refusal(folder, "unet/strided.toy", Path("/vmlinuz"))
    assert LEAVES in error.summary
    assert "cp -rL" in error.advice
    assert "--allow-links" not in error.advice


@pytest.mark.parametrize("layout", ["hub", "dvc", "annex"])
def test_the_store_of_another_repository_is_refused(pristine: Path, tmp_path: Path, layout: str) -> None:
    folder = linked.KNOWN[layout](pristine, tmp_path / "theirs")
    inside = folder.relative_to(tmp_path / "theirs")
    mine = linked.KNOWN[layout](pristine, tmp_path / "mine")
    shutil.rmtree(mine)
    shutil.copytree(folder, mine, symlinks=True)
    for link in [path for path in mine.rglob("*") if path.is_symlink()]:
        linked.relink(link, (folder / link.relative_to(mine)).resolve())
    assert inside == mine.relative_to(tmp_path / "mine")
    assert CONSISTS in refused(mine).summary
    assert denoised(folder).any()


@pytest.mark.parametrize("layout", ["hub", "dvc", "annex"])
def test_a_store_that_is_itself_a_link_is_not_taken(pristine: Path, tmp_path: Path, layout: str) -> None:
    """Else whoever ships the folders around a bundle could let them stand for any place."""
    folder = linked.KNOWN[layout](pristine, tmp_path / "home")
    store = {"hub": "blobs", "dvc": ".dvc/cache", "annex": ".git/annex/objects"}[layout]
    shutil.move(tmp_path / "home" / store, tmp_path / "moved")
    (tmp_path / "home" / store).symlink_to(tmp_path / "moved")
    assert CONSISTS in refused(folder).summary
    assert denoised(folder, allow_links=tmp_path / "moved").any()


def test_a_blob_that_leads_on_is_refused(pristine: Path, tmp_path: Path) -> None:
    folder = linked.hub(pristine, tmp_path / "home")
    blob = (folder / "unet/strided.toy").resolve()
    shutil.move(blob, tmp_path / "aside")
    blob.symlink_to(tmp_path / "aside")
    assert LEAVES in refused(folder).summary


def test_blobs_that_are_beside_no_snapshots_are_no_store(pristine: Path, tmp_path: Path) -> None:
    cache = linked.hub(pristine, tmp_path / "home").parent
    cache.rename(cache.with_name("revisions"))
    assert CONSISTS in refused(tmp_path / "home/revisions" / linked.REVISION).summary


def test_a_store_further_up_than_the_nearest_is_another_s(pristine: Path, tmp_path: Path) -> None:
    folder = linked.dvc(pristine, tmp_path / "home")
    outer = tmp_path / ".dvc/cache/strided"
    outer.parent.mkdir(parents=True)
    shutil.copyfile(pristine / "unet/strided.toy", outer)
    linked.relink(folder / "unet/strided.toy", outer)
    assert LEAVES in refused(folder).summary


def test_a_folder_whose_name_begins_as_the_bundle_s_is_outside(pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path / "bundle"))
    other = Path(shutil.copytree(pristine, tmp_path / "bundle of others"))
    linked.relink(folder / "unet/strided.toy", other / "unet/strided.toy")
    assert LEAVES in refused(folder).summary


@pytest.mark.parametrize("name", [MANIFEST, "unet/strided.toy"])
def test_a_manifest_is_not_read_where_a_link_leaves_the_bundle(pristine: Path, tmp_path: Path, name: str) -> None:
    """Also by what asks for no file after it, as ``info`` does."""
    folder = Path(shutil.copytree(pristine, tmp_path / "bundle"))
    linked.relink(folder / name, pristine / name)
    with pytest.raises(BundleError) as caught:
        BundleFolder(folder).manifest()
    assert caught.value.summary == f"{name} {LEAVES}."


@pytest.mark.parametrize("name", ["../other/unet", "/etc/hostname", "unet/../strided.toy", "unet\\strided.toy"])
def test_a_path_that_no_bundle_s_file_has_is_refused_by_what_is_wrong(pristine: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"The path .* must ") as caught:
        BundleFolder(pristine).file(name)
    assert caught.value.given == name


def test_links_round_in_a_circle_are_an_error(pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path / "bundle"))
    linked.relink(folder / "unet/strided.toy", folder / "unet/strided.toy")
    assert "unet/strided.toy" in str(refused(folder))
    linked.relink(folder / "unet/weights.safetensors", pristine / "unet/weights.safetensors")
    assert "unet/" in str(refused(folder))


@pytest.mark.parametrize("layout", ["hub", "dvc", "annex"])
def test_links_to_what_was_not_fetched_say_so(pristine: Path, tmp_path: Path, layout: str) -> None:
    folder = linked.KNOWN[layout](pristine, tmp_path / "home")
    weights, manifest = folder / "unet/weights.safetensors", folder / MANIFEST
    weights.resolve().unlink()
    error = refused(folder)
    assert str(error.given).startswith("unet/weights.safetensors is missing: it is a symbolic link to ")
    assert "dvc pull" in error.advice
    manifest.resolve().unlink()
    error = refused(folder)
    assert "manifest.json is a symbolic link to a file that is not there" in error.summary
    assert "git annex get" in error.advice


def test_a_store_that_may_not_be_read_is_told(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = linked.hub(pristine, tmp_path / "home")
    weights, of = folder / "unet/weights.safetensors", FileDigest.of

    def closed(path: Path) -> FileDigest:
        if path == weights:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return of(path)

    monkeypatch.setattr(FileDigest, "of", closed)
    assert refused(folder).given == "unet/weights.safetensors cannot be read: Permission denied"


def test_a_broken_bundle_of_files_is_still_to_be_fetched_again(pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path / "bundle"))
    (folder / "unet/strided.toy").unlink()
    assert refused(folder).advice == "Fetch the bundle again, or build it again."


@pytest.mark.parametrize("verify", ["hash", "size"])
@pytest.mark.parametrize("part", ["unet/strided.toy", "unet/weights.safetensors", "samplers/plain.safetensors"])
def test_a_link_that_is_led_elsewhere_after_the_opening_is_noticed(
    pristine: Path, tmp_path: Path, part: str, verify: str
) -> None:
    folder = linked.hub(pristine, tmp_path / "home")
    blob = (folder / part).resolve()
    swapped, outside = blob.with_name("0" * 64), tmp_path / "outside"
    swapped.write_bytes(blob.read_bytes().swapcase())
    shutil.copyfile(blob, outside)

    def use(bundle: Bundle) -> None:
        bundle.engine(STRIDED)
        bundle.sampler("plain")

    with open_bundle(folder, backend=toy.ToyBackend(), verify=verify) as bundle:
        linked.relink(folder / part, swapped)
        with pytest.raises(BundleError, match=f"{part} has changed"):
            use(bundle)
        linked.relink(folder / part, outside)
        with pytest.raises(BundleError, match=f"{part} {LEAVES}"):
            use(bundle)
        linked.relink(folder / part, blob)
        use(bundle)


def test_a_tokenizer_that_is_led_elsewhere_after_the_opening_is_noticed(pictured: Path, tmp_path: Path) -> None:
    folder = linked.hub(pictured, tmp_path / "home")
    with open_bundle(folder, backend=toy_pictures.Backend()) as bundle:
        encode_prompts(bundle, ["a lighthouse"], ["blurry"])
        name = bundle.manifest.text_encoders[0].tokenizer
        blob = (folder / name).resolve()
        other = blob.with_name("0" * 64)
        other.write_text(json.dumps(json.loads(blob.read_text()), indent=3))
        linked.relink(folder / name, other)
        with pytest.raises(BundleError, match=f"{name} has"):
            encode_prompts(bundle, ["a lighthouse"], ["blurry"])
        with pytest.raises(BundleError, match=f"{name} has"):
            TokenCounter(bundle)


def test_a_config_map_of_another_content_is_noticed(pristine: Path, tmp_path: Path) -> None:
    mount = linked.config_map(pristine, tmp_path / "home")
    other = Path(shutil.copytree(pristine, tmp_path / "other"))
    engine, table = other / "unet/windowed.toy", other / "samplers/noisy.safetensors"
    for path in (engine, table):
        path.write_bytes(path.read_bytes().swapcase())
    with open_bundle(mount, backend=toy.ToyBackend(), verify="size") as bundle:
        bundle.engine(WINDOWED)
        linked.publish(pristine, mount, "..2026_12_02")
        bundle.engine(STRIDED)
        linked.publish(other, mount, "..2026_12_03")
        with pytest.raises(BundleError, match=r"unet/windowed.toy has changed"):
            bundle.engine(WINDOWED)
        with pytest.raises(BundleError, match=r"samplers/noisy.safetensors has changed"):
            bundle.sampler("noisy")
        linked.publish(pristine, mount, "..2026_12_04")
        bundle.engine(WINDOWED)
        bundle.sampler("noisy")


def test_the_parts_of_a_plan_are_found_beside_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind it nothing has the name that the plan's record tells."""
    made = toy.make(tmp_path / "made", KIND)
    with watched(FakeTrt(FakeCuda(), rtx=False), monkeypatch) as trt:
        trt.kernels = kernels(KIND)
        add_engines(made, trt)
        folder = linked.annex(made, tmp_path / "home")
        given = {**KIND.given(), "steps": 9, "sampler": "noisy", "guidance_scale": 3.0, "seed": 1}
        with open_bundle(folder, backend="tensorrt", verify="size", loop="device") as bundle:
            found = bundle.denoiser().denoise(**given)
            bundle.close()
            tail = folder / "unet/strided.tail"
            linked.relink(tail, (folder / "unet/windowed.tail").resolve())
            with pytest.raises(BundleError, match=r"unet/strided.tail has"):
                bundle.engine(STRIDED)
    with open_bundle(made, backend=toy.ToyBackend()) as bundle:
        expected = bundle.denoiser().denoise(**given)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_the_manifest_s_path_stands_for_its_folder(pristine: Path, tmp_path: Path) -> None:
    folder = linked.hub(pristine, tmp_path / "home")
    with open_bundle(folder / MANIFEST, backend=toy.ToyBackend()) as bundle:
        assert bundle.root == folder
        assert bundle.manifest == Manifest.read(pristine)
