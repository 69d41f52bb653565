"""A diffusers UNet with one phase fixed: a static graph of tensors, window shifts among its inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from hidiff_export.errors import InputError
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.graph_io import DOWN_RESIDUAL, MID_RESIDUAL, PROMPT_TOKENS, phase_inputs, phase_outputs
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.modules.controlnet import fit_residuals
from hidiff_export.modules.graph_module import GraphModule
from hidiff_export.modules.raunet import install_phase
from hidiff_export.modules.window_attention import WINDOW_ORDERS, WindowTables
from hidiff_runtime.format.manifest import TensorSpec
from hidiff_runtime.phases import Phase

Module = TypeVar("Module", bound=nn.Module)


def structural_copy(module: Module) -> Module:
    """Returns a copy of the module tree that shares every parameter and buffer, tied ones included, with ``module``."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


class PhaseUNet(GraphModule):
    """The UNet in one phase, for latents of one size.

    Inputs and outputs are float32 whatever the UNet's precision; casts are inside. The UNet handed in is not changed:
    the phase is installed on a structural copy, ``self.unet``, so several phases share one set of weights.

    Args:
        unet: with the family's architecture.
        layout: where HiDiffusion acts in it.
        phase: which changes are in force, and whether ControlNet residuals come in.
        latent_height: in latents, not pixels; ``latent_width`` likewise.
        prompt_tokens: of a prompt's embedding, a multiple of 77.
        own_shifts: whether each latent of the batch has window shifts of its own.

    Raises:
        InputError: the layout is not this UNet's.
    """

    network = "unet"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        layout: Layout,
        phase: Phase,
        latent_height: int,
        latent_width: int,
        *,
        prompt_tokens: int = PROMPT_TOKENS,
        own_shifts: bool = False,
    ) -> None:
        super().__init__()
        config: Mapping[str, Any] = unet.config
        self.unet = structural_copy(unet)
        self.layout = layout
        self.phase = phase
        self.title = f"the phase {phase.name}"
        self.geometry = UNetGeometry.of(config, layout, phase, latent_height, latent_width)
        self.tables = WindowTables(self.geometry.windows)
        install_phase(self.unet, layout, self.geometry)
        self._config = dict(config)
        self._given: dict[str, Any] = {"prompt_tokens": prompt_tokens, "own_shifts": own_shifts}
        self.eval()

    def input_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        geometry = self.geometry
        size = (geometry.latent_height, geometry.latent_width)
        return phase_inputs(self._config, self.layout, self.phase, *size, model_batch, **self._given)

    def output_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns name, shape and type of the output."""
        return phase_outputs(self._config, self.geometry.latent_height, self.geometry.latent_width, model_batch)

    @staticmethod
    def arguments(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Returns :meth:`forward`'s keyword arguments: the ControlNet's residuals as one tuple, the rest as it was."""
        down = tuple(tensor for name, tensor in inputs.items() if name.startswith(DOWN_RESIDUAL))
        others = {name: tensor for name, tensor in inputs.items() if not name.startswith(DOWN_RESIDUAL)}
        if not down:
            return others
        mid = others.pop(MID_RESIDUAL)
        return {**others, "down_residuals": down, MID_RESIDUAL: mid}

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        window_shifts: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        down_residuals: Sequence[torch.Tensor] = (),
        mid_residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the predicted noise, [model batch, 4, height, width], of the latents' type.

        Args:
            latents: [model batch, channels, height, width], scaled by the sampler; for inpainting with the mask and
                the masked picture's latents after them.
            timestep: [1].
            prompt_embeds: [model batch, tokens, features].
            window_shifts: int32 [windowed blocks], 0 to 3, or a row of them for each of the model batch; absent if no
                block is windowed.
            text_embeds: SDXL's pooled prompt, [model batch, features].
            time_ids: SDXL's sizes and crop, [model batch, 6].
            down_residuals: the ControlNet's, one for each skip connection, at its own sizes.
            mid_residual: the ControlNet's for the middle block.

        Raises:
            InputError: the latents have another size, or other inputs are there than :meth:`input_specs` lists.
        """
        self._check(latents, window_shifts, (*down_residuals, mid_residual))
        dtype: torch.dtype = self.unet.conv_in.weight.dtype
        # text_embeds and time_ids stay float32: the UNet joins both in that type and then casts.
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        orders = None if window_shifts is None else {WINDOW_ORDERS: self.tables(window_shifts)}
        down, mid = self._residuals(down_residuals, mid_residual, dtype)
        noise_pred: torch.Tensor = self.unet(
            latents.to(dtype),
            timestep,
            prompt_embeds.to(dtype),
            cross_attention_kwargs=orders,
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return noise_pred.to(latents.dtype)

    def _residuals(
        self, down: Sequence[torch.Tensor], mid: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        if mid is None:
            return None, None
        fitted, fitted_mid = fit_residuals(down, mid, self.geometry)
        return [residual.to(dtype) for residual in fitted], fitted_mid.to(dtype)

    def _check(self, latents: torch.Tensor, shifts: torch.Tensor | None, residuals: Sequence[object]) -> None:
        size = (self.geometry.latent_height, self.geometry.latent_width)
        if tuple(latents.shape[-2:]) != size:
            raise InputError(
                f"This phase was built for latents of {size[0]}x{size[1]}.",
                given=f"{latents.shape[-2]}x{latents.shape[-1]}",
                advice="Build a PhaseUNet for the size at hand.",
            )
        given = (shifts is not None, *(residual is not None for residual in residuals))
        wanted = (bool(self.layout.windowed_blocks), *(self.phase.control for _ in residuals))
        if given != wanted:
            raise InputError(
                f"The phase {self.phase.name} takes other inputs.",
                given=f"window_shifts: {given[0]}, ControlNet residuals: {any(given[1:])}",
                advice="Give what input_specs() lists.",
            )
