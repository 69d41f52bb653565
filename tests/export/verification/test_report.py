import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hidiff_export.errors import StorageError
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.magnitudes import Magnitude, Magnitudes
from hidiff_export.reference.tolerances import Boundary
from hidiff_export.verification import report as report_module
from hidiff_export.verification.report import Check, GraphResults, Report, store
from hidiff_export.verification.side_by_side import SideBySide
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import verify_files
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest, PhaseRecord, TensorSpec
from hidiff_runtime.phases import PhaseRule
from hidiff_runtime.verification.comparison import Bound, Verdict, compare, compare_image

BOUND = Bound(80, "float32 rounding")
VALUES = np.linspace(-1, 1, 64, dtype=np.float32)
GRAPHS = GraphResults(Precision.FLOAT32, engines_widen=True)


def report(candidate: np.ndarray | None) -> Report:
    whole = compare("denoiser against diffusers", VALUES, VALUES, Bound(60, "rounding adds up"), steps=3)
    call = compare("engine against PyTorch", VALUES, candidate, BOUND, phase="strided", step=0, steps=3)
    checks = (Check(whole, 2.5), Check(call, 0.25))
    return Report("my-bundle", "random:0", "PyTorch 2, float32", "onnxruntime", checks, GRAPHS)


def test_all_verdicts_have_to_hold_and_there_has_to_be_one() -> None:
    assert report(VALUES + np.float32(1e-6)).ok
    assert not report(VALUES + np.float32(1e-3)).ok
    assert not report(None).ok
    assert not replace(report(VALUES), checks=()).ok


def test_json_holds_every_verdict_as_the_runtime_reads_it() -> None:
    made = report(VALUES + np.float32(1e-3))

    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))

    assert not data["ok"]
    assert data["against"] == "random:0"
    assert tuple(Verdict.from_dict(verdict) for verdict in data["verdicts"]) == made.verdicts
    assert len(data["seconds"]) == len(data["verdicts"])


@pytest.mark.parametrize(
    ("candidate", "finding"),
    [
        (VALUES + np.float32(1e-3), "expected at least 80 dB, got"),
        (None, "missing output"),
        (np.where(VALUES > 0.9, np.float32(np.nan), VALUES), "NaN or infinite"),
        (VALUES[:3], "expected shape [64], got [3]"),
    ],
)
def test_junit_has_a_failure_for_each_verdict_that_does_not_hold(candidate: np.ndarray | None, finding: str) -> None:
    suite = ET.fromstring(report(candidate).to_junit())

    assert (suite.tag, suite.attrib["tests"], suite.attrib["failures"]) == ("testsuite", "2", "1")
    whole, call = suite.findall("testcase")
    assert whole.find("failure") is None
    assert (call.attrib["classname"], call.attrib["name"]) == ("engine against PyTorch", "strided, step 1 of 3")
    failure = call.find("failure")
    assert failure is not None
    assert finding in failure.attrib["message"]
    assert "float32 rounding" in (failure.text or "")


def test_the_page_and_the_table_tell_people_what_failed_and_why_the_bound_is_what_it_is() -> None:
    failing = report(VALUES + np.float32(1e-3))
    console = Console(width=160)

    with console.capture() as capture:
        console.print(failing.table())

    for text in (failing.to_markdown(), capture.get()):
        assert "FAILED" in text
        assert "strided" in text
        assert "1/3" in text
    assert "# Parity of my-bundle: FAILED" in failing.to_markdown()
    assert "At least 80 dB (engine against PyTorch): float32 rounding" in failing.to_markdown()
    assert "FAILED" not in report(VALUES).to_markdown()


def with_magnitudes(*values: float) -> Report:
    found = Magnitudes.of(
        Magnitude("unet", f"mid_block.{index}", "mul", value, f"phase-{index}", 1, 3)
        for index, value in enumerate(values)
    )
    return replace(report(VALUES), magnitudes=found)


def test_every_form_of_the_report_has_the_largest_magnitude_of_each_graph() -> None:
    made = with_magnitudes(50.0, 32752.0)
    assert made.ok
    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert Magnitudes.from_dict(data["magnitudes"], "report") == made.magnitudes
    assert data["notices"] == list(made.magnitudes.notices)
    page = made.to_markdown()
    assert "- float16 range: mid_block.0 (mul) reaches 50 in phase-0, step 2 of 3, headroom 1,310\n" in page
    assert "- float16 range: mid_block.1 (mul) reaches 32,752 in phase-1, step 2 of 3, headroom 2\n" in page
    assert "FAILED" not in page
    assert made.magnitudes.notices[0] in page
    suite = ET.fromstring(made.to_junit())
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("4", "0")
    assert suite.findtext("testcase[@classname='float16 range'][@name='phase-0']/system-out", "").startswith(
        "mid_block.0"
    )


def test_a_magnitude_beyond_float16_fails_the_report_whatever_the_verdicts_say() -> None:
    made = with_magnitudes(50.0, 65505.0)
    assert not made.failures
    assert not made.ok
    assert "FAILED" in made.to_markdown()
    assert "mid_block.1 (mul) reaches 65,505 in phase-1, step 2 of 3, headroom 1: FAILED" in made.to_markdown()
    suite = ET.fromstring(made.to_junit())
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("4", "1")
    failure = suite.find("testcase[@name='phase-1']/failure")
    assert failure is not None
    assert failure.attrib["message"] == "mid_block.1 (mul) reaches 65,505 in phase-1, step 2 of 3, beyond 65,504"


def test_a_report_without_float16_has_no_magnitudes() -> None:
    data = report(VALUES).to_dict()
    assert (data["magnitudes"], data["notices"]) == (None, [])


PICTURE = Bound(20, "pictures differ by rounding", psnr_db=40, ssim=0.99)


def picture_report(amount: float) -> Report:
    reference = np.random.RandomState(0).uniform(0, 1, (1, 3, 32, 48)).astype(np.float32)
    candidate = reference + np.float32(amount)
    verdict = compare_image("picture", reference, candidate, PICTURE, steps=3)
    panels = SideBySide.of(reference, candidate, "onnxruntime")
    return Report("my-bundle", "random:0", "PyTorch 2, float32", "onnxruntime", (Check(verdict, 1.0),), GRAPHS, panels)


def test_a_picture_is_judged_by_psnr_and_ssim_and_every_form_of_the_report_says_so() -> None:
    good, bad = picture_report(0.001), picture_report(0.02)
    assert good.ok
    (verdict,) = bad.verdicts
    assert verdict.metrics is not None
    assert verdict.metrics.snr_db > 20
    assert not bad.ok
    console = Console(width=160)
    with console.capture() as capture:
        console.print(bad.table())
    junit = ET.fromstring(bad.to_junit())
    failure = junit.find(".//failure")
    assert failure is not None
    for text in (bad.to_markdown(), capture.get(), junit.findtext(".//system-out", ""), failure.attrib["message"]):
        assert "PSNR 34.0 dB (at least 40), SSIM 0.99" in text
        assert "largest pixel difference 2.0e-02 of 1" in text
    data = json.loads(json.dumps(bad.to_dict(), allow_nan=False))
    assert data["verdicts"][0]["metrics"]["psnr_db"] == pytest.approx(33.98, abs=0.01)
    assert tuple(Verdict.from_dict(verdict) for verdict in data["verdicts"]) == bad.verdicts
    assert data["picture"] == {"path": "parity/picture.png", "amplified": 10.0}


def test_each_demand_of_a_pictures_bound_counts() -> None:
    reference = np.random.RandomState(0).uniform(0, 1, (1, 3, 32, 48)).astype(np.float32)
    candidate = reference + np.float32(0.02)
    for demands in ({"psnr_db": 34.1}, {"ssim": 0.99999}):
        assert not compare_image("picture", reference, candidate, Bound(20, "", **demands)).ok
        assert not compare("picture", reference, candidate, Bound(20, "", **demands)).ok
    assert compare_image("picture", reference, candidate, Bound(20, "", psnr_db=33, ssim=0.9)).ok


def test_the_picture_is_kept_with_the_report_and_goes_with_it(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    before = Manifest.read(folder)

    store(picture_report(0.02), folder)

    manifest = Manifest.read(folder)
    verify_files(BundleFolder(folder), manifest.files)
    assert set(manifest.files) - set(before.files) == {
        *("parity/report.json", "parity/report.md", "parity/picture.png"),
    }
    assert "(picture.png)" in (folder / "parity/report.md").read_text(encoding="utf-8")
    store(report(VALUES), folder)
    assert "parity/picture.png" not in Manifest.read(folder).files
    assert not (folder / "parity/picture.png").exists()


def bundle(folder: Path) -> Path:
    """A folder with a whole manifest; what is in its files does not matter here."""
    paths = ("unet/windowed.onnx", "unet/windowed.onnxruntime.onnx", "unet/weights.safetensors", "samplers/ddim.st")
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path, encoding="utf-8")
    rule = PhaseRule()
    shapes = {"latents": (1, 4, 8, 8), "timestep": (1,), "prompt_embeds": (1, 77, 32)}
    inputs = tuple(TensorSpec(name, shape, "float32") for name, shape in shapes.items())
    noise = TensorSpec("noise_pred", (1, 4, 8, 8), "float32")
    manifest = Manifest(
        tools={},
        recipe={},
        family="sd15",
        task="text-to-image",
        width=64,
        height=64,
        batch=1,
        guidance=False,
        precision="float32",
        rule=rule,
        latent=(4, 8, 8),
        windowed_blocks=(),
        phases=(PhaseRecord(paths[0], {"onnxruntime": paths[1]}, inputs, (noise,), rule.phases()[0]),),
        samplers={"ddim": paths[3]},
        default_sampler="ddim",
        steps=(1, 2),
        weights={"unet": paths[2]},
        files={path: FileDigest.of(folder / path) for path in paths},
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    return folder


def test_a_stored_report_is_part_of_the_bundle_and_replaces_the_one_before(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    before = Manifest.read(folder)

    store(report(None), folder)
    store(report(VALUES), folder)

    manifest = Manifest.read(folder)
    verify_files(BundleFolder(folder), manifest.files)
    assert manifest.report == "parity/report.json"
    assert set(manifest.files) == {*before.files, "parity/report.json", "parity/report.md"}
    assert json.loads((folder / "parity/report.json").read_text(encoding="utf-8"))["ok"]
    assert replace(manifest, report=None, files=before.files) == before


@pytest.mark.parametrize("name", [MANIFEST, "parity/report.json", "parity/report.md", "parity/picture.png"])
@pytest.mark.parametrize("ending", ["", ".tmp"])
def test_no_report_is_written_through_a_link(tmp_path: Path, name: str, ending: str) -> None:
    """Neither into the store that a bundle's files lie in, nor over a file that somebody let a link lead to."""
    folder, victim = bundle(tmp_path / "bundle"), tmp_path / "victim"
    link = folder / f"{name}{ending}"
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.rename(victim)
    else:
        victim.write_text("mine")
    link.symlink_to(victim)
    before = victim.read_bytes()
    if ending and not name.endswith("json"):
        store(picture_report(0.02), folder)  # nothing of that name is written
    else:
        with pytest.raises(StorageError, match="is a symbolic link"):
            store(picture_report(0.02), folder)
    assert victim.read_bytes() == before


def test_a_report_is_not_written_into_another_bundle_than_the_one_it_is_about(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    verified = Manifest.read(folder).digest
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(StorageError, match="Another bundle came in the place"):
        store(report(VALUES), folder, verified="0" * 64)
    assert (folder / "manifest.json").read_bytes() == before
    store(report(VALUES), folder, verified=verified)
    assert Manifest.read(folder).report


def test_no_report_is_written_into_a_linked_folder(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle")
    (tmp_path / "theirs").mkdir()
    (folder / "parity").symlink_to(tmp_path / "theirs")
    with pytest.raises(StorageError, match="is a symbolic link"):
        store(report(VALUES), folder)
    assert list((tmp_path / "theirs").iterdir()) == []


@pytest.mark.parametrize("writes", [1, 2])
def test_whenever_storing_is_cut_short_the_bundle_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    folder = bundle(tmp_path)
    store(report(None), folder)
    monkeypatch.setattr(report_module, "write_json", _failing_after(writes, report_module.write_json))

    with pytest.raises(StorageError):
        store(report(VALUES), folder)

    manifest = Manifest.read(folder)
    verify_files(BundleFolder(folder), manifest.files)
    assert manifest.report is None


def _failing_after(writes: int, write: Callable[[Path, object], None]) -> Callable[[Path, object], None]:
    left = [writes]

    def maybe(path: Path, value: object) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        write(path, value)

    return maybe


@pytest.mark.parametrize(
    ("precision", "on_host", "engines"),
    [
        (Precision.FLOAT16, True, "Engines: on the CPU, which keeps float32 between float16 operations"),
        (Precision.FLOAT16, False, None),
        (Precision.BFLOAT16, False, None),
        (Precision.FLOAT16, None, "Engines: none ran, and no run was made with the bundle."),
        (Precision.FLOAT32, True, None),
    ],
)
def test_every_form_of_the_report_says_what_the_graphs_were_computed_in(
    precision: Precision, on_host: bool | None, engines: str | None
) -> None:
    made = replace(report(VALUES), graphs=GraphResults(precision, engines_widen=on_host))
    console = Console(width=500)
    with console.capture() as capture:
        console.print(made.table())

    for form in (made.to_markdown(), capture.get(), json.dumps(made.to_dict())):
        text = " ".join(form.split())  # the table breaks lines
        assert "Graphs: computed in float32, normalization and attention as engines do them" in text
        assert (f"every result rounded to {precision.value}" in text) == (precision is not Precision.FLOAT32)
        assert ("Engines:" in text) == (engines is not None)
        assert engines is None or engines in text


@pytest.mark.parametrize(("candidate", "ok"), [(VALUES, True), (None, False)])
@pytest.mark.parametrize("boundary", [Boundary.GRAPH_RUN, Boundary.TEXT_GRAPH, Boundary.CONTROLNET_GRAPH])
def test_the_graphs_have_an_outcome_of_their_own(boundary: Boundary, candidate: np.ndarray | None, ok: bool) -> None:
    engine = Check(compare(Boundary.RANDOM.value, VALUES, None, BOUND), 1.0)
    graph = Check(compare(boundary.value, VALUES, candidate, BOUND), 1.0)

    graphs = replace(report(VALUES), checks=(engine, graph)).to_dict()["graphs"]

    assert graphs["ok"] is ok
    assert graphs["arithmetic"] == "float32"
