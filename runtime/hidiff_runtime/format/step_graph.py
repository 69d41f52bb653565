"""The step graph: what follows an evaluation of the UNet, for a device to do where the latents are.

From what the UNet gave it computes, in float32, as the host does in `conditioning` and `sampler`: guidance, the
sampler's step, and what the UNet takes next.

- ``noise_pred`` as the UNet gave it, negative half first; ``guidance_scale`` and ``guidance_rescale``, only where the
  bundle has guidance. Step graphs of older bundles have no ``guidance_rescale``: what asks for some runs on the host.
- ``sample``, ``noise`` and ``state`` as `hidiff_runtime.sampling.scheduler_table` has them; ``rows``, the evaluation's
  coefficients, zero where the sampler has fewer states than the graph.
- ``input_scale`` of the evaluation to come; ``channels``, only for inpainting, which go behind the latents.
- ``unsound``, three numbers: how many evaluations came before; the first of them, counted from 1, that gave NaN or
  infinite values, and how many values these were; zeros as long as none did.

It gives ``next_sample``, ``next_state``, ``next_unsound``, and the ``latents`` that the UNet takes next. Where a bundle
with guidance does not guide some steps, it gives ``unguided_latents`` besides, which phases without guidance take; and
a second step graph follows these phases, whose ``noise_pred`` has no negative half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.specs import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOISE_PRED = "noise_pred"
SAMPLE, NOISE, STATE, ROWS = "sample", "noise", "state", "rows"
GUIDANCE_SCALE, GUIDANCE_RESCALE = "guidance_scale", "guidance_rescale"
INPUT_SCALE, CHANNELS = "input_scale", "channels"
UNSOUND, LATENTS, UNGUIDED_LATENTS = "unsound", "latents", "unguided_latents"
NEXT_SAMPLE, NEXT_STATE, NEXT_UNSOUND = "next_sample", "next_state", "next_unsound"


def step_inputs(
    batch: int, noise_pred: TensorSpec, latents: TensorSpec, slots: int, *, rescale: bool = True
) -> tuple[TensorSpec, ...]:
    """Returns the graph's inputs.

    Args:
        batch: pictures of one run.
        noise_pred: what the UNet gives, ``[batch or 2 * batch, channels, height, width]``.
        latents: what the UNet takes where it is guided, with as many channels, or inpainting's behind them.
        slots: states of the sampler that keeps most, at least 1.
        rescale: whether guidance can be rescaled, which it can not in older bundles.
    """
    rows, channels, *size = noise_pred.shape
    sample = (batch, channels, *size)
    specs = [
        TensorSpec(NOISE_PRED, noise_pred.shape, "float32"),
        TensorSpec(SAMPLE, sample, "float32"),
        TensorSpec(NOISE, sample, "float32"),
        TensorSpec(STATE, (slots, *sample), "float32"),
        TensorSpec(ROWS, (1 + slots, 3 + slots), "float32"),
        TensorSpec(INPUT_SCALE, (1,), "float32"),
        TensorSpec(UNSOUND, (3,), "int32"),
    ]
    if rows != batch:
        scales = (GUIDANCE_SCALE, GUIDANCE_RESCALE) if rescale else (GUIDANCE_SCALE,)
        specs += [TensorSpec(name, (1,), "float32") for name in scales]
    if latents.shape[1] != channels:
        specs.append(TensorSpec(CHANNELS, (latents.shape[0], latents.shape[1] - channels, *size), "float32"))
    return tuple(specs)


def step_outputs(
    batch: int, noise_pred: TensorSpec, latents: TensorSpec, slots: int, *, unguided: bool = False
) -> tuple[TensorSpec, ...]:
    """Returns the graph's outputs; arguments as for :func:`step_inputs`, and whether some steps are not guided."""
    sample = (batch, *noise_pred.shape[1:])
    specs = [
        TensorSpec(NEXT_SAMPLE, sample, "float32"),
        TensorSpec(NEXT_STATE, (slots, *sample), "float32"),
        TensorSpec(LATENTS, latents.shape, "float32"),
        TensorSpec(NEXT_UNSOUND, (3,), "int32"),
    ]
    if unguided:
        specs.append(TensorSpec(UNGUIDED_LATENTS, (batch, *latents.shape[1:]), "float32"))
    return tuple(specs)


def padded_rows(rows: NDArray[np.float64], slots: int) -> NDArray[np.float32]:
    """Returns a sampler's coefficients ``[1 + K, 3 + K]`` for a graph with ``slots`` states: float32, zeros at the end.

    Raises:
        BundleError: the sampler keeps more states than the graph.
    """
    missing = 1 + slots - len(rows)
    if missing < 0:
        raise BundleError(
            "The step graph has fewer states than the sampler.",
            given=f"{slots}, where the sampler keeps {len(rows) - 1}",
            advice="Build the bundle again.",
        )
    import numpy as np  # here, because the manifest needs this module and no numpy

    return np.pad(rows, ((0, missing), (0, missing))).astype(np.float32)
