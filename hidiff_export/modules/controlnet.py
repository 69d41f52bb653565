"""A ControlNet beside a UNet that HiDiffusion has changed: at its own size, its residuals brought to the UNet's.

As in the published package, the ControlNet sees the latents at the size that
`hidiff_export.families.geometry.control_latent` gives and the control image at eight times that (both nearest), and its
residuals are resized (bicubic) to the skip connections' and the middle block's sizes, which depend on the phase. The
package does so for SDXL alone; here SD1.5 and SD2.1 follow the same rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch.nn import functional

from hidiff_export.errors import InputError
from hidiff_export.families.family import PIXELS_PER_LATENT
from hidiff_export.families.geometry import UNetGeometry, control_latent
from hidiff_export.families.graph_io import PROMPT_TOKENS, controlnet_inputs, controlnet_outputs
from hidiff_export.modules.graph_module import GraphModule
from hidiff_runtime.format.manifest import TensorSpec


def control_image_size(latent_height: int, latent_width: int) -> tuple[int, int]:
    """Returns height and width in pixels of the control image that the ControlNet sees."""
    height, width = control_latent(latent_height, latent_width)
    return height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT


def nearest(tensor: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns [batch, channels, height, width] brought to ``size``, each value the nearest one's."""
    return functional.interpolate(tensor, size)


def fit_residuals(
    down: Sequence[torch.Tensor], mid: torch.Tensor, geometry: UNetGeometry
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns a ControlNet's residuals at the sizes of the UNet's feature maps, bicubic.

    Args:
        down: one for each skip connection, [batch, channels, height, width] each.
        mid: the middle block's.

    Raises:
        InputError: there are not as many residuals as the UNet has skip connections.
    """
    return fit_down_residuals(down, geometry.skips), _bicubic(mid, geometry.mid[1:])


def fit_down_residuals(down: Sequence[torch.Tensor], skips: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Returns a ControlNet's residuals of some skip connections at their sizes, bicubic.

    Args:
        down: one for each of ``skips``, [batch, channels, height, width] each.
        skips: channels, height and width of each.

    Raises:
        InputError: there are not as many residuals as skip connections.
    """
    if len(down) != len(skips):
        raise InputError(
            f"The UNet has {len(skips)} skip connections.",
            given=f"{len(down)} ControlNet residuals",
            advice="Use a ControlNet of the UNet's family.",
        )
    return [_bicubic(residual, skip[1:]) for residual, skip in zip(down, skips, strict=True)]


def _bicubic(residual: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """At the same size bicubic interpolation would change nothing."""
    if tuple(residual.shape[-2:]) == size:
        return residual
    return functional.interpolate(residual, size=size, mode="bicubic")


class ControlNetModule(GraphModule):
    """A ControlNet for latents of one size: a static graph of tensors, float32 in and out.

    Args:
        controlnet: diffusers' ``ControlNetModel``.
        latent_height: of the UNet's latents, not of those the ControlNet sees; ``latent_width`` likewise.
        prompt_tokens: of a prompt's embedding, a multiple of 77.
    """

    network = "controlnet"
    title = "the ControlNet"

    def __init__(
        self, controlnet: Any, latent_height: int, latent_width: int, *, prompt_tokens: int = PROMPT_TOKENS
    ) -> None:
        super().__init__()
        self.controlnet: Any = controlnet
        self.control_latent = control_latent(latent_height, latent_width)
        self.control_image_size = control_image_size(latent_height, latent_width)
        self._latent = (latent_height, latent_width)
        self._prompt_tokens = prompt_tokens

    def input_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        config = self.controlnet.config
        return controlnet_inputs(config, *self._latent, model_batch, prompt_tokens=self._prompt_tokens)

    def output_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns names, shapes and types of the residuals: the skip connections', then the middle block's."""
        return controlnet_outputs(self.controlnet.config, *self._latent, model_batch)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        control_image: torch.Tensor,
        conditioning_scale: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Returns the residual of each skip connection, then the middle block's, at the ControlNet's sizes, float32.

        Args:
            latents: [model batch, 4, height, width], as the UNet gets them.
            timestep: [1].
            prompt_embeds: [model batch, tokens, features].
            control_image: [model batch, 3, height, width] of :func:`control_image_size`, 0 to 1; it stays the same
                all through a run, so it is resized before.
            conditioning_scale: [1], what the residuals are multiplied by.
            text_embeds: SDXL's pooled prompt, [model batch, features].
            time_ids: SDXL's sizes and crop, [model batch, 6].
        """
        dtype = self.controlnet.conv_in.weight.dtype
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        down, mid = self.controlnet(
            nearest(latents, self.control_latent).to(dtype),
            timestep,
            encoder_hidden_states=prompt_embeds.to(dtype),
            controlnet_cond=control_image.to(dtype),
            conditioning_scale=conditioning_scale.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return tuple(residual.to(latents.dtype) for residual in (*down, mid))


def resized_control(
    in_use: Callable[[int, int], bool], asked: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Callable[..., Any]:
    """Returns what to wrap around a live ControlNet's ``forward``: it resizes inputs, and skips it where not in use.

    Works for diffusers' ``ControlNetModel``, ``MultiControlNetModel`` and ``ControlNetUnionModel``.

    Args:
        in_use: whether the UNet takes residuals at the step at hand, for latents of this height and width.
        asked: gives the arguments by name that the ControlNet is evaluated with, from those of the pipeline.
    """

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(forward).bind(*args, **kwargs)
        latents: torch.Tensor = call.arguments["sample"]
        size = latents.shape[-2:]
        if not in_use(*size):
            return _no_residuals(latents, as_object=call.arguments.get("return_dict", True))
        call.arguments.update(asked(dict(call.arguments)))
        latents = call.arguments["sample"]
        pixels = control_image_size(*size)
        image = call.arguments["controlnet_cond"]
        several = isinstance(image, list | tuple)
        call.arguments["sample"] = nearest(latents, control_latent(*size))
        call.arguments["controlnet_cond"] = [nearest(i, pixels) for i in image] if several else nearest(image, pixels)
        return forward(*call.args, **call.kwargs)

    return around


def _no_residuals(latents: torch.Tensor, *, as_object: bool) -> Any:
    # Pipelines take the two apart and, in guess mode, join each with zeros; the UNet's hook then drops them.
    down, mid = (), latents.new_zeros(1)
    if as_object:
        return ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=mid)
    return down, mid
