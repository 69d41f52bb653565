from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.manifest import FORMAT, MANIFEST, Contents, FileDigest, Manifest, PhaseRecord, TensorSpec
from hidiff_runtime.format.manifest_record import BucketRecord
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule, StepRange

PATHS = ("samplers/ddim.safetensors", "unet/strided.onnx", "unet/windowed.onnx", "unet/weights.safetensors")


def phase_record(kind: PhaseKind) -> PhaseRecord:
    return PhaseRecord(
        phase=Phase(kind),
        graph=f"unet/{kind.value}.onnx",
        engines={"toy": f"unet/{kind.value}.onnx"},
        inputs=(
            TensorSpec("latents", (2, 4, 16, 24), "float32"),
            TensorSpec("timestep", (1,), "float32"),
            TensorSpec("prompt_embeds", (2, 77, 32), "float32"),
            TensorSpec("window_shifts", (1,), "int32"),
        ),
        outputs=(TensorSpec("noise_pred", (2, 4, 16, 24), "float32"),),
    )


def sample() -> Manifest:
    return Manifest(
        tools={"hidiff-runtime": "0.1.0", "torch": "2.13.0"},
        recipe={"family": "sd15", "steps": [1, 2]},
        family="sd15",
        task="text-to-image",
        width=192,
        height=128,
        batch=1,
        guidance=True,
        precision="float32",
        rule=PhaseRule(strided=StepRange(0, 0.4)),
        latent=(4, 16, 24),
        windowed_blocks=("down_blocks.0.attentions.0",),
        phases=(phase_record(PhaseKind.STRIDED), phase_record(PhaseKind.WINDOWED)),
        samplers={"ddim": PATHS[0]},
        default_sampler="ddim",
        steps=(1, 2),
        weights={"unet": PATHS[3]},
        files={path: FileDigest(12, "0f" * 32) for path in PATHS},
        fingerprints={"recipe": "abc"},
    )


OWN = {field.name for field in dataclasses.fields(BucketRecord)}


def in_format_1(manifest: Manifest) -> dict[str, Any]:
    """What was written before there were several buckets."""
    return dataclasses.replace(Contents.of([manifest]), format=1).to_json()


def changed(path: str, value: Any, *, older: bool = False) -> dict[str, Any]:
    """The sample's JSON with the field at a path (parts joined by ``|``) replaced, or left out for ``...``."""
    data = json.loads(json.dumps(in_format_1(sample()) if older else sample().to_json()))
    *way, last = path.split("|")
    place = data["buckets"][0] if path.partition("|")[0] in OWN and not older else data
    for part in way:
        place = place[int(part)] if part.isdigit() else place[part]
    key: Any = int(last) if last.isdigit() else last
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return data


def test_a_manifest_survives_json_in_any_order_of_keys() -> None:
    text = json.dumps(sample().to_json(), sort_keys=True)
    assert Manifest.from_json(json.loads(text)) == sample()


def test_a_manifest_has_the_same_digest_once_it_was_read() -> None:
    given = dataclasses.replace(sample(), guidance_rescale=1)
    content = given.to_json()
    assert Manifest.from_json(json.loads(json.dumps(content))).digest == given.digest == content["digest"]
    numbers = [*content["buckets"][0]["rule"]["strided"], content["guidance_rescale"]]
    assert json.dumps(numbers) == "[0.0, 0.4, 1.0]"


def test_a_manifest_with_fractions_written_as_whole_numbers_is_read() -> None:
    content = {key: value for key, value in sample().to_json().items() if key != "digest"}
    content["buckets"][0]["rule"] = {"strided": [0, 0.4], "pooled": None, "control": None}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest != sample().digest
    assert Manifest.from_json({**content, "digest": digest}) == sample()


LATER = {"guidance_rescale": 0.7, "force_zeros_for_empty_prompt": False}


def test_what_older_bundles_do_not_say_is_as_it_was() -> None:
    older = sample()
    assert not older.to_json().keys() & LATER.keys()
    assert (older.guidance_rescale, older.force_zeros_for_empty_prompt) == (0.0, True)
    newer = dataclasses.replace(older, **LATER)
    assert LATER.items() <= newer.to_json().items()
    assert Manifest.from_json(newer.to_json()) == newer
    assert newer.digest != older.digest


@pytest.mark.parametrize(("rescale", "guidance"), [(1.5, True), (-0.1, True), (0.7, False)])
def test_a_rescale_is_a_part_of_guidance(rescale: float, guidance: bool) -> None:
    odd = dataclasses.replace(sample(), guidance_rescale=rescale, guidance=guidance)
    with pytest.raises(BundleError, match="guidance_rescale must be from 0 to 1, and 0 without guidance"):
        Manifest.from_json(odd.to_json())


def test_a_manifest_of_format_1_is_read_and_keeps_its_digest() -> None:
    older = in_format_1(sample())
    assert older["format"] == 1
    assert "buckets" not in older
    read = Manifest.from_json(older)
    assert read == sample()
    assert read.digest == older["digest"] != sample().digest
    assert read.to_json() == older


def other_bucket() -> Manifest:
    """The sample with its sides exchanged."""
    phases = tuple(
        dataclasses.replace(
            record,
            inputs=(TensorSpec("latents", (2, 4, 24, 16), "float32"), *record.inputs[1:]),
            outputs=(TensorSpec("noise_pred", (2, 4, 24, 16), "float32"),),
        )
        for record in sample().phases
    )
    return dataclasses.replace(sample(), width=128, height=192, latent=(4, 24, 16), phases=phases)


def test_several_targets_share_all_that_has_no_size() -> None:
    contents = Contents.from_json(json.loads(json.dumps(Contents.of([sample(), other_bucket()]).to_json())))
    assert contents.manifests == (sample(), other_bucket())
    assert {manifest.digest for manifest in contents.manifests} == {contents.digest}
    assert contents.digest not in (sample().digest, other_bucket().digest)
    # What is changed is a manifest of its own, and no longer the file's.
    assert dataclasses.replace(contents.manifests[1], report="report.json").contents is None


@pytest.mark.parametrize(
    ("buckets", "named"),
    [
        ([], "buckets must not be empty"),
        ([sample(), sample()], r"buckets\[1\] is there twice"),
        ([sample(), dataclasses.replace(other_bucket(), width=136)], r"buckets\[1\].latent must be channels"),
        ([sample(), dataclasses.replace(other_bucket(), phases=())], r"buckets\[1\].phases must not be empty"),
    ],
)
def test_a_bucket_that_does_not_fit_is_named(buckets: list[Manifest], named: str) -> None:
    data = Contents.of([*buckets, sample()][: len(buckets) or 1]).to_json()
    data["buckets"] = data["buckets"][: len(buckets)]
    with pytest.raises(BundleError, match=named):
        Contents.from_json(data)


def test_it_is_read_from_the_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(sample().to_json()))
    assert Manifest.read(tmp_path) == Manifest.read(tmp_path / MANIFEST) == sample()


def test_tensor_specs_know_their_size() -> None:
    spec = TensorSpec("latents", (2, 4, 16, 24), "float32")
    assert spec.bytes == 2 * 4 * 16 * 24 * 4
    assert str(spec) == "latents float32[2, 4, 16, 24]"


def test_a_file_record_is_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = FileDigest(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert FileDigest.of(tmp_path / "a") == expected


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("family", ..., "family is missing"),
        ("family", "", "family must be a text"),
        ("width", "192", "width must be a whole number"),
        ("width", True, "width must be a whole number"),
        ("batch", 0, "batch must be a whole number of 1 or more"),
        ("guidance", 1, "guidance must be true or false"),
        ("latent", [4, 16], "latent must be channels, height and width"),
        ("rule|strided", [0, 1.5], "rule.strided must be null or two rising fractions"),
        ("rule|strided", [0.5, 0.1], "rule.strided must be null or two rising fractions"),
        ("rule|control", "0.6", "rule.control must be a number"),
        ("rule|extra", 1, "rule.extra is not a field"),
        ("phases", {}, "phases must be a list"),
        ("phases", [], "phases must not be empty"),
        ("phases|0|kind", "tiled", r"phases\[0\].kind must be one of strided"),
        ("phases|1|kind", "strided", r"phases\[1\] is there twice"),
        ("phases|1|kind", "pooled", r"phases\[1\] .* is a phase that the rule never reaches"),
        ("phases|0|inputs|1|shape", [2, -1], r"phases\[0\].inputs\[1\].shape\[1\] must be a whole number"),
        ("phases|0|inputs|1|dtype", "float16", r"phases\[0\].inputs\[1\].dtype must be one of float32, int32"),
        ("phases|0|outputs|0|name", None, r"phases\[0\].outputs\[0\].name must be a text"),
        ("phases|0|graph", "unet/other.onnx", r"phases\[0\].graph refers to a file that 'files' does not list"),
        ("samplers|ddim", "nowhere", "samplers.ddim refers to a file that 'files' does not list"),
        ("default_sampler", "euler", "default_sampler must be one of"),
        ("steps", [2, 1], "steps must be rising"),
        ("steps", [], "steps must be rising"),
        ("files|unet/strided.onnx|size", -1, "files.unet/strided.onnx.size must be a whole number"),
        ("files|unet/strided.onnx|sha256", "xyz", "sha256 must be 64 hexadecimal digits"),
        ("guidance_rescale", "0.7", "guidance_rescale must be a number"),
        ("force_zeros_for_empty_prompt", 0, "force_zeros_for_empty_prompt must be true or false"),
        ("surprise", 1, "surprise is not a field of this format"),
        ("family", "sd21", "digest does not match the content"),
        ("width", 200, "latent must be channels, and a latent for each 8 pixels of 200x128"),
        ("width", 10**12, "width must be a whole number of 2147483647 at most"),
        ("width", 2**24, "width times height and batch must be 67108864 at most"),
        ("latent", [4, 32, 24], "latent must be channels, and a latent for each 8 pixels"),
        ("latent", [65, 16, 24], "latent must be channels"),
        ("rule|control", 1e308, "rule.control must be a number that float32 can hold"),
        ("rule|control", 1.5, "rule.control must be null or a fraction from 0 to 1"),
        ("guidance_rescale", 10**300, "guidance_rescale must be a number that float32 can hold"),
        ("phases|0|inputs|0|shape", [], r"phases\[0\].inputs\[0\].shape must have 1 to 8 axes"),
        ("phases|0|inputs|0|shape", [1] * 9, r"phases\[0\].inputs\[0\].shape must have 1 to 8 axes"),
        ("phases|0|inputs|0|shape", [2, 4, 16, 25], r"phases\[0\].inputs must hold float32 latents \[2, 4, 16, 24\]"),
        ("phases|0|inputs|0|dtype", "int32", r"phases\[0\].inputs must hold float32 latents"),
        ("phases|0|inputs|1|name", "latents", r"phases\[0\].inputs must have names of their own"),
        ("phases|0|inputs|1|name", "time", r"phases\[0\].inputs must hold timestep"),
        ("phases|0|inputs|1", ..., r"phases\[0\].inputs must hold timestep"),
        ("phases|0|inputs|2|shape", [2, 77], r"phases\[0\].inputs must be what a run gives"),
        ("phases|0|inputs|2|shape", [2, 77, 2**20], r"phases\[0\] takes or gives more than 192x128 needs"),
        ("phases|0|inputs|3|shape", [2], r"phases\[0\].inputs must be what a run gives"),
        ("phases|1|inputs|2|shape", [2, 77, 33], r"phases\[1\].inputs must be those of the first phase"),
        ("phases|0|outputs|0|shape", [2, 4, 16, 8], r"phases\[0\].outputs must be noise_pred float32\[2, 4, 16, 24\]"),
        ("phases|0|outputs", [], r"phases\[0\].outputs must be noise_pred"),
        ("files|unet/strided.onnx|size", 2**63, "size must be a whole number of 9223372036854775807 at most"),
    ],
)
@pytest.mark.parametrize("older", [False, True], ids=["", "format 1"])
def test_what_is_wrong_is_named(path: str, value: object, named: str, older: bool) -> None:
    with pytest.raises(BundleError, match=named) as caught:
        Manifest.from_json(changed(path, value, older=older))
    assert caught.value.exit_code == 4
    assert caught.value.advice


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../weights",
        "unet/../../weights",
        "C:/weights",
        "unet\\weights",
        "unet//weights",
        "./unet",
        "a\nb",
    ],
)
@pytest.mark.parametrize("field", ["weights|unet", "phases|0|graph", "phases|0|engines|toy", "samplers|ddim", "report"])
def test_a_path_that_leaves_the_bundle_is_refused(field: str, path: str) -> None:
    with pytest.raises(BundleError, match=re.escape(field.replace("|", ".").replace("phases.0", "phases[0]"))):
        Manifest.from_json(changed(field, path))


def test_a_listed_file_that_leaves_the_bundle_is_refused() -> None:
    data = changed("family", "sd15")
    data["files"]["../evil"] = {"size": 1, "sha256": "0" * 64}
    with pytest.raises(BundleError, match="must not have"):
        Manifest.from_json(data)


def test_a_newer_format_says_which_runtime_reads_it() -> None:
    data = {"format": FORMAT + 1, "tools": {"hidiff-runtime": "7.2.0"}, "anything": "else"}
    with pytest.raises(BundleError, match=f"format {FORMAT + 1}") as caught:
        Manifest.from_json(data)
    assert "hidiff-runtime>=7.2.0" in caught.value.advice


@pytest.mark.parametrize("found", [None, 0, True, "1"])
def test_a_foreign_manifest_is_told_apart(found: object) -> None:
    with pytest.raises(BundleError, match="not the manifest of a HiDiffusion bundle"):
        Manifest.from_json({"manifest_version": 3, "format": found})


def test_a_manifest_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    text = json.dumps(sample().to_json())
    for length in range(0, len(text), 97):
        (tmp_path / MANIFEST).write_text(text[:length])
        with pytest.raises(BundleError):
            Manifest.read(tmp_path)


def test_no_flipped_bit_of_the_manifest_is_believed(tmp_path: Path) -> None:
    raw = json.dumps(sample().to_json()).encode()
    for place in range(0, len(raw), 13):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << (place % 8)
        (tmp_path / MANIFEST).write_bytes(flipped)
        with pytest.raises(BundleError):
            Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"format": 1, "format": 1}', '{"format": NaN}', "", "[" * 100_000])
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        Manifest.read(tmp_path)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a finished bundle"):
        Manifest.read(tmp_path)


def test_an_unknown_phase_is_named() -> None:
    with pytest.raises(BundleError, match="strided_pooled"):
        sample().phase(Phase(PhaseKind.STRIDED_POOLED))


def test_every_path_is_listed_with_its_field() -> None:
    manifest = dataclasses.replace(sample(), report="report.json")
    assert dict(manifest.paths())["report"] == "report.json"
    assert dict(manifest.paths())["phases[1].engines.toy"] == "unet/windowed.onnx"
