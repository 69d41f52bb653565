"""A quantized recipe's phases get their ranges from what PyTorch's run fed them, on both sides of each phase change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.graph.declined import collecting, write_declined
from hidiff_export.quantization.quantize import Inputs, quantize_graph
from hidiff_export.tool_versions import QUANTIZERS, tool_versions
from hidiff_runtime.phases import Phase
from hidiff_runtime.verification.reference_samples import INDEX, CallSample, ReferenceSamples, Stored


class QuantizationStage(Stage):
    """The portable graph of each phase in int8 or fp8, from the float16 graph that stays beside it."""

    name = "quantization"
    title = "quantization"
    needs = ("weights", "graphs", "reference")

    def inputs(self, context: StageContext) -> Any:
        """Returns the precision, and what measures the ranges."""
        return {"precision": context.recipe.precision.value, "tools": tool_versions(QUANTIZERS)}

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Measures and writes phase after phase."""
        samples = ReferenceSamples.read(context.reference / INDEX)
        with collecting() as declined:
            for index, phase in enumerate(context.phases):
                report(index, len(context.phases), phase.name)
                given = calibration(samples, phase, context.recipe.shifts_shape(phase))
                quantize_graph(context.traced(phase), given, context.recipe.precision, context.graph(phase))
        return (*map(context.graph, context.phases), *write_declined(declined, context.declined(self.name)))


def calibration(samples: ReferenceSamples, phase: Phase, shifts_shape: tuple[int, ...]) -> tuple[Inputs, ...]:
    """Returns a phase's evaluations to measure ranges on: those of the recorded run, or else the random ones.

    A run goes through every phase change that it can, so that the last evaluation before each change and the first
    after it are among them. The random ones are left for judging by, where they are not needed here.
    """
    calls = [call for call in samples.calls if call.phase == phase]
    in_a_run = [call for call in calls if isinstance(call.inputs["latents"], Stored)]
    return tuple(_inputs(samples, call, shifts_shape) for call in in_a_run or calls)


def _inputs(samples: ReferenceSamples, call: CallSample, shifts_shape: tuple[int, ...]) -> Inputs:
    inputs = {name: samples.array(source) for name, source in call.inputs.items()}
    if call.window_shifts:
        inputs["window_shifts"] = np.array(call.window_shifts, np.int32).reshape(shifts_shape)
    return inputs
