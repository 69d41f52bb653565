"""What a bundle's runs are laid out by: the recipe's words, what files say of themselves, and who wins."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from hidiff_export.checkpoints.declarations import read_declarations, recognize
from hidiff_export.errors import CheckpointError, RecipeError
from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.recipe import Recipe
from hidiff_export.scheduler_tables.noise_schedule import NoiseSchedule, resolve_noise_schedule

FAMILY = default_scheduler(Family.SDXL)[1]
EMPTY = torch.zeros(0)
EDM = {
    **{"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0},
    **{"sigma_schedule": "exponential", "prediction_type": "v_prediction"},
}
WITHOUT_BETAS = [
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and getattr(getattr(diffusers, name), "__module__", "").startswith("diffusers.schedulers")
    and "beta_start" not in inspect.signature(getattr(diffusers, name).__init__).parameters
    and hasattr(getattr(diffusers, name), "set_timesteps")
    and name not in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
]


def checkpoint(path: Path, *markers: str, **header: str) -> Path:
    """A file that only says what it is; underscores of a key's first part stand for its dot."""
    tensors = {"weight": torch.zeros(2), **{name: EMPTY.clone() for name in markers}}
    named = {key.replace("modelspec_", "modelspec.", 1): text for key, text in header.items()}
    save_file(tensors, path, named)
    return path


def folder(path: Path, **config: Any) -> Path:
    """A folder with a scheduler's configuration alone."""
    (path / "scheduler").mkdir(parents=True)
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return path


def resolved(source: Path | str, **values: Any) -> NoiseSchedule:
    return resolve_noise_schedule(recipe(source, **values))


def recipe(source: Path | str, **values: Any) -> Recipe:
    given = {"family": "sdxl", "source": str(source), "width": 1024, "height": 1024, "sampler": "euler"}
    return Recipe.from_dict({**given, **values}, "r.yaml")


@pytest.mark.parametrize(
    ("markers", "header", "expected"),
    [
        (("v_pred",), {}, {"prediction_type": "v_prediction"}),
        (("v_pred", "ztsnr"), {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ((), {"modelspec_prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec_prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ((), {"modelspec_predict_key": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}),
        ((), {"ss_v_parameterization": "False"}, {"prediction_type": "epsilon"}),
        ((), {"ss_base_model_version": "sd_v2_v"}, {"prediction_type": "v_prediction"}),
        ((), {"ss_zero_terminal_snr": "True"}, {"rescale_betas_zero_snr": True}),
        ((), {"modelspec_architecture": "stable-diffusion-v2-768-v"}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec_architecture": "stable-diffusion-xl-v1-base", "ss_v2": "False"}, {}),
        (("v_pred",), {"modelspec_prediction_type": "v", "ss_v_parameterization": "true"}, {}),
    ],
)
def test_what_a_file_says_of_itself_is_taken_and_told(
    tmp_path: Path, markers: tuple[str, ...], header: dict[str, str], expected: dict[str, Any]
) -> None:
    found = resolved(checkpoint(tmp_path / "a.safetensors", *markers, **header))
    if markers and header:  # all of which agree
        expected = {"prediction_type": "v_prediction"}
    assert found.config == {**FAMILY, **expected}
    assert found.declared == expected.keys()
    assert any(notice.startswith("a.safetensors says of itself: ") for notice in found.notices) == bool(expected)


def test_a_file_that_says_nothing_is_its_familys(tmp_path: Path) -> None:
    found = resolved(checkpoint(tmp_path / "a.safetensors", ss_output_name="portraits", ss_v_parameterization=""))
    assert (found.config, found.declared, found.notices) == (FAMILY, frozenset(), ())


@pytest.mark.parametrize(("word", "told"), [("x-pred2", 1), ("None", 0), ("", 0), ("v", 0)])
def test_a_prediction_that_is_not_known_is_told(tmp_path: Path, word: str, told: int) -> None:
    path = checkpoint(tmp_path / "a.safetensors", modelspec_prediction_type=word)
    notices = [notice for notice in resolved(path).notices if "no word known here" in notice]
    assert len(notices) == told
    assert all("modelspec.prediction_type: x-pred2" in notice for notice in notices)
    assert not any("no word" in notice for notice in resolved(path, prediction="epsilon").notices)


def test_a_file_of_sd21_that_says_nothing_is_asked_about(tmp_path: Path) -> None:
    """The family has models of both kinds, alike in every tensor's shape."""
    path = checkpoint(tmp_path / "v2-1.safetensors")
    words = {"family": "sd21", "sampler": "ddim"}
    (told,) = resolved(path, **words).notices
    assert "--set prediction=v_prediction" in told
    assert resolved(path, prediction="epsilon", **words).notices == ()
    assert not any("does not say" in told for told in resolved("random:0", **words).notices)


def test_a_file_that_contradicts_itself_is_refused_unless_the_recipe_settles_it(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.safetensors", "v_pred", modelspec_prediction_type="epsilon")
    with pytest.raises(CheckpointError, match="contradicts itself about prediction_type") as refused:
        resolved(path)
    assert refused.value.given == (
        "a.safetensors: v_prediction by the tensor v_pred; epsilon by modelspec.prediction_type: epsilon"
    )
    assert "--set prediction=v_prediction" in refused.value.advice
    assert resolved(path, prediction="epsilon").config["prediction_type"] == "epsilon"


def test_the_recipe_wins_over_the_file_and_says_so(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.safetensors", "v_pred", "ztsnr")
    found = resolved(path, prediction="epsilon", rescale_betas_zero_snr=False)
    assert found.config == {**FAMILY, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    told = [notice for notice in found.notices if "takes the place" in notice]
    assert [notice.split(" of the recipe")[0] for notice in told] == [
        "prediction epsilon",
        "rescale_betas_zero_snr false",
    ]
    same = resolved(path, prediction="v_prediction")
    assert not any("takes the place" in notice for notice in same.notices)


@pytest.mark.parametrize(("last", "zero"), [(0.0047, False), (0.0, True), (6e-8, True)])
def test_a_training_schedule_that_ends_in_noise_says_so(tmp_path: Path, last: float, zero: bool) -> None:
    save_file({"weight": torch.zeros(2), "alphas_cumprod": torch.tensor([0.9, 0.5, last])}, tmp_path / "a.safetensors")
    found = resolved(tmp_path / "a.safetensors")
    assert found.config.get("rescale_betas_zero_snr", False) is zero
    assert any("the tensor alphas_cumprod" in notice for notice in found.notices) is zero


def test_every_word_of_the_recipe_is_obeyed() -> None:
    words = {
        "prediction": "v_prediction",
        "beta_schedule": "linear",
        "beta_start": 0.001,
        "beta_end": 0.02,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    config = resolved("random:0", **words).config
    assert config == {**FAMILY, "prediction_type": "v_prediction", **{key: words[key] for key in [*words][1:]}}


def test_a_folders_own_schedule_is_taken_with_its_classs_defaults(tmp_path: Path) -> None:
    """Another class would fill in its own betas for what the file leaves out."""
    found = resolved(folder(tmp_path / "a", _class_name="LCMScheduler", timestep_spacing="trailing"), sampler="ddim")
    own = diffusers.LCMScheduler().config
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type"):
        assert found.config[key] == own[key], key
    assert diffusers.DDIMScheduler().config.beta_start != own.beta_start
    assert any("comes with LCMScheduler" in notice and "sampler=lcm" in notice for notice in found.notices)
    assert not any("comes with" in notice for notice in resolved(tmp_path / "a", sampler=["ddim", "lcm"]).notices)


@pytest.mark.parametrize("name", WITHOUT_BETAS)
def test_a_noise_schedule_without_betas_is_refused_at_the_recipes_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "r.yaml").write_text(
        f"family: sdxl\nwidth: 1024\nheight: 1024\n"
        f"source: {folder(tmp_path / 'a', _class_name=name, num_train_timesteps=1000)}\n"
    )
    with pytest.raises(RecipeError, match=r"r\.yaml, line 4: `source` is a checkpoint whose noise schedule") as refused:
        resolve_noise_schedule(Recipe.load(tmp_path / "r.yaml"))
    assert name in str(refused.value.given)


def test_there_are_classes_of_each_kind_without_betas() -> None:
    assert {"FlowMatchEulerDiscreteScheduler", "IPNDMScheduler", "SCMScheduler"} <= {*WITHOUT_BETAS}
    assert len(WITHOUT_BETAS) > 20


@pytest.mark.parametrize(
    "config", [{"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}, {"_class_name": "TheirOwnScheduler"}]
)
def test_flow_matching_and_classes_of_others_are_refused_by_name(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="cannot be drawn"):
        resolved(folder(tmp_path / "a", **{"_class_name": "UniPCMultistepScheduler", **config}))


def test_a_file_of_flow_matching_is_refused_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "flow.safetensors", modelspec_prediction_type="flow")
    with pytest.raises(RecipeError, match="`source` is a checkpoint of flow matching, and cannot be drawn") as refused:
        resolved(path)
    assert str(refused.value.given).endswith("flow.safetensors: modelspec.prediction_type: flow")
    assert "--set prediction=epsilon or v_prediction" in refused.value.advice
    found = resolved(path, prediction="v_prediction")
    assert found.config["prediction_type"] == "v_prediction"
    assert any("takes the place of flow_prediction" in notice for notice in found.notices)
    both = checkpoint(tmp_path / "b.safetensors", modelspec_prediction_type="flow", modelspec_predict_key="v")
    with pytest.raises(CheckpointError) as contradiction:
        resolved(both)
    assert contradiction.value.advice == "Say which holds: --set prediction=v_prediction, or prediction in the recipe."
    told = resolved("random:0", lora=[{"path": str(path), "scale": 1.0}]).notices
    assert "leave the LoRA out" in told[0]


def test_no_advice_names_a_prediction_that_recipes_have_no_word_for(tmp_path: Path) -> None:
    both = checkpoint(tmp_path / "a.safetensors", modelspec_prediction_type="sample", modelspec_predict_key="v")
    with pytest.raises(CheckpointError) as refused:
        resolved(both)
    assert "--set prediction=v_prediction" in refused.value.advice
    lora = checkpoint(tmp_path / "b.safetensors", modelspec_prediction_type="sample")
    (told,) = resolved("random:0", lora=[{"path": str(lora), "scale": 1.0}]).notices
    assert "prediction=sample" not in told


def test_edm_schedules_are_drawn_by_the_samplers_that_can(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", **EDM)
    assert resolved(source, sampler=["euler", "dpmpp_2m"]).config["sigma_max"] == 120.0
    with pytest.raises(RecipeError, match="`sampler` has ddim, which does not draw this noise schedule") as refused:
        resolved(source, sampler=["euler", "ddim"])
    assert refused.value.advice == "Use euler, dpmpp_2m, dpmpp_2m_sde."


def test_edm_markers_of_a_file_are_its_sigmas(tmp_path: Path) -> None:
    path = tmp_path / "cosxl.safetensors"
    sigmas = {"edm_vpred.sigma_max": torch.tensor(80.0), "edm_vpred.sigma_min": torch.tensor(0.25)}
    save_file({"weight": torch.zeros(2), **sigmas}, path)
    found = resolved(path)
    assert found.config == {**EDM, "sigma_max": 80.0, "sigma_min": 0.25, "num_train_timesteps": 1000}
    assert found.declared == found.config.keys()
    save_file({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, path)
    with pytest.raises(CheckpointError, match=r"the kind of Playground v2\.5"):
        resolved(path)


def test_a_sampler_that_would_pass_over_zero_snr_is_refused_at_the_recipes_line(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.safetensors", "v_pred", "ztsnr")
    with pytest.raises(RecipeError, match="`sampler` has pndm") as refused:
        resolved(path, sampler=["euler", "pndm"])
    assert "zero terminal SNR" in str(refused.value.given)
    assert "pndm" not in refused.value.advice


def test_timesteps_are_refused_with_a_sampler_that_takes_none() -> None:
    assert resolved("random:0", timesteps=[999, 749, 499, 249]).notices == ()
    with pytest.raises(RecipeError, match="`sampler` has ddim") as refused:
        resolved("random:0", timesteps=[999, 749, 499, 249], sampler="ddim")
    assert "euler" in refused.value.advice


FEW = {"guidance": False, "steps": [4]}


@pytest.mark.parametrize(
    "name",
    ["sdxl_lightning_4step_lora.safetensors", "Hyper-SDXL-4steps-lora.safetensors", "dmd2_sdxl_4step_lora.safetensors"],
)
def test_a_lora_that_says_it_is_for_few_steps_begins_at_the_end(tmp_path: Path, name: str) -> None:
    lora = [{"path": str(checkpoint(tmp_path / name)), "scale": 1.0}]
    found = resolved("random:0", lora=lora, **FEW, sampler=["euler", "ddim"])
    assert found.config == {**FAMILY, "timestep_spacing": "trailing"}
    assert "for 4 steps by its name: timestep_spacing trailing is taken" in found.notices[0]
    kept = resolved("random:0", lora=lora, timestep_spacing="leading", **FEW)
    assert kept.config["timestep_spacing"] == "leading"
    own = resolved("random:0", lora=lora, timesteps=[999, 749, 499, 249], guidance=False)
    assert own.config == FAMILY
    for found in (kept, own):
        assert not any("is taken" in notice for notice in found.notices)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_a_lora_that_a_sampler_was_made_for_is_told_its_sampler_and_no_spacing(tmp_path: Path, sampler: str) -> None:
    name = f"{sampler}-lora-sdxl.safetensors"
    lora = [{"path": str(checkpoint(tmp_path / name)), "scale": 1.0}]
    found = resolved("random:0", lora=lora, **FEW)
    assert found.config == FAMILY
    assert found.notices == (f"{name} is drawn with {sampler}: --set sampler={sampler}.",)
    assert resolved("random:0", lora=lora, **FEW, sampler=["euler", sampler]).notices == ()


def test_a_file_that_only_may_be_for_few_steps_is_asked_about(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "DreamXL_Lightning.safetensors")
    found = resolved(source, **FEW)
    assert found.config == FAMILY
    assert [notice.count("--set timestep_spacing=trailing") for notice in found.notices] == [1]
    assert "looks like SDXL-Lightning's by its name: " in found.notices[0]
    said = checkpoint(tmp_path / "b.safetensors", modelspec_title="Dream XL Lightning, 8 steps")
    found = resolved(said, steps=[4])
    assert found.config["timestep_spacing"] == "trailing"
    assert found.declared == {"timestep_spacing"}
    told = " ".join(found.notices)
    for words in ("for 8 steps by modelspec.title", "--set steps=8", "--set guidance=false"):
        assert words in told


@pytest.mark.parametrize(
    ("name", "kind", "steps"),
    [
        ("ByteDance/SDXL-Lightning", "SDXL-Lightning", None),
        ("Hyper-SD15-8steps-lora", "Hyper-SD", 8),
        ("dmd2_sdxl_4step_unet_fp16", "DMD2", 4),
        ("lcm-lora-sdxl", "LCM", None),
        ("TCD-SDXL-LoRA", "TCD", None),
        ("sd_xl_turbo_1.0", "Turbo", None),
        ("juggernautXL_v9", None, None),
        ("sdxl_lightning_12steps", "SDXL-Lightning", 12),
        ("lcm_1000steps", "LCM", None),
        ("hyperrealism_12steps", None, None),
        ("admd", None, None),
        ("calcmix", None, None),
    ],
)
def test_ways_of_distilling_are_known_by_their_names(name: str, kind: str | None, steps: int | None) -> None:
    found = recognize(name, {})
    assert (found and found.distillation.name, found and found.steps) == (kind, steps)


def test_a_lora_trained_for_something_else_is_told(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "style.safetensors", ss_v_parameterization="True", ss_zero_terminal_snr="True")
    lora = [{"path": str(path), "scale": 1.0}]
    told = resolved("random:0", lora=lora).notices
    assert "was trained for prediction_type v_prediction (ss_v_parameterization: True)" in told[0]
    assert "--set prediction=v_prediction" in told[0]
    assert "--set rescale_betas_zero_snr=true" in told[1]
    agreeing = resolved("random:0", lora=lora, prediction="v_prediction", rescale_betas_zero_snr=True)
    assert not any("was trained" in notice for notice in agreeing.notices)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": [1]}, "begins at timestep 1 of 999 and gives noise"),
        ({"steps": [1, 4]}, "begins at timestep 1 of 999 and gives noise"),
        ({"steps": [4, 30], "guidance": False}, "4 steps at 751 of 999"),
        ({"steps": [1], "timestep_spacing": "trailing"}, None),
        ({"steps": [4], "guidance": False, "timestep_spacing": "trailing"}, None),
        ({"steps": [4, 30]}, None),
        ({"steps": [1], "sampler": "lcm"}, None),
        ({}, None),
        ({"rescale_betas_zero_snr": True, "prediction": "v_prediction", "steps": [30]}, "begins at 958"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps": [30]}, None),
    ],
)
def test_runs_that_begin_late_are_told(values: dict[str, Any], words: str | None) -> None:
    told = [notice for notice in resolved("random:0", **values).notices if "trailing" in notice]
    assert [words in notice for notice in told] == ([] if words is None else [True])


def test_a_file_that_is_not_there_is_named_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at this path"):
        resolved(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="There is no LoRA file at this path") as refused:
        resolved("random:0", lora=[{"path": str(tmp_path / "none.safetensors"), "scale": 1.0}])
    assert "none.safetensors" in str(refused.value.given)


def test_a_damaged_file_is_the_checkpoints_fault(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        read_declarations(tmp_path / "a.safetensors")
