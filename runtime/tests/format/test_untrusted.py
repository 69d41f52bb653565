"""Bundles from anywhere: whatever their files are, opening one ends with exit code 4 and a message, at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
import toy_pictures
import toy_reference

from hidiff_runtime import BundleError, check
from hidiff_runtime import open as open_bundle
from hidiff_runtime.cli import main
from hidiff_runtime.format.codec import DEEPEST_JSON, LARGEST_JSON, parse_object
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from hidiff_runtime.pipeline.pipeline import Pipeline
from hidiff_runtime.verification.reference_samples import INDEX, TENSORS
from hidiff_runtime.verification.reference_samples import LONGEST_PROMPT as LONGEST

KIND = toy.Toy(sdxl=True)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy_pictures.make(tmp_path_factory.mktemp("pictures") / "bundle", KIND)
    toy_reference.record(folder, KIND)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def refused(folder: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder, backend=toy_pictures.Backend())
    assert caught.value.exit_code == 4
    return caught.value


MADE: dict[str, Callable[[Path], object]] = {
    "it is a named pipe, not a file": os.mkfifo,
    "it is a folder, not a file": Path.mkdir,
    "a symbolic link": lambda path: path.symlink_to(path.name),
    "leaves the bundle": lambda path: path.symlink_to(os.devnull),
}


@pytest.mark.parametrize("message", MADE)
def test_a_manifest_that_is_no_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    (folder / MANIFEST).unlink()
    MADE[message](folder / MANIFEST)
    for command in (["info"], ["check"], ["generate", "-p", "x", "-o", "out.png"]):
        assert main([command[0], str(folder), *command[1:]]) == 4
        told = capsys.readouterr().err
        assert message in told
        assert "Traceback" not in told


@pytest.mark.parametrize("name", ["reference/samples.json", "reference/samples.safetensors", "unet/windowed.toy"])
@pytest.mark.parametrize("message", MADE)
def test_a_file_that_is_none_is_refused(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    MADE[message](folder / name)
    assert message.removeprefix("it is ") in str(refused(folder))


def test_a_name_that_no_folder_can_have_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["x" * 300] = {"size": 0, "sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "has a name longer than 255" in str(refused(folder))


def test_samples_whose_tensors_are_not_listed_are_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][f"reference/{TENSORS}"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    told = str(refused(folder))
    assert "reference refers to a file that 'files' does not list" in told
    assert f"reference/{TENSORS}" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1e999}', "the number 1e999 is beyond the largest there is"),
        ('{"a": -1e999}', "beyond the largest"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": ' + "1" * 400 + "}", "a whole number has 400 digits, and at most 20 are read"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"\\udfff": 1}', "surrogates not allowed"),
        ('{"a":' * 10**5, "recursion"),
        ('{"a":' * DEEPEST_JSON + "[]" + "}" * DEEPEST_JSON, "nested more than 32 deep"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        ('{"a": 1, "a": 1}', "a key is written twice"),
    ],
    ids=range(10),
)
def test_json_that_cannot_be_told_is_refused(text: str | bytes, told: str) -> None:
    with pytest.raises(BundleError, match=r"it\.json is not whole JSON") as caught:
        parse_object(text, "it.json")
    assert told in str(caught.value.given)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ['{"a": 18446744073709551615, "b": -9223372036854775808}', '{"a": "\\ud83c\\udf0a"}'])
def test_json_that_can_be_told_is_taken(text: str) -> None:
    assert parse_object(text, "it.json") == json.loads(text)
    nested = '{"a":' * (DEEPEST_JSON - 1) + "[]" + "}" * (DEEPEST_JSON - 1)
    assert parse_object(nested, "it.json") == json.loads(nested)


@pytest.mark.parametrize(("name", "most"), [(MANIFEST, LARGEST_JSON), (f"reference/{INDEX}", LARGEST_JSON)])
def test_json_of_any_size_is_not_read(folder: Path, name: str, most: int) -> None:
    (folder / name).write_text((folder / name).read_text() + " " * most)
    if name != MANIFEST:
        toy.seal(folder)
    with pytest.raises(BundleError) as caught:
        check(folder, backend=toy_pictures.Backend())
    assert f"larger than the {most} bytes that are read" in str(caught.value.given)


def test_messages_quote_no_more_than_a_little(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["x" * 100_000] = ["y" * 100_000]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert len(str(refused(folder))) < 1000


def test_a_folder_given_by_a_relative_path_stays_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Pipeline.open(folder.name, backend=toy_pictures.Backend()) as pipeline:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert pipeline.bundle.root == folder
        assert pipeline("a lighthouse", steps=2).size == (toy_pictures.WIDTH, toy_pictures.HEIGHT)


def test_what_a_bundle_says_cannot_act_on_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["task"] = "\x1b[31mred"
    content = {key: value for key, value in manifest.items() if key != "digest"}
    (folder / MANIFEST).write_text(json.dumps(sealed(content)))
    assert main(["info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\\x1b[31mred" in told


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the digest of its content."""
    import hashlib

    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "digest": hashlib.sha256(text.encode()).hexdigest()}


Samples = dict[str, Any]
RUN, CALL, NETWORK = ("runs", 0), ("calls", 0), ("networks", 0)


@pytest.mark.parametrize(
    ("way", "value", "named"),
    [
        ((*CALL, "kind"), "pooled", r"calls\[0\].kind must be a phase of the bundle"),
        ((*CALL, "window_shifts"), [0, 1], r"calls\[0\].window_shifts must be 3 shifts"),
        ((*CALL, "window_shifts"), [0, 1, 4], r"calls\[0\].window_shifts\[2\] must be a whole number of 3 at most"),
        ((*CALL, "inputs", "latents", "shape"), [2, 4, 6, 80_000_000], r"latents must be float32\[2, 4, 6, 8\]"),
        ((*CALL, "inputs", "latents", "seed"), 2**64, "seed must be a whole number of 18446744073709551615 at most"),
        ((*CALL, "inputs", "callback"), {"tensor": "tensor_000", "repeat": 1}, r"calls\[0\].inputs must hold latents"),
        ((*CALL, "inputs", "timestep", "shape"), [1] * 70, "must have 1 to 8 axes"),
        ((*CALL, "expected", "shape"), [2, 4, 6, 9], r"calls\[0\].expected must be of an output"),
        ((*CALL, "expected", "positions"), "tensor_000", r"calls\[0\].expected.positions must be places in"),
        ((*RUN, "sampler"), "brush", r"runs\[0\].sampler must be one of plain"),
        ((*RUN, "steps"), 99, r"runs\[0\].steps must be a tabulated number"),
        ((*RUN, "eta"), 2, r"runs\[0\].eta must be from 0 to 1"),
        ((*RUN, "guidance_scale"), None, r"runs\[0\].guidance_scale and guidance_rescale must be given exactly"),
        ((*RUN, "guidance_scale"), 1e39, r"runs\[0\].guidance_scale must be a number that float32 can hold"),
        ((*RUN, "seed"), -(2**63) - 1, r"runs\[0\].seed must be a whole number"),
        ((*RUN, "inputs", "self"), {"tensor": "tensor_000", "repeat": 1}, r"runs\[0\].inputs must hold"),
        ((*RUN, "inputs", "prompt_embeds", "repeat"), 10**9, r"runs\[0\].inputs.prompt_embeds must be float32"),
        ((*RUN, "inputs", "prompt_embeds", "repeat"), 10**10, "repeat must be a whole number of 2147483647 at most"),
        ((*RUN, "control", "x"), {"tensor": "tensor_000", "repeat": 1}, r"runs\[0\].control must hold nothing"),
        ((*NETWORK, "network"), "unet", r"networks\[0\].network must be a text encoder of the bundle"),
        ((*NETWORK, "network"), "text_encoder_3", r"networks\[0\].network must be a text encoder of the bundle"),
        ((*NETWORK, "expected"), {}, r"networks\[0\].expected must hold prompt_embeds"),
        ((*NETWORK, "prompt"), "x" * (LONGEST + 1), f"prompt must have at most {LONGEST} characters"),
        ((*NETWORK, "prompt"), {"a": 1}, r"networks\[0\].prompt must be a text"),
        (("networks", 3, "prompt"), "x", r"networks\[3\].prompt must be null where no text goes in"),
        (("pictures", 0, "run"), 7, r"pictures\[0\].run must be the number of a run"),
        (("pictures", 0, "corner"), [40, 0], r"pictures\[0\] must be a part of a tile of \[48, 64\] pixels"),
        (("pictures", 0, "corner"), [0, 2**31], "must be a whole number of 2147483647 at most"),
        (("pictures", 0, "tensor"), "tensor_000", r"pictures\[0\] must be a part of a tile"),
    ],
    ids=str,
)
def test_samples_of_something_else_are_refused_before_anything_runs(
    folder: Path, way: tuple[Any, ...], value: object, named: str
) -> None:
    index = folder / "reference" / INDEX
    samples = json.loads(index.read_text())
    *above, last = way
    place = samples
    for part in above:
        place = place[part]
    place[last] = value
    index.write_text(json.dumps(samples))
    toy.seal(folder)
    backend = toy_pictures.Backend()
    with pytest.raises(BundleError, match=named) as caught:
        check(folder, backend=backend)
    assert caught.value.exit_code == 4
    assert backend.events == []


def test_the_pristine_bundle_is_taken(folder: Path) -> None:
    toy.seal(folder)
    assert check(folder, backend=toy_pictures.Backend()).ok
    assert Manifest.read(folder).reference == f"reference/{INDEX}"
