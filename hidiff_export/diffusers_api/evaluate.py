"""One evaluation of a bundle's UNet on torch tensors, of any batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hidiff_export.errors import EngineError, InputError
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.denoising.denoiser import OUTPUT
from hidiff_runtime.denoising.run_context import engine_errors
from hidiff_runtime.denoising.window_shifts import graph_shifts
from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.format.specs import PhaseRecord, TensorSpec
from hidiff_runtime.format.validation import WINDOW_SHIFTS
from hidiff_runtime.phases import PhasePlan

Array = NDArray[Any]

_SHARED = ("timestep", WINDOW_SHIFTS)
"""Inputs that are not the pipeline's to give for each picture."""


def evaluate(
    bundle: Bundle,
    record: PhaseRecord,
    plan: PhasePlan,
    step: int,
    inputs: Mapping[str, torch.Tensor],
    timestep: torch.Tensor | float,
    shifts: torch.Tensor | None,
    wanted: Sequence[str] = (OUTPUT,),
) -> dict[str, torch.Tensor]:
    """Returns the graph's outputs by name, float32 ``[batch, channels, height, width]`` on the CPU.

    A batch is evaluated in pieces of the graph's own, the last one filled up by its last picture; pictures of a batch
    have nothing to do with each other, so it makes no difference but to the time. Where the graph shifts all windows
    alike, a piece holds pictures of equal shifts.

    Args:
        bundle: whose engine computes.
        record: of the phase.
        plan: of the run; the phase that follows may open ahead.
        step: logical step, from 0.
        inputs: by graph input name, batch first.
        timestep: one number.
        shifts: int32 [windowed blocks], or a row of them for each picture; none where no block is windowed.
        wanted: names of the outputs, the predicted noise among them.

    Raises:
        InputError: an input is missing, not wanted, or of another shape than the graph's.
        EngineError: the engine does not load, failed, or gave NaN.
    """
    shared = {"timestep": _one(timestep)}
    own = [spec for spec in record.inputs if spec.name not in _SHARED]
    extra = inputs.keys() - {spec.name for spec in own}
    if extra:
        raise InputError("This bundle's graphs do not take this.", given=sorted(extra)[0], advice="Leave it out.")
    batch = len(inputs["latents"])
    arrays = {spec.name: _checked(bundle, spec, inputs.get(spec.name), batch) for spec in own}
    pieces = list(_pieces(batch, own[0].shape[0], record.input(WINDOW_SHIFTS), shifts))
    where = f"phase {record.phase.name}, step {step + 1} of {plan.steps}"
    following = next((span.phase for span in plan.spans if span.first > step), None)
    with bundle.lock:
        session = bundle.engine(record.phase, upcoming=following)
        outputs = {
            spec.name: np.empty((batch, *spec.shape[1:]), np.float32) for spec in record.outputs if spec.name in wanted
        }
        for rows, shifted in pieces:
            with engine_errors(where):
                found = session.run({**shared, **shifted, **{name: array[rows] for name, array in arrays.items()}})
            for name, array in outputs.items():
                array[rows] = found[name]
    if bad := count_nonfinite(outputs[OUTPUT]):
        raise EngineError(
            f"The engine gave NaN or infinite values in {where}.",
            given=f"{bad} of {outputs[OUTPUT].size} values, backend {bundle.backend}",
            advice=f"Run 'hidiff-run check {bundle.root}'; half precision may overflow, float32 does not.",
        )
    return {name: torch.from_numpy(array) for name, array in outputs.items()}


def _one(timestep: torch.Tensor | float) -> NDArray[np.float32]:
    values: Array = torch.as_tensor(timestep).detach().to("cpu", torch.float32).reshape(-1).numpy()
    if (values != values[0]).any():
        raise InputError(
            "All pictures of a batch are at the same timestep.", given=values.tolist(), advice="Give one number."
        )
    return values[:1]


def _checked(bundle: Bundle, spec: TensorSpec, value: torch.Tensor | None, batch: int) -> Array:
    manifest, due = bundle.manifest, [batch, *spec.shape[1:]]
    if value is None or list(value.shape) != due:
        size = f"Call the pipeline with height={manifest.height}, width={manifest.width}."
        other = f"Use a pipeline for {manifest.family}, {manifest.task}, or build a bundle for this one."
        raise InputError(
            f"This bundle's graphs take {spec.name} of shape {due}.",
            given="none" if value is None else list(value.shape),
            advice=size if spec.name == "latents" else other,
        )
    array: Array = value.detach().to("cpu", torch.float32).numpy()
    return array


def _pieces(
    batch: int, size: int, spec: TensorSpec | None, shifts: torch.Tensor | None
) -> Iterator[tuple[NDArray[np.intp], dict[str, Array]]]:
    """Yields the rows of each piece, the last filled up by its last row, and its window shifts by name."""
    every = np.arange(batch)
    if spec is None or shifts is None:
        groups = [every]
    else:
        drawn = graph_shifts(shifts.cpu().numpy(), (batch, spec.shape[-1]))
        own = len(spec.shape) > 1
        groups = [every] if own else [np.flatnonzero((drawn == row).all(axis=1)) for row in np.unique(drawn, axis=0)]
    for group in groups:
        for first in range(0, len(group), size):
            rows = group[np.minimum(np.arange(first, first + size), len(group) - 1)]
            given = {} if spec is None or shifts is None else {spec.name: graph_shifts(drawn[rows], spec.shape)}
            yield rows, given
