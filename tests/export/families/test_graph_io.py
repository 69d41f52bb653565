from __future__ import annotations

import pytest

from hidiff_export.families.family import Family, Task, controlnet_config, text_encoder_configs, unet_config
from hidiff_export.families.graph_io import (
    controlnet_inputs,
    controlnet_outputs,
    most_skipped,
    phase_inputs,
    phase_outputs,
    text_encoder_inputs,
    text_encoder_outputs,
)
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_runtime.phases import Phase, PhaseKind


def described(family: Family, task: Task = Task.TEXT_TO_IMAGE, *, windows: bool = True) -> list[str]:
    phase = Phase(PhaseKind.STRIDED, control=task.has_control)
    layout = Layout.of(family) if windows else Layout.of(family).without_windows()
    return [str(spec) for spec in phase_inputs(unet_config(family, task), layout, phase, 192, 256, 2)]


@pytest.mark.parametrize(("family", "features"), [(Family.SD15, 768), (Family.SD21, 1024)])
def test_sd(family: Family, features: int) -> None:
    assert described(family) == [
        "latents float32[2, 4, 192, 256]",
        "timestep float32[1]",
        f"prompt_embeds float32[2, 77, {features}]",
        "window_shifts int32[5]",
    ]


def test_chunks_of_a_prompt_follow_each_other() -> None:
    layout, phase = Layout.of(Family.SD15), Phase(PhaseKind.WINDOWED)
    inputs = phase_inputs(unet_config(Family.SD15, Task.CONTROLNET), layout, phase, 8, 8, 2, prompt_tokens=231)
    assert str(inputs[2]) == "prompt_embeds float32[2, 231, 768]"
    assert inputs[2] in controlnet_inputs(controlnet_config(Family.SD15), 8, 8, 2, prompt_tokens=231)


def test_a_text_encoder_takes_one_chunk_and_how_many_layers_to_skip() -> None:
    configs = text_encoder_configs(Family.SDXL)
    assert list(map(str, text_encoder_inputs())) == ["input_ids int32[1, 77]", "clip_skip int32[1]"]
    first, second = (text_encoder_outputs(config, pooled=name != "text_encoder") for name, config in configs.items())
    assert list(map(str, first)) == ["prompt_embeds float32[1, 77, 768]"]
    assert list(map(str, second)) == ["prompt_embeds float32[1, 77, 1280]", "text_embeds float32[1, 1280]"]
    assert most_skipped(configs["text_encoder"], penultimate=True) == 10
    assert most_skipped(text_encoder_configs(Family.SD15)["text_encoder"], penultimate=False) == 11


def test_inpainting_takes_the_mask_and_the_masked_picture_along() -> None:
    assert described(Family.SD15, Task.INPAINTING)[0] == "latents float32[2, 9, 192, 256]"


def test_without_windows_there_are_no_shifts() -> None:
    assert [line.partition(" ")[0] for line in described(Family.SD15, windows=False)] == [
        "latents",
        "timestep",
        "prompt_embeds",
    ]


@pytest.mark.parametrize(("family", "features"), [(Family.SD15, 768), (Family.SD21, 1024)])
def test_sd_control(family: Family, features: int) -> None:
    inputs = described(family, Task.CONTROLNET)
    assert inputs[2:4] == [f"prompt_embeds float32[2, 77, {features}]", "window_shifts int32[5]"]
    # At the ControlNet's own size, 96x128, whatever the phase does to the UNet.
    assert inputs[4] == "down_residual_00 float32[2, 320, 96, 128]"
    assert inputs[15:] == ["down_residual_11 float32[2, 1280, 12, 16]", "mid_residual float32[2, 1280, 12, 16]"]
    *given, image, scale = (str(spec) for spec in controlnet_inputs(controlnet_config(family), 192, 256, 2))
    assert given == inputs[:3]
    assert [image, scale] == ["control_image float32[2, 3, 768, 1024]", "conditioning_scale float32[1]"]
    given = [str(spec) for spec in controlnet_outputs(controlnet_config(family), 192, 256, 2)]
    assert given == inputs[4:]


def test_sdxl_control() -> None:
    inputs = described(Family.SDXL, Task.CONTROLNET)
    assert inputs[3:6] == ["window_shifts int32[10]", "text_embeds float32[2, 1280]", "time_ids float32[2, 6]"]
    # At the ControlNet's own size, 96x128, whatever the phase does to the UNet.
    assert inputs[6] == "down_residual_00 float32[2, 320, 96, 128]"
    assert inputs[14] == "down_residual_08 float32[2, 1280, 24, 32]"
    assert inputs[15:] == ["mid_residual float32[2, 1280, 24, 32]"]


def test_the_output_is_the_noise() -> None:
    config, phase = unet_config(Family.SDXL, Task.INPAINTING), Phase(PhaseKind.STRIDED)
    assert [str(spec) for spec in phase_outputs(config, Layout.of(Family.SDXL), phase, 192, 256, 2)] == [
        "noise_pred float32[2, 4, 192, 256]"
    ]
