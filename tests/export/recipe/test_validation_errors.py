"""Every refusal names the file, the line, the key, the value given and what would be valid, and exits with 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hidiff_export.errors import RecipeError
from hidiff_export.recipe import Recipe

GOOD = {"family": "sdxl", "source": "random:0", "width": "2048", "height": "2048"}
"""Lines 1 to 4 of a recipe that is valid."""


def _text(**values: str) -> str:
    return "".join(f"{key}: {value}\n" for key, value in (GOOD | values).items())


def _with(lines: str) -> str:
    """The good recipe, and ``lines`` from line 5 on."""
    return _text() + lines


@dataclass(frozen=True)
class Bad:
    """A recipe that is refused, and what the refusal says.

    Args:
        text: of the file.
        line: that the refusal names; 0 where there is none to name.
        what: part of the summary: key and reason.
        given: the value as it is shown; None where there is none to show.
        advice: part of the advice.
    """

    text: str
    line: int
    what: str
    given: str | None
    advice: str


NOT_IN_TASK = "is set, but the task text-to-image has no ControlNet"
THRESHOLDS = "hidiffusion:\n  thresholds:\n    "

BAD = {
    "unknown key": Bad(_with("hieght: 9"), 5, "`hieght` is not a recipe key", "9", "Did you mean height?"),
    "steps of other timesteps": Bad(
        _with("timesteps: [999, 499]\nsteps: 4\n"), 6, "`steps` is not the number of timesteps", "4", "set steps: 2"
    ),
    "unknown nested key": Bad(
        _with("hidiffusion:\n  window: false"),
        6,
        "`hidiffusion.window` is not a",
        "false",
        "Did you mean windows? Keys",
    ),
    "a forecast of few steps": Bad(
        _with("steps: 1-5\nforecast: true"),
        6,
        "`forecast` leaves no step out, not even of 5",
        "true",
        "shorter warm_up",
    ),
    "a forecast with a long warm-up": Bad(
        _with("forecast: {warm_up: 200}"),
        5,
        "`forecast` leaves no step out, not even of 100",
        '{"warm_up": 200}',
        "more steps",
    ),
    "a forecast with a short warm-up": Bad(
        _with("forecast: {warm_up: 1}"), 5, "`forecast.warm_up` should be greater than or equal to 2", "1", "2 or more"
    ),
    "a forecast of no kind": Bad(_with("forecast: spectrum"), 5, "`forecast` should be", '"spectrum"', "true or false"),
    "an unknown key of a forecast": Bad(
        _with("forecast: {warmup: 5}"), 5, "`forecast.warmup` is not a", "5", "Did you mean warm_up?"
    ),
    "a sampler that cannot be forecast": Bad(
        _with("sampler: [euler, lcm]\nforecast: true"),
        5,
        "`sampler` has lcm, whose steps cannot be forecast: each of its steps guesses",
        '["euler", "lcm"]',
        "choose among ddim, ddpm, euler",
    ),
    "odd size": Bad(_text(width="1020"), 3, "`width` should be a multiple of 8", "1020", "from 64 to 8192"),
    "size too small": Bad(_text(height="56"), 4, "`height` should be greater", "56", "from 64 to 8192"),
    "size too large": Bad(_text(height="8200"), 4, "`height` should be less", "8200", "from 64 to 8192"),
    "size as text": Bad(_text(width='"512"'), 3, "`width` should be a whole number", '"512"', "multiple of 8"),
    "size with a point": Bad(_text(width="512.0"), 3, "`width` should be a whole number", "512.0", "multiple of 8"),
    "unknown family": Bad(_text(family="sdlx"), 1, "`family` should be", '"sdlx"', "Did you mean sdxl?"),
    "unknown task": Bad(_with("task: inpaint"), 5, "`task` should be", '"inpaint"', "Did you mean inpainting? What"),
    "unknown precision": Bad(_with("precision: fp16"), 5, "`precision` should be", '"fp16"', "int8 or fp8"),
    "precision without kernels on the default target": Bad(
        _with("backend: [tensorrt-rtx, onnxruntime]\nprecision: bfloat16"),
        6,
        "`precision` is bfloat16, for which ONNX Runtime has no kernels on the CPU",
        '"bfloat16"',
        "float16, or targets: cuda",
    ),
    "precision without kernels": Bad(
        _with("precision: bfloat16"),
        5,
        "`precision` is bfloat16, for which ONNX Runtime has no kernels on the CPU",
        '"bfloat16"',
        "float16, or targets: cuda",
    ),
    "a precision that no CPU has": Bad(
        _with("backend: openvino\nprecision: float16"),
        6,
        "`precision` is float16, for which OpenVINO has no kernels on the CPU",
        '"float16"',
        "bfloat16, int8 or float32",
    ),
    "a backend that is for the CPU alone": Bad(
        _with("backend: openvino\ntargets: cuda"),
        6,
        "`targets` has nothing that openvino builds for",
        '"cuda"',
        "Add cpu to targets",
    ),
    "bfloat16 before sm80": Bad(
        _with("backend: tensorrt-rtx\ntargets: [sm75, sm89]\nprecision: bfloat16"),
        7,
        "`precision` is bfloat16, for which sm75 has no arithmetic",
        '"bfloat16"',
        "targets from sm80 on",
    ),
    "precision that a target has no arithmetic for": Bad(
        _with("backend: tensorrt-rtx\ntargets: [sm86, sm89]\nprecision: fp8"),
        7,
        "`precision` is fp8, for which sm86 has no arithmetic",
        '"fp8"',
        "targets from sm89 on",
    ),
    "rescale above 1": Bad(
        _with("guidance_rescale: 1.5"), 5, "`guidance_rescale` should be less than or equal to 1", "1.5", "0 to 1"
    ),
    "rescale as text": Bad(
        _with("guidance_rescale: some"),
        5,
        "`guidance_rescale` should be a number",
        '"some"',
        "0.7 for zero terminal SNR",
    ),
    "rescale without guidance": Bad(
        _with("guidance: false\nguidance_rescale: 0.7"),
        6,
        "`guidance_rescale` rescales guidance, which is off",
        "0.7",
        "Set guidance: true, or leave guidance_rescale out",
    ),
    "unknown backend": Bad(
        _with("backend: onnx"), 5, "`backend.0` should be", '"onnx"', "What builds and runs the engines, one or a list"
    ),
    "unknown target": Bad(_with("targets: [cpu, gpu]"), 5, "`targets.1` should be", '"gpu"', "sm120 or sm121"),
    "GPU that TensorRT-RTX does not build for": Bad(
        _with("backend: tensorrt-rtx\ntargets: sm90"), 6, "`targets.0` should be", '"sm90"', "Did you mean sm89?"
    ),
    "backend without a target": Bad(
        _with("backend: [tensorrt, tensorrt-rtx]\ntargets: sm89"),
        6,
        "`targets` has nothing that tensorrt builds for",
        '"sm89"',
        "Add cuda to targets, or leave targets out",
    ),
    "target without a backend": Bad(
        _with("backend: tensorrt-rtx\ntargets: [cpu, sm89]"),
        6,
        "`targets` has cpu, which tensorrt-rtx does not build for",
        '["cpu", "sm89"]',
        "tensorrt-rtx builds for generations of GPUs like sm89, or cuda alone",
    ),
    "this GPU beside others": Bad(
        _with("backend: tensorrt-rtx\ntargets: [sm89, cuda]"),
        6,
        "`targets` has cuda, which tensorrt-rtx does not build for",
        '["sm89", "cuda"]',
        "or cuda alone",
    ),
    "backend twice": Bad(
        _with("backend: [tensorrt, tensorrt]"), 5, "`backend` names one thing twice", '["tensorrt", "tensorrt"]', "Keep"
    ),
    "merged engines": Bad(
        _with("layout: merged"), 5, "1.4 to 2.5 times as long to build", '"merged"', "Leave layout out: each phase"
    ),
    "unknown layout": Bad(_with("layout: joint"), 5, "`layout` should be 'per-phase'", '"joint"', "Leave it out."),
    "unknown sampler": Bad(_with("sampler: dpmpp_2s"), 5, "`sampler.0` should be", '"dpmpp_2s"', "mean dpmpp_2m?"),
    "sampler twice": Bad(
        _with("sampler: [ddim, ddim]"), 5, "`sampler` names one thing twice", '["ddim", "ddim"]', "Keep one of each"
    ),
    "no sampler": Bad(_with("sampler: []"), 5, "`sampler` should name at least one", "[]", "One sampler to tabulate"),
    "truth as a number": Bad(_with("guidance: 1"), 5, "`guidance` should be true or false", "1", "negative prompt"),
    "batch of nothing": Bad(_with("batch: 0"), 5, "`batch` should be greater", "0", "1 to 64"),
    "falling steps": Bad(_with("steps: 50-20"), 5, "`steps` should be step counts", '"50-20"', "1 to 1000"),
    "no steps": Bad(_with("steps: []"), 5, "`steps` should name at least one", "[]", "a range like 1-100"),
    "too many steps": Bad(_with("steps: [20, 1001]"), 5, "`steps` should be step", "[20, 1001]", "1 to 1000"),
    "steps as truth": Bad(_with("steps: true"), 5, "`steps` should be step counts", "true", "1 to 1000"),
    "ratio beyond the run": Bad(
        _with(THRESHOLDS + "pooled: 1.4"), 7, "`hidiffusion.thresholds.pooled.end` should be a", "1.4", "like 40%"
    ),
    "range that falls": Bad(
        _with(THRESHOLDS + "pooled: {start: 40%, end: 16%}"),
        7,
        "`hidiffusion.thresholds.pooled` ends before it starts",
        '{"start": "40%", "end": "16%"}',
        "{start: 0, end: 40%}",
    ),
    "range without end": Bad(
        _with(THRESHOLDS + "pooled:\n      start: 0.1"),
        7,
        "`hidiffusion.thresholds.pooled.end` is missing",
        None,
        "0 to 1",
    ),
    "unknown thresholds": Bad(
        _with("hidiffusion: {thresholds: paper}"),
        5,
        "`hidiffusion.thresholds` should be a",
        '"paper"',
        "`published`, or",
    ),
    "thresholds of what is off": Bad(
        _with("hidiffusion:\n  raunet: false\n  thresholds: {pooled: 0.4}"),
        7,
        "`hidiffusion.thresholds` gives steps for a change that is switched off",
        '{"pooled": 0.4}',
        "raunet: true",
    ),
    "end of a control there is not": Bad(
        _with(THRESHOLDS + "control: 0.5"),
        7,
        f"`hidiffusion.thresholds.control` {NOT_IN_TASK}",
        "0.5",
        "task: controlnet",
    ),
    "control that never comes in": Bad(
        _with("task: controlnet\n" + THRESHOLDS + "control: 0"), 8, "should be greater than 0", "0", "above 0"
    ),
    "loose bound": Bad(_with("parity: {call_snr_db: 5}"), 5, "`parity.call_snr_db` should be", "5", "10 to 200"),
    "bound as text": Bad(_with('parity: {run_snr_db: "60"}'), 5, "`parity.run_snr_db` should", '"60"', "10 to 200"),
    "no mapping": Bad(_with("parity: 80"), 5, "`parity` should be a mapping", "80", "call_snr_db and run_snr_db"),
    "source without seed": Bad(_text(source="random"), 2, "`source` should be random:SEED", '"random"', "random:0"),
    "negative seed": Bad(_text(source="random:-1"), 2, "`source` should be random:SEED", '"random:-1"', "random:0"),
    "empty source": Bad(_text(source="''"), 2, "`source` is empty", '""', "a hub id like org/name"),
    "pickle": Bad(_text(source="sd.ckpt"), 2, "`source` is a pickle", '"sd.ckpt"', ".safetensors"),
    "missing key": Bad("family: sd15\nwidth: 512\nheight: 512", 0, "`source` is missing", None, "hub id like org/name"),
    "tiny weights of somebody's": Bad(
        _text(source="a/b", unet_width="tiny"), 5, "`unet_width` is only for fabricated", '"tiny"', "source: random:0"
    ),
    "inpainting that does not exist": Bad(
        _text(family="playground", task="inpainting"),
        5,
        "`task` has no inpainting checkpoint in the family playground",
        '"inpainting"',
        "Inpainting has sd15, sd21, sdxl",
    ),
    "controlnet of a family without": Bad(
        _text(family="sdxl-turbo", task="controlnet"),
        5,
        "`task` takes no ControlNet in the family sdxl-turbo",
        '"controlnet"',
        "ControlNet tasks have sd15, sd21, sdxl",
    ),
    "controlnet without its task": Bad(
        _with("controlnet: a/b"), 5, f"`controlnet` {NOT_IN_TASK}", '"a/b"', "task: controlnet"
    ),
    "too narrow for a controlnet": Bad(
        _text(task="controlnet", width="8192", height="256"),
        3,
        "`width` makes the picture too narrow",
        "8192",
        "below 16 to 1",
    ),
    "key twice": Bad(_with("batch: 1\nwidth: 512"), 6, "`width` is given twice", "512", "the first is on line 3"),
    "not YAML": Bad(_with("sampler: [ddim\n"), 6, "this is not YAML", None, "key: value"),
    "tab": Bad(_with("hidiffusion:\n\traunet: true"), 6, "this is not YAML", None, "key: value"),
    "alias": Bad(_with("sampler: &a [ddim]\ntargets: *a"), 6, "no YAML aliases", "*a", "Write the value out"),
    "tag": Bad(_with("batch: !!python/name:os.system 1"), 5, "plain values", "!!python/name:os.system", "Drop the tag"),
    "tagged mapping": Bad(_with("hidiffusion: !own {raunet: true}"), 5, "plain values", "!own", "Drop the tag"),
    "tagged list": Bad(_with("sampler: !!set {ddim}"), 5, "plain values", "!!set", "Drop the tag"),
    "merge key": Bad(_with("<<: {batch: 1}"), 5, "a key is not a plain word", "<<", "Name a key"),
    "key that is no word": Bad(_with("[a]: 1"), 5, "a key is not a plain word", "a sequence", "Name a key"),
    "date": Bad(_with("batch: 2026-01-01"), 5, "`batch` should be a whole number", '"2026-01-01"', "1 to 64"),
    "list": Bad("- family: sdxl", 1, "a recipe is a mapping", "a sequence", "key: value"),
    "nothing": Bad("# only a comment", 0, "a recipe is a mapping", "nothing", "key: value"),
    "two documents": Bad(_with("---\nfamily: sdxl"), 5, "this is not YAML", None, "key: value"),
    "control character": Bad(_with("name: a\x07"), 0, "this is not YAML", None, "key: value"),
    "bottomless nesting": Bad(_with("batch: " + 20_000 * "["), 5, "values are nested too deeply", None, "key: value"),
    "name that is no file name": Bad(_with("name: ../up"), 5, "`name` should match", '"../up"', "A word of letters"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_recipe_is_refused_with_line_key_value_and_advice(bad: Bad, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(bad.text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    error = caught.value
    place = f"{path}, line {bad.line}: " if bad.line else f"{path}: "
    assert error.summary.startswith(place), error
    assert bad.what in error.summary, error
    assert error.given == bad.given
    assert bad.advice in error.advice, error
    assert error.exit_code == 2


def test_the_recipe_they_spoil_is_good(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(_text())
    assert Recipe.load(path).width == 2048


def test_every_problem_is_mentioned_the_first_in_full(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(_with("batch: none\nprecision: fp4\nhidiffusion:\n  raunet: maybe\n"))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert "line 5: `batch`" in caught.value.summary
    assert f"`precision` ({path}, line 6)" in caught.value.advice
    assert f"`hidiffusion.raunet` ({path}, line 8)" in caught.value.advice


def test_a_long_value_is_cut() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"family": "x" * 5000})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("assignment", "what", "given"),
    [
        ("width=1020", "--set width: `width` should be a multiple of 8", "1020"),
        ("hidiffusion.windws=true", "--set hidiffusion.windws: `hidiffusion.windws` is not a recipe key", "true"),
        ("width", "A setting is not KEY=VALUE", "width"),
        ("=3", "A setting is not KEY=VALUE", "=3"),
        ("hidiffusion..windows=true", "A setting is not KEY=VALUE", "hidiffusion..windows=true"),
        ("steps=[1, 2", "--set steps, line 1: this is not YAML", None),
    ],
)
def test_a_bad_override_is_named(assignment: str, what: str, given: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("tiny", [assignment])
    assert caught.value.summary.startswith(what)
    assert caught.value.given == given


def test_an_unknown_recipe_is_answered_with_those_that_ship() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("sdxl-2084")
    assert "Did you mean sdxl-2048?" in caught.value.advice
    assert "demo" in caught.value.advice


@pytest.mark.parametrize("content", [None, b"family: \xff"])
def test_an_unreadable_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(path) in str(caught.value.given)
