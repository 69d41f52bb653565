"""Whole pictures by the words of a recipe's noise schedule, beside diffusers with its own scheduler set alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.scheduler_tables import noise_schedule
from tests.parity.pictures import diffusers_pipeline, expected, generated, module_bundle, opened
from tests.parity.test_pictures import BOUND, OTHER_SEED, PROMPT, assert_alike, recipe, snr_db

OWN = default_scheduler(Family.SDXL)[1]
EDM = {
    **{"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0},
    **{"sigma_schedule": "exponential", "prediction_type": "v_prediction", "num_train_timesteps": 1000},
}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
OWN_TIMESTEPS = [999, 749, 499, 249]


@dataclass(frozen=True)
class Case:
    """One way to lay out a run.

    Args:
        words: of the recipe.
        kind: diffusers' scheduler.
        config: what it is set to.
        wrong: set to something else, which has to show in the picture.
        call: what the pipeline is asked beside what all are.
        checkpoint: the scheduler's configuration that the checkpoint comes with.
    """

    words: Mapping[str, Any]
    kind: Any
    config: Mapping[str, Any]
    wrong: Mapping[str, Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] | None = None


EULER = diffusers.EulerDiscreteScheduler
CASES = {
    "zero terminal SNR, trailing": Case(
        {"prediction": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        EULER,
        {**OWN, **ZERO_SNR, "timestep_spacing": "trailing"},
        {**OWN, **ZERO_SNR},
    ),
    "few steps": Case({"timestep_spacing": "trailing"}, EULER, {**OWN, "timestep_spacing": "trailing"}, OWN),
    "betas": Case(
        {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02},
        EULER,
        {**OWN, "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02},
        OWN,
    ),
    "timesteps of one's own": Case(
        {"timesteps": OWN_TIMESTEPS}, EULER, OWN, OWN, {"timesteps": OWN_TIMESTEPS, "num_inference_steps": None}
    ),
    "TCD": Case({"sampler": "tcd"}, diffusers.TCDScheduler, OWN, OWN, {"eta": 0.3}),
    "EDM": Case({}, diffusers.EDMEulerScheduler, EDM, {**EDM, "sigma_max": 80.0}, checkpoint=EDM),
}


@pytest.mark.parametrize("name", CASES)
def test_the_picture_is_diffusers_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(noise_schedule, "find_scheduler_config", lambda _source: case.checkpoint)
    asked_for = recipe("sdxl", **{"sampler": "euler", "guidance": False, "steps": [4], **case.words})
    asked = {"prompt": PROMPT, "seed": 5, "steps": 4}

    def reference(config: Mapping[str, Any], call: Mapping[str, Any]) -> Any:
        pipe = diffusers_pipeline(asked_for, "StableDiffusionXLPipeline", case.kind.from_config(config))
        return expected(_called(pipe, call), asked_for, asked)

    with opened(module_bundle(asked_for, tmp_path / "bundle"), asked_for) as pipe:
        found = generated(pipe, **asked)
        assert_alike(reference(case.config, case.call), found)
        assert snr_db(reference(case.wrong, {} if case.wrong == case.config else case.call), found) < BOUND
        assert snr_db(found, generated(pipe, **{**asked, **OTHER_SEED})) < BOUND


def _called(pipe: Any, call: Mapping[str, Any]) -> Any:
    """The pipeline, that is asked something more; a subclass, for pipelines are called by their class."""
    kind = type(pipe)

    def asked(self: Any, **given: Any) -> Any:
        return kind.__call__(self, **{**given, **call})

    pipe.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__call__": asked})
    return pipe
