"""Parity: the float32 PyTorch reference on the device, and what engines make of the same, with what must not pass.

The reference computes in float32 on the weights as they are stored, rounded to the recipe's precision.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import engines, networks, pipelines
from benchmarks.gpu.cases import CALL_SNR_DB, PICTURE_PSNR_DB, Step
from benchmarks.gpu.work import Work, free_memory
from hidiff_export.recipe import Recipe
from hidiff_export.reference.diffusers_run import SEED, RunInputs
from hidiff_export.reference.random_inputs import arrays
from hidiff_export.reference.tolerances import TOLERANCES, Boundary
from hidiff_runtime.phases import PhaseRule
from hidiff_runtime.sampling.torch_rng import TorchGenerator
from hidiff_runtime.verification.comparison import Bound, Verdict, compare
from tests.parity import published

_OTHER_SEED = SEED + 1
_SCALING = {False: 0.18215, True: 0.13025}
"""``scaling_factor`` of the published decoders, SDXL's last."""


def call_bound(precision: str) -> Bound:
    """What one evaluation must keep to."""
    return Bound(CALL_SNR_DB[precision], "The project's goal for one evaluation.")


def other_shifts(shifts: Any) -> Any:
    """Every window shift another one."""
    return ((shifts + 1) % 4).astype(np.int32)


def figures(verdict: Verdict, control: bool = False) -> dict[str, Any]:
    """A verdict as a result; a negative control is as it should be when the verdict is not."""
    metrics = verdict.metrics
    return {
        "snr_db": None if metrics is None else metrics.snr_db,
        "bound_db": verdict.bound.snr_db,
        "control": control,
        "ok": not verdict.ok and not verdict.fault if control else verdict.ok,
        **({"fault": verdict.fault} if verdict.fault else {}),
    }


def reference(work: Work) -> None:
    """Records every phase's evaluation and a whole run in float32; judges the published package and eager by them."""
    recipe, device = work.recipe(), work.device
    unet = networks.unet_of(recipe, device, torch.float32)
    for step in work.steps:
        with work.attempt(what="call", phase=step.phase.name):
            _reference_call(work, unet, recipe, step)
    del unet
    free_memory()
    for step in work.steps:
        with work.attempt(what="call", phase=step.phase.name, candidate=networks.EAGER):
            _eager_call(work, recipe, step)
            free_memory()
    with work.attempt(what="run"):
        rule = PhaseRule(control=recipe.phase_rule().control)
        runs = {"expected": {}, "other_phases": {"rule": rule}}
        latents = {name: _reference_run(work, recipe, options) for name, options in runs.items()}
        work.save("run", **latents)
        verdict = compare("run", latents["expected"], latents["other_phases"], run_bound(recipe))
        work.add({"what": "run", "candidate": "every phase windowed", **figures(verdict, control=True)})


def run_bound(recipe: Recipe) -> Bound:
    """What a whole run's latents must keep to."""
    return TOLERANCES[Boundary.RUN, recipe.precision.value]


def _reference_call(work: Work, unet: Any, recipe: Recipe, step: Step) -> None:
    module = networks.phase_unet(unet, recipe, step, work.device)
    inputs = networks.inputs_of(module, recipe, step)
    seed = step.step
    inputs["window_shifts"] = published.drawn_shifts(seed, len(recipe.unet_layout.windowed_blocks)).numpy()
    tensors = networks.on(work.device, inputs)
    expected = networks.evaluate(module, tensors).cpu().numpy()
    work.save(step.phase.name, expected=expected, **{f"input.{name}": array for name, array in inputs.items()})
    bound = TOLERANCES[Boundary.RANDOM, "float32"]
    named = {"what": "call", "phase": step.phase.name, "candidate": f"{networks.PUBLISHED}, float32"}
    with work.attempt(**named), networks.package(unet, recipe, work.job.case, step, work.rehearse) as call:
        for control, other in ((False, seed), (True, seed + 1)):
            found = call(tensors, other).cpu().numpy()
            result = figures(compare("call", expected, found, bound), control)
            work.add({**named, **({"candidate": f"{named['candidate']}, other shifts"} if control else {}), **result})


def _eager_call(work: Work, recipe: Recipe, step: Step) -> None:
    """The PhaseUNet in the recipe's precision, as a measure for the engines."""
    expected, inputs = call_of(work, step)
    module = networks.phase_unet(networks.unet_of(recipe, work.device), recipe, step, work.device)
    found = networks.evaluate(module, networks.on(work.device, inputs)).cpu().numpy()
    verdict = compare("call", expected, found, call_bound(work.job.precision))
    work.add({"what": "call", "phase": step.phase.name, "candidate": networks.EAGER, **figures(verdict)})


def call_of(work: Work, step: Step) -> tuple[Any, dict[str, Any]]:
    """A phase's expected output and its inputs, as the reference left them."""
    saved = work.load(step.phase.name)
    expected = saved.pop("expected")
    return expected, {name.removeprefix("input."): array for name, array in saved.items()}


def _reference_run(work: Work, recipe: Recipe, options: dict[str, Any]) -> Any:
    case, scale = work.job.case, work.scale
    with pipelines.run_of(
        networks.EAGER, recipe, case, scale.device, rehearse=work.rehearse, dtype=torch.float32, **options
    ) as run:
        latents = run(scale.parity_steps, SEED)
    free_memory()
    return latents


def engine_parity(work: Work) -> None:
    """Judges one backend's engines: each phase's evaluation, and a whole run with its decoded picture."""
    backend = work.job.by
    recipe = work.recipe(backend)
    found: dict[str, Any] = {}
    with engines.open_bundle(work.bundle, backend, work.device) as bundle:
        for step in work.steps:
            with work.attempt(what="call", phase=step.phase.name):
                _judge_call(work, bundle, step)
        with work.attempt(what="run"):
            for control in (False, True):
                name, latents = _engine_run(work, bundle, recipe, control)
                found[name] = latents
                verdict = compare("run", work.load("run")["expected"], latents, run_bound(recipe))
                work.add({"what": "run", "candidate": name, **figures(verdict, control)})
    free_memory()
    with work.attempt(what="picture"):
        _judge_pictures(work, recipe, found)


def _judge_call(work: Work, bundle: Any, step: Step) -> None:
    """The phase's engine on the reference's inputs; on other shifts, and another phase's engine, it must not pass."""
    expected, inputs = call_of(work, step)
    bound = call_bound(work.job.precision)
    others = [other for other in work.steps if other != step]
    tries: list[tuple[str, Step, dict[str, Any]]] = [
        ("engine", step, inputs),
        ("other shifts", step, {**inputs, "window_shifts": other_shifts(inputs["window_shifts"])}),
        *((f"engine of {other.phase.name}", other, inputs) for other in others[:1]),
    ]
    for candidate, which, given in tries:
        found = engines.Evaluation(bundle, which.phase, given).output()
        result = figures(compare("call", expected, found, bound), control=candidate != "engine")
        work.add({"what": "call", "phase": step.phase.name, "candidate": candidate, **result})


def _engine_run(work: Work, bundle: Any, recipe: Recipe, control: bool) -> tuple[str, Any]:
    """The denoiser's latents; as a control with the same starting latents, but the window shifts of another seed."""
    given = RunInputs.of(recipe, recipe.unet_config())
    start = TorchGenerator(SEED).randn((recipe.batch, *recipe.latent_shape))
    options = {"latents": start, "seed": _OTHER_SEED} if control else {"seed": SEED}
    latents = bundle.denoiser().denoise(
        **arrays(given.arrays), steps=work.scale.parity_steps, guidance_scale=given.guidance_scale, **options
    )
    return "other shifts" if control else "engine", latents


def _judge_pictures(work: Work, recipe: Recipe, found: dict[str, Any]) -> None:
    decoder = pipelines.Decoder(work.scale.vae_widths, work.device)
    scaling = _SCALING[recipe.family.is_sdxl]
    saved = work.load("run")
    picture = decoder(saved["expected"], scaling)
    for candidate, latents in {**found, "every phase windowed": saved["other_phases"]}.items():
        psnr = pipelines.psnr_db(picture, decoder(latents, scaling))
        control = candidate != "engine"
        passed = (math.isfinite(psnr) and psnr >= PICTURE_PSNR_DB) or psnr == math.inf
        result = {"psnr_db": psnr, "bound_db": PICTURE_PSNR_DB, "control": control}
        ok = not passed and math.isfinite(psnr) if control else passed
        work.add({"what": "picture", "candidate": candidate, **result, "ok": ok})
