"""Where a UNet is cut, and what a shallow evaluation over deep features takes, gives and costs."""

from __future__ import annotations

import pytest

from hidiff_export.errors import InputError
from hidiff_export.families.cost import unet_cost
from hidiff_export.families.family import Family, Task, unet_config
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.graph_io import phase_inputs, phase_outputs
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.reuse_depths import DEPTHS, Cut, reuse_error
from hidiff_runtime.phases import Phase, PhaseKind
from hidiff_runtime.reused_features import Reuse

SD15, SDXL = (unet_config(family, Task.TEXT_TO_IMAGE) for family in (Family.SD15, Family.SDXL))


def geometry(family: Family, kind: str, pixels: int) -> UNetGeometry:
    config = unet_config(family, Task.TEXT_TO_IMAGE)
    return UNetGeometry.of(config, Layout.of(family), Phase(PhaseKind(kind)), pixels // 8, pixels // 8)


def test_a_depth_names_its_layers() -> None:
    assert Cut.of(SD15, 1).computed == {"conv_in", "up_blocks.3.resnets.2", "up_blocks.3.attentions.2", "conv_out"}
    assert Cut.of(SDXL, 2).computed == {
        *("conv_in", "down_blocks.0.resnets.0"),
        *("up_blocks.2.resnets.1", "up_blocks.2.resnets.2", "conv_out"),
    }
    added = Cut.of(SDXL, 4).computed - Cut.of(SDXL, 3).computed
    assert added == {
        "down_blocks.0.downsamplers.0",
        *("up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers.0"),
    }


SOURCES = {
    Family.SD15: (
        "3.attentions.1",
        "3.attentions.0",
        "2.upsamplers.0",
        "2.attentions.1",
        "2.attentions.0",
        "1.upsamplers.0",
    ),
    Family.SDXL: ("2.resnets.1", "2.resnets.0", "1.upsamplers.0", "1.attentions.1", "1.attentions.0", "0.upsamplers.0"),
}


@pytest.mark.parametrize(("family", "sources"), SOURCES.items())
def test_deep_features_come_from_the_layer_before(family: Family, sources: tuple[str, ...]) -> None:
    config = unet_config(family, Task.TEXT_TO_IMAGE)
    assert [Cut.of(config, depth).source for depth in DEPTHS[family]] == [f"up_blocks.{name}" for name in sources]


@pytest.mark.parametrize(
    ("family", "kind", "depth", "shape"),
    [
        (Family.SD15, "strided", 1, (320, 128, 128)),
        (Family.SD15, "strided", 3, (640, 128, 128)),  # upsampled already, to the size of the outermost level
        (Family.SD15, "strided", 4, (640, 32, 32)),
        (Family.SDXL, "pooled", 4, (640, 64, 64)),  # after the restored attention
        (Family.SDXL, "pooled", 5, (640, 32, 32)),  # before it
        (Family.SDXL, "windowed", 5, (640, 64, 64)),
    ],
)
def test_deep_features_have_the_size_of_the_layer_that_they_enter(
    family: Family, kind: str, depth: int, shape: tuple[int, int, int]
) -> None:
    deep = Cut.of(unet_config(family, Task.TEXT_TO_IMAGE), depth).deep_features(geometry(family, kind, 1024))
    assert (deep.channels, deep.height, deep.width) == shape


@pytest.mark.parametrize(
    ("family", "kind", "pixels", "percents"),
    [
        (Family.SD15, "windowed", 1024, [7.5, 21, 36]),
        (Family.SD15, "strided", 1024, [14, 40, 68]),
        (Family.SDXL, "windowed", 2048, [1.3, 3.3, 5.8]),
        (Family.SDXL, "pooled", 2048, [3.9, 10, 18]),
    ],
)
def test_a_shallow_evaluation_costs_a_small_part(family: Family, kind: str, pixels: int, percents: list[float]) -> None:
    config, layout, phase = unet_config(family, Task.TEXT_TO_IMAGE), Layout.of(family), geometry(family, kind, pixels)
    full = unet_cost(config, layout, phase).flops
    for depth, percent in enumerate(percents, 1):
        shallow = unet_cost(config, layout, phase, Cut.of(config, depth)).flops
        assert 100 * shallow / full == pytest.approx(percent, rel=0.05)


def test_a_shallow_phase_takes_what_a_full_one_takes_and_deep_features_last() -> None:
    layout, size = Layout.of(Family.SDXL), (192, 256, 2)
    full = phase_inputs(SDXL, layout, Phase(PhaseKind.STRIDED), *size, reuse_depth=2)
    assert full == phase_inputs(SDXL, layout, Phase(PhaseKind.STRIDED), *size)
    *same, deep = phase_inputs(SDXL, layout, Phase(PhaseKind.STRIDED, shallow=True), *size, reuse_depth=2)
    assert tuple(same) == full
    assert str(deep) == "deep_features float32[2, 320, 192, 256]"
    outputs = phase_outputs(SDXL, layout, Phase(PhaseKind.STRIDED), *size, reuse_depth=2)
    assert list(map(str, outputs)) == ["noise_pred float32[2, 4, 192, 256]", str(deep)]
    (only,) = phase_outputs(SDXL, layout, Phase(PhaseKind.STRIDED, shallow=True), *size, reuse_depth=2)
    assert only == outputs[0]


def test_a_shallow_phase_takes_the_residuals_of_its_own_skip_connections() -> None:
    layout, size = Layout.of(Family.SD15), (64, 64, 2)
    phase = Phase(PhaseKind.STRIDED, control=True)
    full = phase_inputs(SD15, layout, phase, *size)
    shallow = phase_inputs(SD15, layout, Phase(PhaseKind.STRIDED, control=True, shallow=True), *size, reuse_depth=3)
    assert shallow[:-1] == full[:7]
    names = [spec.name for spec in shallow[4:]]
    assert names == ["down_residual_00", "down_residual_01", "down_residual_02", "deep_features"]


def test_a_shallow_phase_without_a_depth_is_refused() -> None:
    phase = Phase(PhaseKind.STRIDED, shallow=True)
    with pytest.raises(InputError, match="shallow phase has a depth"):
        phase_inputs(SD15, Layout.of(Family.SD15), phase, 64, 64, 2)


@pytest.mark.parametrize("depth", [0, 12, -1])
def test_a_unet_is_not_cut_where_nothing_is_left(depth: int) -> None:
    with pytest.raises(InputError, match="12 layers on the way up") as caught:
        Cut.of(SD15, depth)
    assert caught.value.advice == "Choose a depth of 1 to 11."


def test_what_a_family_lacks_is_said() -> None:
    assert reuse_error(Reuse(2, 6), Family.SDXL) is None
    errors = [reuse_error(Reuse(1), Family.SD15), reuse_error(Reuse(3, 7), Family.SDXL)]
    assert ["never reused" in str(error) for error in errors] == [True, False]
    assert [error.advice for error in errors if error][1] == "Choose one of 1, 2, 3, 4, 5, 6."
