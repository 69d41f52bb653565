"""What diffusers' pipelines correct in a noise schedule, beside the pipelines themselves."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from hidiff_export.families.family import Family, Task, default_scheduler
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler, corrected
from hidiff_export.scheduler_tables.scheduler_probe import probe

OLD = {"steps_offset": 0, "clip_sample": True, "skip_prk_steps": False}
TASKS = {
    Task.TEXT_TO_IMAGE: "",
    Task.IMAGE_TO_IMAGE: "Img2Img",
    Task.INPAINTING: "Inpaint",
    Task.CONTROLNET: "ControlNet",
    Task.CONTROLNET_IMAGE_TO_IMAGE: "ControlNetImg2Img",
}


def as_run(family: Family, task: Task, scheduler: Any) -> dict[str, Any]:
    """The keys as a pipeline leaves them in its scheduler, if the scheduler has them."""
    kind = getattr(diffusers, f"StableDiffusion{'XL' if family.is_sdxl else ''}{TASKS[task]}Pipeline")
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet"))
    parts |= {"scheduler": scheduler, **({"controlnet": None} if task.has_control else {})}
    if family.is_sdxl:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {key: value for key, value in kind(**parts).scheduler.config.items() if key in OLD}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", [Family.SD15, Family.SD21, Family.SDXL])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler"])
def test_a_schedule_is_what_the_pipeline_makes_of_it(family: Family, task: Task, sampler: str) -> None:
    given = {**default_scheduler(family)[1], **OLD}
    due = as_run(family, task, build_scheduler(sampler, given))
    found = build_scheduler(sampler, corrected(given, family, task)).config
    assert {key: found[key] for key in due} == due
    changed = {key for key in due if due[key] != OLD[key]}
    expected = set() if family.is_sdxl or task.has_control else {"steps_offset"}
    assert changed >= expected
    assert bool(changed) == bool(expected)


@pytest.mark.parametrize("left_out", [True, False])
def test_an_old_checkpoint_starts_where_diffusers_does(left_out: bool) -> None:
    config = {key: value for key, value in default_scheduler(Family.SD15)[1].items() if key not in OLD}
    config |= {} if left_out else OLD
    table = probe("ddim", corrected(config, Family.SD15, Task.TEXT_TO_IMAGE), [10])
    assert [evaluation.timestep for evaluation in table.schedule(10).evaluations][:2] == [901, 801]


def test_what_needs_no_correction_stays() -> None:
    config = default_scheduler(Family.SD15)[1]
    assert corrected(config, Family.SD15, Task.TEXT_TO_IMAGE) == config
