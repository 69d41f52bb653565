"""Times the phases of several bundles of one recipe beside each other on this CPU, evaluation by evaluation.

    python benchmarks/cpu_engines.py float32-bundle bfloat16-bundle int8-bundle > benchmarks/cpu_engines_sd15-1024.md

Every round evaluates each bundle's phase once, in turn, so that whatever else the machine does falls on all of them.
The first bundle is what the others are compared with, in speed and in what they compute, on the same inputs. A whole
run is its phases' medians, counted by the manifest's plan. Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hidiff_runtime
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.denoising.denoiser import OUTPUT
from hidiff_runtime.format.specs import PhaseRecord
from hidiff_runtime.phases import PhasePlan

STEPS = 50
FLAGS = ("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "avx2")
TIMESTEPS = (981, 501, 1)


@dataclass
class Timed:
    """Seconds of a bundle's evaluations of one phase, and how far from the first bundle's what they give is."""

    open: float = 0.0
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    decibels: list[float] = field(default_factory=list)


def machine() -> str:
    """Processor, cores and the instructions that matter here."""
    text = Path("/proc/cpuinfo").read_text()
    lines = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in lines.items()}
    found = [flag for flag in FLAGS if flag in values.get("flags", "").split()]
    cores = text.count("processor\t")
    return f"{values.get('model name')}, {cores} cores, {', '.join(found)}, Python {platform.python_version()}"


def inputs(record: PhaseRecord, timestep: float) -> dict[str, NDArray[Any]]:
    """Random inputs of a phase, the same for every bundle."""
    found = {}
    for spec in record.inputs:
        random = np.random.default_rng(len(spec.name))
        if spec.dtype == "int32":
            found[spec.name] = random.integers(0, 4, spec.shape).astype(np.int32)
        else:
            found[spec.name] = random.standard_normal(spec.shape).astype(np.float32)
    found["timestep"] = np.float32([timestep])
    return found


def named(bundle: Bundle) -> str:
    """The bundle's backend and precision."""
    return f"{bundle.backend}, {bundle.manifest.precision}"


def measure(bundles: Mapping[str, Bundle], phase: int, rounds: int) -> dict[str, Timed]:
    """Evaluates one phase of every bundle in turn."""
    found = {name: Timed() for name in bundles}
    sessions = {}
    for name, bundle in bundles.items():
        started = time.monotonic()
        sessions[name] = bundle.engine(bundle.manifest.phases[phase].phase)
        found[name].open = time.monotonic() - started
    record = next(iter(bundles.values())).manifest.phases[phase]
    for index in range(rounds + 1):
        given, exact = inputs(record, TIMESTEPS[index % len(TIMESTEPS)]), None
        for name, session in sessions.items():
            started = time.monotonic(), time.process_time()
            output = session.run(given)[OUTPUT].astype(np.float64)
            seconds = time.monotonic() - started[0], time.process_time() - started[1]
            exact = output if exact is None else exact
            if index:  # the first evaluation takes memory
                found[name].wall.append(seconds[0])
                found[name].processor.append(seconds[1])
                noise = ((output - exact) ** 2).sum()
                found[name].decibels.append(10 * np.log10((exact**2).sum() / noise) if noise else np.inf)
    return found


def main() -> None:
    """Measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with ExitStack() as stack:
        opened = [stack.enter_context(hidiff_runtime.open(folder, verify="size")) for folder in given.bundles]
        bundles = {named(bundle): bundle for bundle in opened}
        first = opened[0].manifest
        measured = [measure(bundles, phase, given.rounds) for phase in range(len(first.phases))]
    print(f"Machine: {machine()}. {first.width}x{first.height}, batch of {first.phases[0].inputs[0].shape[0]}, ")
    print(f"medians of {given.rounds} rounds.\n")
    print("| phase | engine | open, s | wall, s | CPU, s | faster | dB beside the first |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for record, found in zip(first.phases, measured, strict=True):
        base = median(next(iter(found.values())).processor)
        for name, one in found.items():
            wall, processor = median(one.wall), median(one.processor)
            close = "" if np.isinf(min(one.decibels)) else f"{min(one.decibels):.1f}"
            row = f"| {record.phase.name} | {name} | {one.open:.1f} | {wall:.1f} | {processor:.1f} "
            print(f"{row}| {base / processor:.2f} | {close} |")
    plan = PhasePlan(first.rule, STEPS)
    counts = [sum(plan.phase_at(step) == record.phase for step in range(STEPS)) for record in first.phases]
    totals = {
        name: sum(count * median(found[name].processor) for count, found in zip(counts, measured, strict=True))
        for name in bundles
    }
    base = next(iter(totals.values()))
    print(f"\n{STEPS} steps ({' + '.join(map(str, counts))} evaluations), CPU seconds: ", end="")
    print("; ".join(f"{name} {total:.0f} ({base / total:.2f} times)" for name, total in totals.items()) + ".")
    print(json.dumps({name: round(total, 1) for name, total in totals.items()}))


if __name__ == "__main__":
    main()
