"""Sharing what torch exported among tests changes no graph, and shares nothing between networks that differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, build_unet, load
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.families.family import Family, Task, Width, unet_config
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.graph import capture, portable
from hidiff_export.modules import raunet
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.modules.text_encoder import TextEncoderModule
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.phases import Phase, PhaseKind
from tests.traced_once import TracedOnce, key_of


def text_encoder(seed: int = 0, **changed: Any) -> TextEncoderModule:
    checkpoint = load(Component.TEXT_ENCODER, f"random:{seed}", Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY)
    network = build(Component.TEXT_ENCODER, {**checkpoint.config, **changed}, checkpoint.state_dict)
    return TextEncoderModule(network, penultimate=False)


def unet(kind: PhaseKind = PhaseKind.WINDOWED, width: int = 16, *, seed: int = 0) -> PhaseUNet:
    config = unet_config(Family.SD15, Task.TEXT_TO_IMAGE, Width.TINY)
    network = build_unet(config, synthesize(Component.UNET, config, seed))
    return PhaseUNet(network, Layout.of(Family.SD15), Phase(kind), 16, width)


def test_what_is_taken_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []

    def trace(module: Any, model_batch: int) -> Any:
        traced.append(module.title)
        return capture.capture(module, model_batch)

    monkeypatch.setattr(portable, "capture", TracedOnce(trace, tmp_path, "here"))
    written = []
    for seed in (0, 0, 1):  # the last with other weights, of which a graph holds none
        folder = tmp_path / str(len(written))
        folder.mkdir()
        module = text_encoder(seed)
        store = WeightStore.write(module.text_encoder.state_dict(), folder / "weights.safetensors", Precision.FLOAT32)
        portable.write_graph(module, 1, store, folder / "a.onnx")
        written.append((folder / "a.onnx").read_bytes())
    assert traced == ["the text encoder"]
    assert len(set(written)) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: key_of(unet(PhaseKind.STRIDED), 2),
        lambda: key_of(unet(width=24), 2),
        lambda: key_of(unet(), 1),
        lambda: key_of(unet().half(), 2),
    ],
    ids=["phase", "size", "batch", "type"],
)
def test_another_network_is_another(other: Callable[[], str]) -> None:
    assert key_of(unet(), 2) == key_of(unet(seed=1), 2)
    assert other() != key_of(unet(), 2)


def test_other_code_is_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(unet(), 2)
    monkeypatch.setattr(raunet, "install_phase", lambda *_: None)
    assert key_of(unet(), 2) != before


def test_another_setting_of_a_part_is_another_network() -> None:
    assert key_of(text_encoder(), 1) != key_of(text_encoder(hidden_act="gelu"), 1)
