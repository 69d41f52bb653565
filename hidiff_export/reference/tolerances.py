"""Every bound that parity is judged by: one table, boundary by precision, from those of `hidiff_export.recipe`.

The reference is always float32 PyTorch on the weights as they are stored, after rounding to the recipe's precision.
So a bound measures what the engine's arithmetic adds, not what rounding the checkpoint took away.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

from hidiff_export.graph.float32_ops import precision_of
from hidiff_export.recipe.field_types import Precision
from hidiff_export.recipe.sections import CALL_BOUNDS, RUN_BOUNDS
from hidiff_runtime.verification.comparison import Bound
from hidiff_runtime.verification.replay_components import EXACT
from hidiff_runtime.verification.scheduler_samples import AGREES

if TYPE_CHECKING:
    from hidiff_export.recipe import Recipe


class Boundary(str, Enum):
    """What is compared; the value is how reports name it.

    - ``WEIGHTS``: the stored tensors with a source's;
    - ``TRAJECTORY``: an engine with PyTorch, on inputs of a whole run; ``RANDOM``: on random ones;
    - ``GRAPH``: the portable graph, as it is before a backend's lowering, with PyTorch; ``GRAPH_RUN``: a half-precision
      one on inputs of a whole run;
    - ``FLOAT16_GRAPH``: the float16 graph that a quantized portable graph was made from, with PyTorch;
    - ``CONTROLNET``: the ControlNet's engine with PyTorch, the worst of its residuals; ``CONTROLNET_GRAPH``: its
      portable graph in half precision;
    - ``RUN``: the denoiser's latents with those of diffusers' pipeline;
    - ``TEXT``: a text encoder's engine on prompts, tokens by the bundle's tokenizer, with transformers; the worst of
      its outputs; ``TEXT_GRAPH``: its portable graph in half precision;
    - ``VAE_DECODER``, ``VAE_ENCODER``: half of the VAE on a random tile, with diffusers; ``VAE_DECODER_GRAPH``,
      ``VAE_ENCODER_GRAPH``: its portable graph in half precision;
    - ``PICTURE``: what the run's prompt becomes, with the picture of diffusers' pipeline, in the same tiles;
    - ``SAMPLER``: a sampler's table with its diffusers scheduler, in every run, from every start;
    - ``MANIFEST``: what the manifest says that nothing computes, with its recipe;
    - ``RECORDED_CALL``, ``RECORDED_STEP``, ``RECORDED_RUN``: engine and denoiser with what the build recorded;
      ``RECORDED_TOKENS``, ``RECORDED_TEXT``, ``RECORDED_VAE``, ``RECORDED_PICTURE``, ``RECORDED_SAMPLER`` and
      ``RECORDED_MANIFEST`` likewise.
    """

    WEIGHTS = "weights"
    TRAJECTORY = "engine, in a run"
    RANDOM = "engine, random"
    GRAPH = "graph, random"
    GRAPH_RUN = "graph, in a run"
    FLOAT16_GRAPH = "float16 graph, random"
    CONTROLNET = "ControlNet, random"
    CONTROLNET_GRAPH = "ControlNet graph, random"
    RUN = "whole run"
    TEXT = "text encoder"
    TEXT_GRAPH = "text encoder graph"
    VAE_DECODER = "VAE decoder"
    VAE_DECODER_GRAPH = "VAE decoder graph"
    VAE_ENCODER = "VAE encoder"
    VAE_ENCODER_GRAPH = "VAE encoder graph"
    PICTURE = "picture"
    SAMPLER = "sampler table"
    MANIFEST = "manifest"
    RECORDED_CALL = "recorded call"
    RECORDED_STEP = "recorded step"
    RECORDED_RUN = "recorded run"
    RECORDED_TOKENS = "recorded tokens"
    RECORDED_TEXT = "recorded text"
    RECORDED_VAE = "recorded VAE"
    RECORDED_PICTURE = "recorded picture"
    RECORDED_SAMPLER = "recorded sampler"
    RECORDED_MANIFEST = "recorded manifest"

    @property
    def whole_run(self) -> bool:
        """Whether steps of a run are judged, not one evaluation."""
        return self in (Boundary.RUN, Boundary.RECORDED_STEP, Boundary.RECORDED_RUN, *_PICTURES)

    @property
    def is_graph(self) -> bool:
        """Whether a portable graph is judged, not an engine."""
        phases = (Boundary.GRAPH, Boundary.GRAPH_RUN, Boundary.FLOAT16_GRAPH)
        vae = (Boundary.VAE_DECODER_GRAPH, Boundary.VAE_ENCODER_GRAPH)
        return self in (*phases, *vae, Boundary.CONTROLNET_GRAPH, Boundary.TEXT_GRAPH)


_PICTURES = (Boundary.PICTURE, Boundary.RECORDED_PICTURE)
"""Judged by PSNR and SSIM too."""

_VAE = (
    *(Boundary.VAE_DECODER, Boundary.VAE_ENCODER, Boundary.VAE_DECODER_GRAPH, Boundary.VAE_ENCODER_GRAPH),
    Boundary.RECORDED_VAE,
)
"""Those of the VAE, which has a precision of its own."""

_UNQUANTIZED = (
    *(Boundary.FLOAT16_GRAPH, Boundary.CONTROLNET, Boundary.CONTROLNET_GRAPH),
    *(Boundary.TEXT, Boundary.TEXT_GRAPH, Boundary.RECORDED_TEXT),
)
"""What stays in float16 in a quantized recipe: all but the phases and what runs them."""

_CALL = {precision: Bound(*bound) for precision, bound in CALL_BOUNDS.items()}
_RUN = {precision: Bound(*bound) for precision, bound in RUN_BOUNDS.items()}
# Measured by adding noise of the run's bound to latents before a fabricated decoder; noise as strong as the latents
# themselves leaves PSNR 15 and SSIM 0.38.
_PICTURE = {
    Precision.FLOAT32: (60.0, 0.9999, "Latents at 60 dB leave PSNR 69 and SSIM 1.0000."),
    Precision.FLOAT16: (35.0, 0.95, "Latents at 35 dB leave PSNR 44 and SSIM 0.999."),
    Precision.BFLOAT16: (
        25.0,
        0.8,
        "Latents at 25 dB leave PSNR 34 and SSIM 0.99; with other shifts all through they fail.",
    ),
    Precision.INT8: (
        18.0,
        0.6,
        "Latents at 15 dB leave PSNR 24 and SSIM 0.91, latents of noise PSNR 15 and SSIM 0.38.",
    ),
    Precision.FP8: (16.0, 0.5, "Latents at 10 dB leave PSNR 20 and SSIM 0.79, latents of noise PSNR 15 and SSIM 0.38."),
}
"""The least PSNR, in decibels, and SSIM of a picture, and why."""
_COPIED = Bound(
    snr_db=200,
    reason="Weights are rounded and copied, never computed: bit for bit, and a tensor that is not counts as a fault.",
)

_FIXED = {
    Boundary.WEIGHTS: _COPIED,
    **dict.fromkeys((Boundary.RECORDED_TOKENS, Boundary.MANIFEST, Boundary.RECORDED_MANIFEST), EXACT),
    **dict.fromkeys((Boundary.SAMPLER, Boundary.RECORDED_SAMPLER), AGREES),
}
"""The same at every precision: what nothing computes, so that nothing may differ, and samplers' coefficients."""


def _bound(boundary: Boundary, precision: Precision) -> Bound:
    if boundary in _FIXED:
        return _FIXED[boundary]
    if boundary in _VAE:
        return _CALL[precision_of("vae", precision)]
    judged = precision.stored if boundary in _UNQUANTIZED else precision
    if boundary in _PICTURES:
        psnr_db, ssim, reason = _PICTURE[judged]
        return Bound(_RUN[judged].snr_db, reason, psnr_db=psnr_db, ssim=ssim)
    return (_RUN if boundary.whole_run else _CALL)[judged]


TOLERANCES: Mapping[tuple[Boundary, str], Bound] = {
    (boundary, precision.value): _bound(boundary, precision) for boundary in Boundary for precision in Precision
}
"""The bound of each boundary at each precision."""


def bound_for(boundary: Boundary, recipe: Recipe) -> Bound:
    """Returns the bound that a recipe's bundle is judged by: the table's, or the recipe's own where it sets another."""
    bound = TOLERANCES[boundary, recipe.precision.value]
    if boundary in _FIXED or boundary in _VAE or (recipe.precision.quantized and boundary in _UNQUANTIZED):
        return bound
    own = recipe.parity.run_snr_db if boundary.whole_run else recipe.parity.call_snr_db
    if own == bound.snr_db:
        return bound
    psnr_db = own if boundary in _PICTURES else None
    return Bound(own, f"Set by the recipe in place of {bound.snr_db:g} dB.", psnr_db=psnr_db)
