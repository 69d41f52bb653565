"""Proves a bundle: everything its engines compute, beside what PyTorch computes now, from the same weights or others.

PyTorch goes first, for all evaluations, and is then let go of, so that the two are never in memory together.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import hidiff_runtime
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.stored_configs import SCHEDULER_CONFIG, read_config
from hidiff_export.compiler.graph_specs import bare_manifest
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.errors import InputError
from hidiff_export.recipe import Recipe
from hidiff_export.reference.evaluation_plan import EvaluationPoint, RunSchedule, edge_points, fullest
from hidiff_export.reference.flops_progress import FlopsProgress, Progress
from hidiff_export.reference.magnitude_recorder import MagnitudeRecorder
from hidiff_export.reference.reference import (
    ORIGIN,
    ReferenceCall,
    ReferenceRun,
    controlnet_call,
    courses,
    random_calls,
    run_reference,
)
from hidiff_export.reference.reference_weights import (
    compare_model_index,
    compare_weights,
    networks_of_store,
    unet_of_source,
    weights_of_source,
)
from hidiff_export.reference.scheduler_answers import compare_samplers
from hidiff_export.reference.text_vae_reference import NetworkCall, PictureNetworks
from hidiff_export.reference.tolerances import Boundary
from hidiff_export.verification.compare import EngineComparer
from hidiff_export.verification.portable_graphs import GraphComparer, first_and_last, no_engines, portable_backend
from hidiff_export.verification.report import Check, GraphResults, Report
from hidiff_export.verification.side_by_side import SideBySide
from hidiff_runtime.backends.protocol import Backend
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.format.bundle_folder import LinksOption
from hidiff_runtime.format.left_out import phases_of_steps
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.verification.comparison import Verdict
from hidiff_runtime.verification.manifest_facts import compare_facts, facts_of
from hidiff_runtime.verification.replay import read_samples

Array = NDArray[Any]

_OWN = "the bundle's own store"


@dataclass(frozen=True)
class _Task:
    """What is to be verified: an open bundle, by a whole run, ``course``, and on random inputs at ``points``.

    The weights are ``against``'s, a checkpoint source, or else the bundle's own; ``graphs_only`` leaves engines alone.
    """

    bundle: Bundle
    recipe: Recipe
    scheduler_config: dict[str, Any]
    course: RunSchedule
    points: tuple[EvaluationPoint, ...]
    against: str | None
    graphs_only: bool

    @classmethod
    def of(cls, bundle: Bundle, steps: int | None, against: str | None, *, graphs_only: bool) -> _Task:
        recipe = Recipe.from_dict(bundle.manifest.recipe, "the recipe in the bundle's manifest")
        config = _noise_schedule(bundle, recipe)
        possible = courses(recipe, config)
        points = edge_points(recipe.phase_rule(), possible)
        return cls(bundle, recipe, config, _chosen(possible, steps), points, against, graphs_only)


@dataclass(frozen=True)
class _Reference:
    """What PyTorch computed."""

    weights: tuple[Check, ...]
    run: ReferenceRun
    random: tuple[ReferenceCall, ...]
    networks: tuple[NetworkCall, ...]
    picture: Array | None


def verify(
    folder: Path,
    *,
    against: str | None = None,
    steps: int | None = None,
    allow_links: LinksOption = (),
    graphs_only: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compares a bundle with PyTorch at every boundary.

    - each phase's engine on the inputs of a run and on random ones, on both sides of each phase change, shifts mixed;
    - each phase's portable graph on random inputs, in ONNX Runtime; a quantized one beside the float16 one it was made
      from; half-precision ones on inputs of the run too, and those of the other networks, all in half-precision
      arithmetic (:mod:`hidiff_export.verification.portable_graphs`);
    - the denoiser's whole run with that of diffusers' own pipeline under HiDiffusion: same seed, same sampler;
    - the ControlNet's engine on random inputs, where there is one;
    - text encoders on prompts with transformers, the VAE's halves on a random tile with diffusers;
    - the picture that the run's prompt becomes with that of diffusers' pipeline, by PSNR and SSIM too;
    - each sampler's table with its diffusers scheduler, and what the manifest says that nothing computes with its
      recipe;
    - the recorded reference samples;
    - the magnitudes of what PyTorch computes with float16's range, where the bundle computes in it;
    - ``against`` a source: every weight in the store with the source's.

    Args:
        folder: of the bundle; its hashes are checked first.
        against: a checkpoint source that the weights are compared with, the text encoders' and the VAE's too, and that
            PyTorch takes the UNet's from, in place of the bundle's own store.
            This finds a store whose weights are not that checkpoint's.
        steps: of the whole run; by default the fewest with the most phase changes.
        allow_links: as for :func:`hidiff_runtime.open`.
        graphs_only: run no engine, so that none has to run on this machine: portable graphs alone are compared, and
            weights.
        progress: told before each evaluation.

    Raises:
        BundleError: the bundle is broken, or has no reference samples.
        CheckpointError: the source is missing, broken or another family's.
        EngineError: the backend or ONNX Runtime is missing, or an engine does not load.
        InputError: the bundle has no table for ``steps``.
    """
    portable = portable_backend()
    backend = no_engines(folder, allow_links, portable) if graphs_only else None
    with hidiff_runtime.open(folder, backend=backend, allow_links=allow_links) as bundle:
        return _report(_Task.of(bundle, steps, against, graphs_only=graphs_only), folder.name, portable, progress)


def _report(task: _Task, name: str, portable: Backend, progress: Progress | None) -> Report:
    """Returns what a verification of the bundle called ``name`` finds."""
    bundle, graphs_only = task.bundle, task.graphs_only
    meter = FlopsProgress(task.recipe, task.recipe.unet_config(), progress)
    _plan(task, meter)
    magnitudes = MagnitudeRecorder(task.recipe)
    with magnitudes.recording():
        reference = _compute(task, meter, magnitudes)
    meter.note("diffusers: schedulers")
    tables = {sampler: bundle.sampler(sampler) for sampler in bundle.manifest.samplers}
    checks = (*reference.weights, *_timed(_settled(task, tables)))
    judge = EngineComparer(bundle, task.recipe, meter)
    if not graphs_only:
        checks = (*checks, *_timed(_verdicts(judge, reference)))
    graphs = GraphComparer(bundle, task.recipe, meter, portable)
    judged = chain(graphs.phases(reference.random, reference.run.calls), graphs.networks(reference.networks))
    checks = (*checks, *_timed(judged))
    meter.end()
    panels = None if judge.pictures is None else SideBySide.of(*judge.pictures, bundle.backend)
    arithmetic = GraphResults(task.recipe.precision.stored, None if graphs_only else bundle.widens_halves)
    candidate = "portable graphs" if graphs_only else bundle.backend
    named = (name, task.against or _OWN, ORIGIN, candidate)
    return Report(*named, checks, arithmetic, panels, magnitudes.found)


def _noise_schedule(bundle: Bundle, recipe: Recipe) -> dict[str, Any]:
    """Returns the checkpoint's scheduler configuration; in a bundle without its file, the default sampler's."""
    if SCHEDULER_CONFIG in bundle.manifest.files:
        return read_config(bundle.file(SCHEDULER_CONFIG))
    config: dict[str, Any] = json.loads(bundle.sampler(recipe.sampler[0].value).origin["config"])
    return config


def _chosen(possible: Sequence[RunSchedule], steps: int | None) -> RunSchedule:
    chosen = fullest(course for course in possible if steps in (None, course.steps))
    if chosen is None:
        raise InputError(
            "The bundle has no table for this number of steps.",
            given=steps,
            advice=f"Its step counts lie between {possible[0].steps} and {possible[-1].steps}.",
        )
    return chosen


def _plan(task: _Task, meter: FlopsProgress) -> None:
    """Counts the evaluations: PyTorch, engines, graphs, denoiser, recorded samples."""
    run = [point.phase for point in task.course.points]
    random = [point.phase for point in task.points]
    phases, precision = [record.phase for record in task.bundle.manifest.phases], task.recipe.precision
    graphs = phases * (1 + precision.quantized)
    graphs += [phase for phase in phases for _ in first_and_last(run, phase, precision)]
    if task.graphs_only:
        meter.plan([*run, *random, *graphs])
        return
    samples = read_samples(task.bundle)
    rule, forecast = task.recipe.phase_rule(), task.recipe.forecast_record
    recorded = [call.phase for call in samples.calls]
    steps = [phases_of_steps(rule, forecast, len(run.trajectory)) for run in samples.runs if run.trajectory]
    replayed = [phase for run in steps for phase in run if phase is not None]
    meter.plan([*run, *random, *run, *random, *graphs, *run, *recorded, *replayed])


def _compute(task: _Task, meter: FlopsProgress, magnitudes: MagnitudeRecorder) -> _Reference:
    weights: tuple[Check, ...] = ()
    networks = networks_of_store(task.bundle.root, task.recipe)
    if task.against is not None:
        weights = tuple(_timed(_weights(task, task.against)))
        networks = replace(networks, unet=unet_of_source(task.against, task.recipe))
    run = run_reference(networks, task.recipe, task.scheduler_config, task.course, meter, magnitudes)
    random = tuple(random_calls(networks.unet, task.recipe, task.points, meter, magnitudes))
    others: tuple[NetworkCall, ...] = ()
    if networks.controlnet is not None:
        magnitudes.follow(task.course.points[:1], random=True)
        others = (controlnet_call(networks.controlnet, task.recipe, task.course.timesteps[0]),)
    # The UNet's hooks and the UNet refer to each other, and its weights may be half of the memory there is.
    del networks
    gc.collect()
    pictures, vae = PictureNetworks(task.bundle.root, task.recipe), task.bundle.manifest.vae
    meter.note("transformers and diffusers: text encoders, VAE, picture")
    others = (*others, *pictures.text_calls(), *pictures.vae_calls())
    picture = None if vae is None or task.graphs_only else pictures.decode(run.latents[-1], vae)
    return _Reference(weights, run, random, others, picture)


def _weights(task: _Task, source: str) -> Iterator[Verdict]:
    """Yields the weights of each network that comes from the checkpoint; a ControlNet has one of its own."""
    stores = task.bundle.manifest.weights
    for component in Component:
        if component.value in stores and component is not Component.CONTROLNET:
            expected = weights_of_source(component, source, task.recipe).state_dict
            store = task.bundle.file(stores[component.value])
            yield compare_weights(component.value, expected, store, task.recipe)
    if task.recipe.family.is_sdxl and task.bundle.manifest.text_encoders:
        yield compare_model_index(source, task.bundle.manifest, task.recipe)


def _settled(task: _Task, tables: Mapping[str, SamplerTable]) -> Iterator[Verdict]:
    """Yields what no engine computes: sampler tables, and what the manifest says beside its recipe."""
    yield from compare_samplers(task.recipe, task.scheduler_config, tables)
    manifest = task.bundle.manifest
    # What is not there has no configuration to be read, in bundles from before there were text encoders above all.
    held = {"text": bool(manifest.text_encoders), "vae": manifest.vae is not None}
    recipe = Recipe.from_dict({**manifest.recipe, **held}, "the recipe in the bundle's manifest")
    context = StageContext(recipe, task.bundle.root)
    due = bare_manifest(context, tables, manifest.force_zeros_for_empty_prompt)
    yield compare_facts(Boundary.MANIFEST.value, facts_of(due), facts_of(manifest))


def _verdicts(judge: EngineComparer, reference: _Reference) -> Iterator[Verdict]:
    trajectory = [(Boundary.TRAJECTORY, call) for call in reference.run.calls]
    yield from judge.engines([*trajectory, *((Boundary.RANDOM, call) for call in reference.random)])
    yield from judge.networks(reference.networks)
    yield from judge.run(reference.run, reference.picture)
    yield from judge.recorded()


def _timed(verdicts: Iterable[Verdict]) -> Iterator[Check]:
    started = time.perf_counter()
    for verdict in verdicts:
        yield Check(verdict, time.perf_counter() - started)
        started = time.perf_counter()
