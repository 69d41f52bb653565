"""Real engines, damaged on purpose: each kind of damage fails the check that the unaltered bundle passes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hidiff_export.cli import main
from hidiff_export.reference.tolerances import Boundary
from hidiff_export.verification.report import Report
from hidiff_export.verification.verify import verify
from hidiff_runtime import check
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest
from hidiff_runtime.format.safetensors import SafetensorsFile
from hidiff_runtime.verification.comparison import Verdict
from hidiff_runtime.verification.replay_components import PICTURE, TEXT, TOKENS, VAE

SOURCE = "random:0"
WEIGHT = "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_q.weight"
LIVE = {Boundary.TRAJECTORY.value, Boundary.RANDOM.value, Boundary.RUN.value, Boundary.PICTURE.value}
ELSEWHERE = {boundary.value for boundary in Boundary if boundary.is_graph} - {Boundary.GRAPH.value}
"""What only half-precision bundles are judged by."""
ALL = {boundary.value for boundary in Boundary} - {Boundary.CONTROLNET.value} - ELSEWHERE
RECORDED = {
    *(Boundary.RECORDED_CALL.value, Boundary.RECORDED_STEP.value),
    *(Boundary.RECORDED_RUN.value, Boundary.RECORDED_PICTURE.value),
}


@pytest.fixture
def bundle(sd15_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))


def refresh(folder: Path) -> Path:
    """Hashes every file anew, so that nothing but the comparison itself can find the damage."""
    manifest = Manifest.read(folder)
    files = {path: FileDigest.of(folder / path) for path in manifest.files}
    (folder / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json()), encoding="utf-8")
    return folder


def change_weight(
    folder: Path, change: Callable[[np.ndarray], object], network: str = "unet", weight: str = WEIGHT
) -> Path:
    """Lets ``change`` write into one tensor of a store."""
    store = folder / network / "weights.safetensors"
    with SafetensorsFile.open(store) as file:
        info = file.info(weight)
    values = np.memmap(store, np.float32, "r+", info.offset, info.shape)
    change(values)
    values.flush()
    return refresh(folder)


def failing(report: Report) -> set[str]:
    return {verdict.boundary for verdict in report.failures}


def test_an_unaltered_bundle_holds_with_room_to_spare(sd15_bundle: Path) -> None:
    report = verify(sd15_bundle, against=SOURCE)

    assert report.ok, report.to_markdown()
    assert {verdict.boundary for verdict in report.verdicts} == ALL
    for verdict in report.verdicts:
        assert verdict.metrics is not None
        assert verdict.metrics.snr_db > 95


def test_engines_of_two_phases_swapped(bundle: Path) -> None:
    (strided, windowed) = (bundle / record.engines["onnxruntime"] for record in Manifest.read(bundle).phases)
    content = strided.read_bytes()
    strided.write_bytes(windowed.read_bytes())
    windowed.write_bytes(content)

    report = verify(refresh(bundle))

    assert failing(report) == LIVE | RECORDED
    assert not check(bundle).ok


def test_one_shift_changed_in_one_recorded_sample(bundle: Path) -> None:
    index = bundle / "reference/samples.json"
    samples = json.loads(index.read_text(encoding="utf-8"))
    shifts = samples["calls"][0]["window_shifts"]
    shifts[-1] = (shifts[-1] + 1) % 4
    index.write_text(json.dumps(samples), encoding="utf-8")

    report = check(refresh(bundle), runs=False)

    (found,) = (verdict for verdict in report.verdicts if not verdict.ok)
    assert found.phase == samples["calls"][0]["kind"]
    assert found.metrics is not None
    assert found.metrics.snr_db < 40


def test_one_weight_changed_is_found_against_the_source(bundle: Path) -> None:
    change_weight(bundle, lambda values: np.multiply(values, 1.5, out=values))

    report = verify(bundle, against=SOURCE)

    assert failing(report) == {Boundary.WEIGHTS.value, Boundary.GRAPH.value} | LIVE | RECORDED
    assert WEIGHT in report.verdicts[0].fault


def test_one_weight_that_is_nan(bundle: Path) -> None:
    change_weight(bundle, lambda values: values.__setitem__((0, 0), np.nan))

    report = verify(bundle, against=SOURCE)

    assert failing(report) >= {Boundary.WEIGHTS.value, Boundary.GRAPH.value, *LIVE}
    assert all("NaN" in verdict.fault for verdict in report.failures if verdict.boundary == Boundary.RANDOM.value)


def change_decoder(folder: Path) -> Path:
    return change_weight(folder, halve, "vae", "decoder.conv_out.weight")


def change_encoder(folder: Path) -> Path:
    return change_weight(folder, halve, "vae", "encoder.conv_in.weight")


def change_text_encoder(folder: Path) -> Path:
    store = folder / "text_encoder/weights.safetensors"
    with SafetensorsFile.open(store) as file:
        weight = next(name for name in file.names() if name.endswith("layers.0.mlp.fc1.weight"))
    return change_weight(folder, halve, "text_encoder", weight)


def swap_tokens(folder: Path) -> Path:
    """Exchanges two letters of the tokenizer."""
    path = folder / "text_encoder/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    return refresh(folder)


def halve(values: np.ndarray) -> None:
    np.multiply(values, 0.5, out=values)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (change_decoder, {(VAE, "vae_decoder"), (PICTURE, None)}),
        (change_encoder, {(VAE, "vae_encoder")}),
        (change_text_encoder, {(TEXT, "text_encoder")}),
        (swap_tokens, {(TOKENS, "text_encoder")}),
    ],
)
def test_each_damage_beside_the_unet_is_found_without_pytorch(
    bundle: Path, damage: Callable[[Path], Path], found: set[tuple[str, str | None]]
) -> None:
    report = check(damage(bundle), runs=damage is change_decoder)

    assert {(verdict.boundary, verdict.phase) for verdict in report.verdicts if not verdict.ok} == found
    assert report.exit_code == 1


def test_all_of_that_is_found_by_verify_too_which_shows_the_picture(bundle: Path) -> None:
    for damage in (change_decoder, change_encoder, change_text_encoder, swap_tokens):
        damage(bundle)

    done = CliRunner().invoke(main, ["verify", str(bundle), "--against", SOURCE, "--json"])

    assert done.exit_code == 1
    verdicts = [Verdict.from_dict(verdict) for verdict in json.loads(done.stdout)["verdicts"]]
    # PyTorch computes with the damaged weights, so that what it says now agrees with the engines.
    assert {verdict.boundary for verdict in verdicts if not verdict.ok} == {
        *(Boundary.RECORDED_TOKENS.value, Boundary.RECORDED_TEXT.value),
        *(Boundary.RECORDED_VAE.value, Boundary.RECORDED_PICTURE.value),
        Boundary.WEIGHTS.value,
    }
    weights = [verdict for verdict in verdicts if verdict.boundary == Boundary.WEIGHTS.value]
    assert {verdict.phase: verdict.ok for verdict in weights} == {"unet": True, "text_encoder": False, "vae": False}
    assert "parity/picture.png" in Manifest.read(bundle).files
    with Image.open(bundle / "parity/picture.png") as picture:
        assert picture.size == (3 * 128 + 2 * 8, 128 + 18)
    page = (bundle / "parity/report.md").read_text(encoding="utf-8")
    assert "](picture.png)" in page
    assert "largest pixel difference" in page


def test_means_far_from_zero_are_no_fault_of_a_graph(bundle: Path) -> None:
    """ONNX Runtime's own GroupNormalization would lose half of the digits: 74 dB, below the bound."""
    change_weight(bundle, lambda values: np.add(values, 1000, out=values), weight="conv_in.bias")

    report = verify(bundle, graphs_only=True)

    graphs = [verdict for verdict in report.verdicts if verdict.boundary == Boundary.GRAPH.value]
    assert len(graphs) == 2
    for verdict in graphs:
        assert verdict.metrics is not None
        assert verdict.metrics.snr_db > 85
