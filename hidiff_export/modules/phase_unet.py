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
from hidiff_export.families.graph_io import (
    DOWN_RESIDUAL,
    MID_RESIDUAL,
    PROMPT_TOKENS,
    phase_inputs,
    phase_outputs,
    shallow_cut,
)
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.reuse_depths import Cut
from hidiff_export.modules.controlnet import fit_down_residuals, fit_residuals
from hidiff_export.modules.graph_module import GraphModule
from hidiff_export.modules.raunet import install_phase
from hidiff_export.modules.shallow_unet import FeatureSlot, install_feature_output, install_shallow
from hidiff_export.modules.window_attention import WINDOW_ORDERS, WindowTables
from hidiff_runtime.format.manifest import TensorSpec
from hidiff_runtime.phases import Phase
from hidiff_runtime.reused_features import DEEP_FEATURES

Module = TypeVar("Module", bound=nn.Module)


def structural_copy(module: Module) -> Module:
    """Returns a copy of the module tree that shares every parameter and buffer, tied ones included, with ``module``."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


class PhaseUNet(GraphModule):
    """The UNet in one phase, for latents of one size.

    Inputs and outputs are float32 whatever the UNet's precision; casts are inside. The UNet handed in is not changed:
    the phase is installed on a structural copy, ``self.unet``, so several phases share one set of weights. In a shallow
    phase the copy has its outermost layers alone.

    Args:
        unet: with the family's architecture.
        layout: where HiDiffusion acts in it.
        phase: which changes are in force, whether ControlNet residuals come in, and whether it is shallow.
        latent_height: in latents, not pixels; ``latent_width`` likewise.
        prompt_tokens: of a prompt's embedding, a multiple of 77.
        own_shifts: whether each latent of the batch has window shifts of its own.
        reuse_depth: layers on the way up that shallow phases compute, where features are reused; then full phases give
            the deep features too.

    Raises:
        InputError: the layout is not this UNet's, it cannot be cut at this depth, or a shallow phase has no depth.
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
        reuse_depth: int | None = None,
    ) -> None:
        super().__init__()
        config: Mapping[str, Any] = unet.config
        self.unet = structural_copy(unet)
        self.layout = layout
        self.phase = phase
        self.title = f"the phase {phase.name}"
        self.geometry = UNetGeometry.of(config, layout, phase, latent_height, latent_width)
        self.tables = WindowTables(self.geometry.windows)
        handles = install_phase(self.unet, layout, self.geometry)
        self._config = dict(config)
        self._given: dict[str, Any] = {"prompt_tokens": prompt_tokens, "own_shifts": own_shifts}
        self._reuse_depth = reuse_depth
        self._slot = FeatureSlot()
        self._cut = shallow_cut(config, phase, reuse_depth)
        if self._cut is not None:
            install_shallow(self.unet, self._cut, self._slot, handles)
        elif reuse_depth is not None:
            install_feature_output(self.unet, Cut.of(config, reuse_depth), self._slot, handles)
        self.eval()

    def input_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        geometry = self.geometry
        size = (geometry.latent_height, geometry.latent_width)
        options = {**self._given, "reuse_depth": self._reuse_depth}
        return phase_inputs(self._config, self.layout, self.phase, *size, model_batch, **options)

    def output_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns names, shapes and types of the outputs."""
        size = (self.geometry.latent_height, self.geometry.latent_width)
        depth = self._reuse_depth
        return phase_outputs(self._config, self.layout, self.phase, *size, model_batch, reuse_depth=depth)

    @staticmethod
    def arguments(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Returns :meth:`forward`'s keyword arguments: the ControlNet's residuals as one tuple, the rest as it was."""
        down = tuple(tensor for name, tensor in inputs.items() if name.startswith(DOWN_RESIDUAL))
        others = {name: tensor for name, tensor in inputs.items() if not name.startswith(DOWN_RESIDUAL)}
        if not down:
            return others
        last = {name: others.pop(name) for name in (MID_RESIDUAL, DEEP_FEATURES) if name in others}
        return {**others, "down_residuals": down, **last}

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
        deep_features: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Returns the predicted noise, [model batch, 4, height, width], of the latents' type.

        Where features are reused, a full phase returns the deep features after it, as the shallow one takes them.

        Args:
            latents: [model batch, channels, height, width], scaled by the sampler; for inpainting with the mask and
                the masked picture's latents after them.
            timestep: [1].
            prompt_embeds: [model batch, tokens, features].
            window_shifts: int32 [windowed blocks], 0 to 3, or a row of them for each of the model batch; absent if no
                block is windowed.
            text_embeds: SDXL's pooled prompt, [model batch, features].
            time_ids: SDXL's sizes and crop, [model batch, 6].
            down_residuals: the ControlNet's, one for each skip connection that is computed, at its own sizes.
            mid_residual: the ControlNet's for the middle block; not of a shallow phase.
            deep_features: of a shallow phase, [model batch, channels, height, width], from a full evaluation of the
                same phase.

        Raises:
            InputError: the latents have another size, or other inputs are there than :meth:`input_specs` lists.
        """
        self._check(latents, window_shifts, (down_residuals or None, mid_residual), deep_features)
        dtype: torch.dtype = self.unet.conv_in.weight.dtype
        # text_embeds and time_ids stay float32: the UNet joins both in that type and then casts.
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        orders = None if window_shifts is None else {WINDOW_ORDERS: self.tables(window_shifts)}
        down, mid = self._residuals(down_residuals, mid_residual, dtype)
        if deep_features is not None:
            self._slot.put(deep_features.to(dtype))
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
        if self._reuse_depth is None or self.phase.shallow:
            return noise_pred.to(latents.dtype)
        return noise_pred.to(latents.dtype), self._slot.take().to(latents.dtype)

    def _residuals(
        self, down: Sequence[torch.Tensor], mid: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        if self._cut is not None and down:
            fitted = fit_down_residuals(down, self.geometry.skips[: self._cut.depth])
            return [residual.to(dtype) for residual in fitted], down[0].new_zeros((), dtype=dtype)
        if mid is None:
            return None, None
        fitted, fitted_mid = fit_residuals(down, mid, self.geometry)
        return [residual.to(dtype) for residual in fitted], fitted_mid.to(dtype)

    def _check(
        self,
        latents: torch.Tensor,
        shifts: torch.Tensor | None,
        residuals: tuple[object, object],
        deep_features: torch.Tensor | None,
    ) -> None:
        size = (self.geometry.latent_height, self.geometry.latent_width)
        if tuple(latents.shape[-2:]) != size:
            raise InputError(
                f"This phase was built for latents of {size[0]}x{size[1]}.",
                given=f"{latents.shape[-2]}x{latents.shape[-1]}",
                advice="Build a PhaseUNet for the size at hand.",
            )
        control, shallow = self.phase.control, self.phase.shallow
        wanted = (bool(self.layout.windowed_blocks), control, control and not shallow, shallow)
        given = tuple(tensor is not None for tensor in (shifts, *residuals, deep_features))
        if given != wanted:
            raise InputError(
                f"The phase {self.phase.name} takes other inputs.",
                given=f"window_shifts: {given[0]}, ControlNet residuals: {any(given[1:3])}, deep_features: {given[3]}",
                advice="Give what input_specs() lists.",
            )
