"""Milliseconds of each phase, contender beside contender in random order, and seconds and memory of whole runs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from benchmarks.gpu import engines, networks, pipelines
from benchmarks.gpu.cases import PYTORCH, Step
from benchmarks.gpu.machine import Clock, MemoryWatch
from benchmarks.gpu.work import Work
from hidiff_export.recipe import Recipe
from hidiff_export.reference.diffusers_run import SEED, RunInputs
from hidiff_export.reference.random_inputs import arrays

_FEWEST = 5
ENGINE = "engine"


class Contender:
    """Something that evaluates a phase.

    Args:
        action: one evaluation.
        clock: what times it.
        how: what the evaluation includes.
    """

    def __init__(self, action: Callable[[], object], clock: Clock, how: str) -> None:
        self.action = action
        self.clock = clock
        self.how = how


def phases(work: Work) -> None:
    """Times every phase: PyTorch's ways among themselves, or one backend's engine beside eager and compiled."""
    recipe = work.recipe()
    unet = networks.unet_of(recipe, work.device)
    with ExitStack() as stack:
        bundle = None
        if work.job.by != PYTORCH:
            bundle = stack.enter_context(engines.open_bundle(work.bundle, work.job.by, work.device))
        for step in work.steps:
            torch.compiler.reset()
            with (
                work.attempt(what="phase", phase=step.phase.name),
                _contenders(work, unet, recipe, bundle, step) as all_,
            ):
                _time(work, step, all_)


@contextmanager
def _contenders(work: Work, unet: Any, recipe: Recipe, bundle: Any, step: Step) -> Iterator[dict[str, Contender]]:
    """What evaluates the phase, each once before; one that cannot is recorded and left out."""
    module = networks.phase_unet(unet, recipe, step, work.device)
    inputs = networks.inputs_of(module, recipe, step)
    tensors = networks.on(work.device, inputs)
    clock = Clock(work.device)
    torch_ways: dict[str, Callable[[], Callable[[], object]]] = {
        networks.EAGER: lambda: lambda: networks.evaluate(module, tensors),
        networks.COMPILED: lambda: _compiled(work, module, tensors),
    }
    with ExitStack() as stack:
        if bundle is None:
            package = stack.enter_context(networks.package(unet, recipe, work.job.case, step, work.rehearse))
            torch_ways[networks.PUBLISHED] = lambda: lambda: package(tensors, step.step)
            torch_ways[networks.STOCK] = lambda: lambda: networks.evaluate_stock(unet, tensors)
            with work.attempt(what="activation", phase=step.phase.name), networks.largest_output(module) as largest:
                networks.evaluate(module, tensors)
                work.add({"what": "activation", "phase": step.phase.name, "largest_bytes": largest[0]})
        ready: dict[str, Contender] = {}
        for name, way in torch_ways.items():
            with work.attempt(what="phase", phase=step.phase.name, contender=name):
                action = way()
                action()
                how = f", {work.scale.compiler}" if name == networks.COMPILED else ""
                ready[name] = Contender(action, clock, f"tensors on the device{how}")
        if bundle is not None:
            with work.attempt(what="phase", phase=step.phase.name, contender=ENGINE):
                evaluation = engines.Evaluation(bundle, step.phase, inputs)
                evaluation.output()
                ready[ENGINE] = Contender(evaluation, Clock(work.device, evaluation.stream), evaluation.how)
        yield ready


def _compiled(work: Work, module: torch.nn.Module, tensors: networks.Tensors) -> Callable[[], object]:
    compiled: Any = torch.compile(module, fullgraph=True, dynamic=False, backend=work.scale.compiler)
    return lambda: networks.evaluate(compiled, tensors)


def _time(work: Work, step: Step, contenders: Mapping[str, Contender]) -> None:
    """Rounds in which every contender has its turn once, in an order drawn anew."""
    scale = work.scale
    took: dict[str, list[float]] = {}
    for name, contender in contenders.items():
        with work.attempt(what="phase", phase=step.phase.name, contender=name):
            for _ in range(scale.warm_up):
                contender.clock.milliseconds(contender.action)
            took[name] = []
    order, started = random.Random(0), time.monotonic()
    for count in range(scale.rounds):
        if count >= _FEWEST and time.monotonic() - started > scale.seconds:
            break
        for name in order.sample(list(took), len(took)):
            took[name].append(contenders[name].clock.milliseconds(contenders[name].action))
    compiled = took.get(networks.COMPILED, [])
    for name, values in took.items():
        result = {**spread(values), "clock": contenders[name].clock.kind, "how": contenders[name].how}
        if compiled and name != networks.COMPILED:
            ratios = [mine / other for mine, other in zip(values, compiled, strict=True)]
            result["to_compiled"] = round(statistics.median(ratios), 4)
        work.add({"what": "phase", "phase": step.phase.name, "contender": name, **result})


def spread(values: list[float], unit: str = "ms") -> dict[str, Any]:
    """Median, the middle half's ends, least and most, and how many."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values * 3)
    named = {"median": statistics.median(values), "p25": low, "p75": high, "min": min(values), "max": max(values)}
    return {f"{key}_{unit}": round(value, 4) for key, value in named.items()} | {"n": len(values)}


def whole_run(work: Work) -> None:
    """Seconds and peak memory of whole runs, one way of PyTorch's or one backend's engines."""
    recipe, scale = work.recipe(), work.scale
    with MemoryWatch(work.device) as memory:
        if work.job.by in pipelines.WAYS:
            with pipelines.run_of(work.job.by, recipe, work.job.case, work.device, rehearse=work.rehearse) as run:
                seconds = _seconds(work, lambda: run(scale.run_steps, SEED), lambda: run(scale.parity_steps, SEED))
        else:
            seconds = _engine_seconds(work, recipe)
    counted = "device, as the driver counts" if work.device == "cuda" else "resident set of the process"
    result = {"peak_bytes": memory.peak, "peak_of": counted, "peak_allocated_bytes": memory.allocated or None}
    work.add({"what": "run", "steps": scale.run_steps, **spread(seconds, "s"), **result})


def _engine_seconds(work: Work, recipe: Recipe) -> list[float]:
    with engines.open_bundle(work.bundle, work.job.by, work.device) as bundle:
        given = RunInputs.of(recipe, recipe.unet_config())
        conditions: dict[str, Any] = dict(arrays(given.arrays))

        def run(steps: int) -> object:
            return bundle.denoiser().denoise(**conditions, steps=steps, seed=SEED, guidance_scale=given.guidance_scale)

        return _seconds(work, lambda: run(work.scale.run_steps), lambda: run(work.scale.parity_steps))


def _seconds(work: Work, action: Callable[[], object], warm_up: Callable[[], object]) -> list[float]:
    """Of each run that counts. The result comes to the host, so that the wall clock is right."""
    warm_up()
    took = []
    for _ in range(work.scale.runs):
        started = time.perf_counter()
        action()
        took.append(time.perf_counter() - started)
    return took
