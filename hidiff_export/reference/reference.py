"""The reference: what float32 PyTorch makes of the weights as they are stored, for chosen evaluations and a whole run.

A build keeps it in the bundle (:func:`record_reference`), and a verification makes it anew to judge by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hidiff_export.checkpoints.component import Component
from hidiff_export.families.graph_io import controlnet_inputs, controlnet_outputs, phase_inputs
from hidiff_export.modules.controlnet import ControlNetModule
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe import Recipe
from hidiff_export.reference.diffusers_run import Networks, RunInputs, run_pipeline
from hidiff_export.reference.evaluation_plan import (
    LITTLE_WORK,
    EvaluationPoint,
    RunSchedule,
    edge_points,
    keeps_samples,
    one_of_each,
    recorded,
)
from hidiff_export.reference.flops_progress import FlopsProgress, Progress
from hidiff_export.reference.magnitude_recorder import MagnitudeRecorder
from hidiff_export.reference.random_inputs import Given, arrays, mixed_shifts, random_inputs
from hidiff_export.reference.scheduler_answers import record_samplers
from hidiff_export.reference.text_vae_reference import NetworkCall, PictureNetworks
from hidiff_export.reference.tolerances import Boundary, bound_for
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_runtime.denoising.window_shifts import graph_shifts
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.verification.reference_samples import CallSample, Drawn, NetworkSample, PictureSample, RunSample
from hidiff_runtime.verification.sample_recorder import SampleRecorder

Array = NDArray[Any]

ORIGIN = f"PyTorch {torch.__version__}, float32"


@dataclass(frozen=True)
class ReferenceCall:
    """One evaluation and its result.

    Args:
        point: phase, step and timestep.
        window_shifts: int32, as the phase's graph takes them.
        inputs: every other input of the phase's graph.
        noise_pred: the UNet's output, float32.
        deep_features: float32, where the phase's graph gives them; None where it does not, or nobody asked.
    """

    point: EvaluationPoint
    window_shifts: Array
    inputs: Mapping[str, Given]
    noise_pred: Array
    deep_features: Array | None = None


@dataclass(frozen=True)
class ReferenceRun:
    """A whole run of diffusers.

    Args:
        course: steps, timesteps and phases.
        sampler: by the project's name.
        given: inputs, seed and guidance scale.
        calls: one for each evaluation, with the inputs it had in the run; but for those with a real ControlNet's
            residuals, which differ from step to step and would take hundreds of megabytes each, and those with fixed
            residuals for the prompts alone, which are half of what a sample can draw.
        latents: after each evaluation, float32; the last are the result.
    """

    course: RunSchedule
    sampler: str
    given: RunInputs
    calls: tuple[ReferenceCall, ...]
    latents: tuple[Array, ...]

    @property
    def after_steps(self) -> tuple[Array, ...]:
        """The latents after each logical step."""
        order = self.course.order
        return (*self.latents[order - 1 : -1 : order], self.latents[-1])


def courses(recipe: Recipe, scheduler_config: Mapping[str, Any]) -> tuple[RunSchedule, ...]:
    """Returns a run of each of the recipe's step counts that its default sampler takes (LCM's takes 50 at most)."""
    scheduler = _scheduler(recipe, scheduler_config)
    possible = []
    for steps in recipe.steps:
        try:
            scheduler.set_timesteps(steps)
        except ValueError:
            continue
        timesteps = tuple(float(timestep) for timestep in scheduler.timesteps)
        possible.append(RunSchedule(recipe.phase_rule(), steps, timesteps, scheduler.order, recipe.forecast_record))
    return tuple(possible)


def _scheduler(recipe: Recipe, config: Mapping[str, Any]) -> Any:
    """Returns diffusers' scheduler of the recipe's default sampler."""
    return build_scheduler(recipe.sampler[0].value, config, timesteps=recipe.timesteps, tcd_eta=recipe.tcd_eta)


def run_reference(
    networks: Networks,
    recipe: Recipe,
    scheduler_config: Mapping[str, Any],
    course: RunSchedule,
    meter: FlopsProgress,
    magnitudes: MagnitudeRecorder,
) -> ReferenceRun:
    """Denoises with diffusers under HiDiffusion, and keeps every evaluation.

    Args:
        networks: what is asked.
        scheduler_config: of the checkpoint's noise schedule.
        course: steps and phases of the run.
        magnitudes: told which evaluations come.
    """
    magnitudes.follow(course.points)
    sampler = recipe.sampler[0].value
    prompt = None if networks.pictures is None else networks.pictures.prompt_inputs()
    given = RunInputs.of(recipe, networks.config, prompt=prompt)
    evaluations, latents = run_pipeline(
        networks,
        _scheduler(recipe, scheduler_config),
        recipe,
        course,
        given,
        lambda index: meter.start(course.points[index].phase, f"diffusers: {course.points[index]}"),
    )
    calls = (
        ReferenceCall(
            point,
            graph_shifts(evaluation.window_shifts, recipe.shifts_shape(point.phase)),
            {**evaluation.inputs, **_residuals(given, recipe, networks, point.phase)},
            evaluation.noise_pred,
        )
        for point, evaluation in zip(course.points, evaluations, strict=True)
        if not point.phase.control or (networks.controlnet is None and not point.phase.unguided)
    )
    return ReferenceRun(course, sampler, given, tuple(calls), tuple(latents))


def random_calls(
    unet: nn.Module,
    recipe: Recipe,
    points: Sequence[EvaluationPoint],
    meter: FlopsProgress,
    magnitudes: MagnitudeRecorder,
) -> Iterator[ReferenceCall]:
    """Evaluates the UNet's phases on random inputs; each point has its own inputs and shifts.

    Args:
        unet: diffusers' ``UNet2DConditionModel``, float32.
        points: what to evaluate.
        magnitudes: told which evaluation comes.
    """
    size = (recipe.latent_height, recipe.latent_width)
    for seed, point in enumerate(points, start=1):
        meter.start(point.phase, f"PyTorch: {point}")
        magnitudes.follow([point], random=True)
        module = PhaseUNet(unet, recipe.unet_layout, point.phase, *size, **recipe.phase_options(point.phase))
        specs = module.input_specs(recipe.batch_of(point.phase))
        picture = {"width": recipe.width, "height": recipe.height}
        inputs = random_inputs(specs, timestep=point.timestep, **picture, seed=seed)
        shifts = mixed_shifts(recipe.shifts_shape(point.phase), seed)
        yield ReferenceCall(point, shifts, inputs, *_evaluate(module, inputs, shifts))


def _evaluate(module: PhaseUNet, inputs: Mapping[str, Given], shifts: NDArray[np.int32]) -> tuple[Array, ...]:
    """Returns the noise, and the deep features where the phase gives them."""
    values: dict[str, Array] = {**arrays(inputs), **({"window_shifts": shifts} if shifts.size else {})}
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    with torch.inference_mode():
        found = module(**PhaseUNet.arguments(tensors))
    return tuple(one.numpy() for one in (found if isinstance(found, tuple) else (found,)))


def _residuals(given: RunInputs, recipe: Recipe, networks: Networks, phase: Phase) -> dict[str, Drawn]:
    """Returns those of the fixed residuals that a phase's graph takes, of its batch."""
    if not phase.control:
        return {}
    size = (recipe.latent_height, recipe.latent_width)
    graph = (networks.config, recipe.unet_layout, phase, *size, recipe.batch_of(phase))
    names = [spec.name for spec in phase_inputs(*graph, **recipe.phase_options(phase))]
    return {name: given.control[name] for name in names if name in given.control}


def controlnet_call(controlnet: nn.Module, recipe: Recipe, timestep: float) -> NetworkCall:
    """Evaluates a ControlNet on random inputs, its control image at the size it sees.

    Args:
        controlnet: diffusers' ``ControlNetModel``, float32.
    """
    size = (recipe.latent_height, recipe.latent_width)
    config: Any = controlnet.config
    picture = {"width": recipe.width, "height": recipe.height}
    specs = controlnet_inputs(config, *size, recipe.model_batch, prompt_tokens=recipe.prompt_tokens)
    inputs = random_inputs(specs, timestep=timestep, **picture, seed=0)
    tensors = {name: torch.from_numpy(value) for name, value in arrays(inputs).items()}
    with torch.inference_mode():
        residuals = ControlNetModule(controlnet, *size)(**tensors)
    names = [spec.name for spec in controlnet_outputs(config, *size, recipe.model_batch)]
    outputs = {name: value.numpy() for name, value in zip(names, residuals, strict=True)}
    return NetworkCall(Component.CONTROLNET.value, inputs, outputs)


def record_reference(
    networks: Networks,
    recipe: Recipe,
    scheduler_config: Mapping[str, Any],
    folder: Path,
    progress: Progress | None = None,
    *,
    tables: Mapping[str, SamplerTable] | None = None,
    facts: Mapping[str, Any] | None = None,
    shared: bool = False,
) -> tuple[Path, ...]:
    """Records what the bundle's engines will be asked for, in the runtime's format; returns the files' paths.

    A whole run: of those with at most four evaluations (or next to no cost) the one with the most phase changes, which
    for ``sd15-1024`` is 3 steps, strided, windowed, windowed. Then random inputs on both sides of every phase change
    that the run does not make, and for every phase it does not reach. Where that costs next to nothing, or the recipe
    has a ControlNet, random inputs for the other changes too. Of the picture that the run comes to a part of the first
    tile; and each text encoder on two prompts, each half of the VAE on one random tile.

    On the way the magnitudes of what float16 graphs store are taken, and kept beside the samples.

    Args:
        networks: float32, holding the weights as stored, rounded to the recipe's precision; as before when this returns
            or raises.
        recipe: what is being built.
        scheduler_config: of the checkpoint's noise schedule, as diffusers writes it.
        folder: where ``samples.json``, ``samples.safetensors`` and, of a recipe with float16, ``magnitudes.json`` go.
        progress: told before each evaluation.
        tables: of the bundle's samplers, by name, whose schedulers are asked too.
        facts: what the manifest will say that no engine shows, see `hidiff_runtime.verification.manifest_facts`.
        shared: whether another bucket of the bundle has a whole run and the text encoders: then one evaluation of each
            phase is recorded, and the VAE.

    Raises:
        CheckpointError: a tensor exceeds what float16 holds.
        ParityError: a table is not what its scheduler does.
    """
    meter = FlopsProgress(recipe, networks.config, progress)
    course, points = (
        (None, one_of_each(recipe.phase_rule()))
        if shared
        else _evaluations(recipe, scheduler_config, meter, controlled=networks.controlnet is not None)
    )
    meter.plan(point.phase for point in (*(() if course is None else course.points), *points))
    recorder = SampleRecorder(ORIGIN, bound_for(Boundary.TRAJECTORY, recipe), bound_for(Boundary.RUN, recipe))
    magnitudes = MagnitudeRecorder(recipe)
    with magnitudes.recording():
        if course is not None:
            run = run_reference(networks, recipe, scheduler_config, course, meter, magnitudes)
            magnitudes.found.refuse_overflow(recipe)
            _record_run(recorder, run, quantized=recipe.precision.quantized)
            _record_picture(recorder, networks.pictures, recipe, run, meter)
        for call in random_calls(networks.unet, recipe, points, meter, magnitudes):
            magnitudes.found.refuse_overflow(recipe)
            _record_call(recorder, call)
        _record_networks(recorder, networks.pictures, recipe, meter, text=not shared)
    magnitudes.found.refuse_overflow(recipe)
    meter.note("diffusers: schedulers")
    record_samplers(recorder, recipe, scheduler_config, tables or {})
    recorder.facts = facts or {}
    meter.end()
    files = recorder.write(folder)
    return (*files, magnitudes.found.write(folder)) if magnitudes.found.largest else files


def _evaluations(
    recipe: Recipe, scheduler_config: Mapping[str, Any], meter: FlopsProgress, *, controlled: bool
) -> tuple[RunSchedule | None, tuple[EvaluationPoint, ...]]:
    """Returns the run that a build records, if there is one, and the evaluations on random inputs."""
    possible = courses(recipe, scheduler_config)
    course = recorded(possible, meter.flops)
    rule = recipe.phase_rule()
    points = edge_points(rule, possible)
    dear = sum(meter.flops(point.phase) for point in points) > LITTLE_WORK
    return course, edge_points(rule, possible, course) if dear and not controlled else points


def _record_run(recorder: SampleRecorder, run: ReferenceRun, *, quantized: bool) -> None:
    """Records a run and its evaluations. Shallow ones are among these only where ranges are measured on them: their
    deep features are as large as a ControlNet's residuals.
    """
    for call in run.calls:
        if quantized or keeps_samples(call.point.phase):
            _record_call(recorder, call)
    sample = RunSample(
        steps=run.course.steps,
        sampler=run.sampler,
        seed=run.given.seed,
        guidance_scale=run.given.guidance_scale,
        guidance_rescale=run.given.guidance_rescale,
        eta=0.0,
        inputs=recorder.inputs(run.given.arrays),
        control=recorder.inputs(run.given.control),
        expected=recorder.output(run.latents[-1]),
        trajectory=tuple(map(recorder.output, run.after_steps)),
    )
    recorder.runs.append(sample)


def _record_call(recorder: SampleRecorder, call: ReferenceCall) -> None:
    point, shifts = call.point, tuple(call.window_shifts.ravel().tolist())
    inputs, output = recorder.inputs(call.inputs), recorder.output(call.noise_pred)
    features = None if call.deep_features is None else recorder.output(call.deep_features)
    recorder.calls.append(CallSample(point.phase, point.step, point.steps, shifts, inputs, output, features))


def _record_picture(
    recorder: SampleRecorder, pictures: PictureNetworks | None, recipe: Recipe, run: ReferenceRun, meter: FlopsProgress
) -> None:
    if pictures is not None and pictures.has_vae:
        meter.note("diffusers: part of the picture")
        part, corner = pictures.decode_part(run.latents[-1])
        bound = bound_for(Boundary.RECORDED_PICTURE, recipe)
        recorder.pictures.append(PictureSample(len(recorder.runs) - 1, bound, corner, recorder.keep(part)))


def _record_networks(
    recorder: SampleRecorder,
    pictures: PictureNetworks | None,
    recipe: Recipe,
    meter: FlopsProgress,
    *,
    text: bool,
) -> None:
    if pictures is None:
        return
    every = [(Boundary.RECORDED_VAE, "diffusers: VAE", pictures.vae_calls)]
    if text:
        every.insert(0, (Boundary.RECORDED_TEXT, "transformers: text encoders", pictures.text_calls))
    for boundary, title, calls in every:
        meter.note(title)
        for call in calls():
            bound = bound_for(boundary, recipe)
            outputs = {name: recorder.output(output) for name, output in call.outputs.items()}
            inputs = recorder.inputs(call.inputs)
            recorder.networks.append(NetworkSample(call.network, bound, inputs, outputs, call.prompt))
