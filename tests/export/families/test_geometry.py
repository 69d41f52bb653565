"""Sizes computed without torch: against figures worked out by hand, and against the shapes a real UNet makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family, Task, unet_config
from hidiff_export.families.geometry import UNetGeometry, WindowShape, control_latent
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_runtime.phases import Phase, PhaseKind
from tests.parity.pipelines import network


def geometry(family: Family, kind: PhaseKind, height: int, width: int) -> UNetGeometry:
    return UNetGeometry.of(unet_config(family, Task.TEXT_TO_IMAGE), Layout.of(family), Phase(kind), height, width)


def heights(found: UNetGeometry) -> list[int]:
    return [height for _, height, _ in found.skips]


@pytest.mark.parametrize(
    ("kind", "expected", "mid", "restore"),
    [
        (PhaseKind.WINDOWED, [128, 128, 128, 64, 64, 64, 32, 32, 32, 16, 16, 16], 16, None),
        (PhaseKind.STRIDED, [128, 128, 128, 32, 32, 32, 16, 16, 16, 8, 8, 8], 8, None),
        (PhaseKind.POOLED, [128, 128, 128, 64, 32, 32, 16, 16, 16, 8, 8, 8], 8, (64, 96)),
        (PhaseKind.STRIDED_POOLED, [128, 128, 128, 32, 16, 16, 8, 8, 8, 4, 4, 4], 4, (32, 48)),
    ],
)
def test_sd_skips(kind: PhaseKind, expected: list[int], mid: int, restore: tuple[int, int] | None) -> None:
    found = geometry(Family.SD15, kind, 128, 192)
    assert heights(found) == expected
    assert [width for _, _, width in found.skips] == [size * 3 // 2 for size in expected]
    assert [channels for channels, _, _ in found.skips] == [320] * 4 + [640] * 3 + [1280] * 5
    assert found.mid == (1280, mid, mid * 3 // 2)
    assert found.restore == restore
    assert found.windows == (WindowShape(128, 192),) * 5


@pytest.mark.parametrize(
    ("kind", "expected", "inner"),
    [
        (PhaseKind.WINDOWED, [135, 135, 135, 68, 68, 68, 34, 34, 34], WindowShape(68, 120)),
        (PhaseKind.STRIDED, [135, 135, 135, 68, 68, 68, 17, 17, 17], WindowShape(68, 120)),
        (PhaseKind.POOLED, [135, 135, 135, 68, 34, 34, 17, 17, 17], WindowShape(34, 60)),
        (PhaseKind.STRIDED_POOLED, [135, 135, 135, 68, 34, 34, 9, 9, 9], WindowShape(34, 60)),
    ],
)
def test_sdxl_skips_of_an_odd_size(kind: PhaseKind, expected: list[int], inner: WindowShape) -> None:
    found = geometry(Family.SDXL, kind, 135, 240)
    outer = WindowShape(68, 120)
    assert heights(found) == expected
    assert found.restore == ((68, 120) if kind.pooled else None)
    assert found.windows == (outer,) * 2 + (inner,) * 6 + (outer,) * 2


def test_windows_of_an_odd_map_are_rounded_up() -> None:
    shape = WindowShape(135, 240)
    assert shape.window == (68, 120)
    assert shape.padded == (136, 240)
    assert shape.resized
    assert not WindowShape(136, 240).resized


def test_shifts_are_quarters_rounded_down_first() -> None:
    assert [WindowShape(22, 60).shift(quarters) for quarters in range(4)] == [(0, 0), (2, 7), (4, 14), (6, 21)]


def test_low_windows_are_not_shifted_sideways() -> None:
    assert WindowShape(6, 64).shift(3) == (0, 0)
    assert WindowShape(64, 6).shift(3) == (24, 0)


@pytest.mark.parametrize(
    ("latent", "control"),
    [((256, 256), (128, 128)), ((192, 256), (96, 128)), ((135, 240), (72, 128)), ((512, 200), (128, 48))],
)
def test_control_sees_the_native_size(latent: tuple[int, int], control: tuple[int, int]) -> None:
    assert control_latent(*latent) == control


def test_a_layout_of_another_family_is_refused() -> None:
    config = unet_config(Family.SDXL, Task.TEXT_TO_IMAGE)
    with pytest.raises(InputError, match=r"no module up_blocks\.2\.attentions\.1"):
        UNetGeometry.of(config, Layout.of(Family.SD15), Phase(PhaseKind.WINDOWED), 128, 128)


class Recorder:
    """Notes the shape that each module computes, before a phase pools it, and the skips that the up blocks take."""

    def __init__(self, unet: Any, names: list[str]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.skips: list[tuple[int, ...]] = []
        for name in names:
            unet.get_submodule(name).register_forward_hook(self._noting(name), prepend=True)
        for block in unet.up_blocks:
            block.register_forward_pre_hook(self._note_skips, with_kwargs=True)

    def _noting(self, name: str) -> Any:
        def note(_module: Any, _args: Any, output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            self.shapes[name] = tuple(tensor.shape[1:])

        return note

    def _note_skips(self, _block: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.skips += [tuple(skip.shape[1:]) for skip in reversed(kwargs["res_hidden_states_tuple"])]


@pytest.mark.parametrize("kind", PhaseKind)
@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_a_real_unet_makes_these_sizes(family: Family, kind: PhaseKind) -> None:
    """Odd ones, with a ControlNet's residuals, which fit in at no other sizes."""
    phase = Phase(kind, control=True)
    phase_unet = PhaseUNet(network(Component.UNET, family), Layout.of(family), phase, 35, 26)
    found = phase_unet.geometry
    recorder = Recorder(phase_unet.unet, [feature.name for feature in found.features])
    types = {"float32": torch.float32, "int32": torch.int32}
    inputs = {s.name: torch.zeros(s.shape, dtype=types[s.dtype]) for s in phase_unet.input_specs(1)}
    with torch.no_grad():
        output = phase_unet(**PhaseUNet.arguments(inputs))
    assert recorder.shapes == {f.name: (f.channels, f.height, f.width) for f in found.features}
    assert recorder.skips == list(reversed(found.skips))
    assert recorder.shapes["mid_block.resnets.1"] == found.mid
    assert [tuple(output.shape)] == [spec.shape for spec in phase_unet.output_specs(1)]
    for block, shape in zip(phase_unet.layout.windowed_blocks, found.windows, strict=True):
        attention = block.partition(".transformer_blocks")[0]
        assert recorder.shapes[attention][1:] == (shape.height, shape.width)
