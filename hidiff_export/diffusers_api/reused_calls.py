"""Calls of a pipeline's UNet that compute its outermost layers alone, over deep features of an earlier call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from hidiff_export.diffusers_api.kept_features import KeptFeatures
from hidiff_export.errors import InputError
from hidiff_export.families.reuse_depths import Cut
from hidiff_export.modules.shallow_unet import FeatureSlot, install_feature_output, install_shallow

_DOWN_RESIDUALS, _MID_RESIDUAL = "down_block_additional_residuals", "mid_block_additional_residual"
_ADAPTER_RESIDUALS = "down_intrablock_additional_residuals"


class ReusedCalls:
    """What stands around the UNet's ``forward``: all of its layers are computed, or the outermost ones.

    The layers are left out for the length of a call, so LoRA layers, FreeU and attention processors may come and go.

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        depth: of the features.
        kept: says which call takes features, and keeps them.
    """

    def __init__(self, unet: Any, depth: int, kept: KeptFeatures) -> None:
        self._unet = unet
        self._cut = Cut.of(unet.config, depth)
        self._kept = kept
        self._slot = FeatureSlot()

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluates the UNet, or its outermost layers.

        Raises:
            InputError: the pipeline evaluates the UNet several times for one step of the scheduler, or it has a
                T2I-Adapter.
        """
        call = inspect.signature(forward).bind(*args, **kwargs)
        latents: torch.Tensor = call.arguments["sample"]
        self._kept.begin()
        _check_no_adapter(call.arguments)
        features = self._kept.taken_for(latents)
        with ExitStack() as handles:
            if features is not None:
                self._start_from(features, call.arguments, handles)
                output = forward(*call.args, **call.kwargs)
            else:
                self._kept.forget()
                install_feature_output(self._unet, self._cut, self._slot, handles)
                output = forward(*call.args, **call.kwargs)
                features = self._slot.take().detach()
        self._kept.finish(latents, features)
        return output

    def _start_from(self, features: torch.Tensor, arguments: dict[str, Any], handles: ExitStack) -> None:
        install_shallow(self._unet, self._cut, self._slot, handles)
        self._slot.put(features)
        if (mid := arguments.get(_MID_RESIDUAL)) is not None:
            arguments[_MID_RESIDUAL] = mid.new_zeros(())  # the features have it in them


def _check_no_adapter(arguments: dict[str, Any]) -> None:
    alone = arguments.get(_DOWN_RESIDUALS) is not None and arguments.get(_MID_RESIDUAL) is None
    if alone or arguments.get(_ADAPTER_RESIDUALS) is not None:
        raise InputError(
            "A T2I-Adapter changes whole blocks of the UNet, of which shallow evaluations compute a part.",
            given=_DOWN_RESIDUALS if alone else _ADAPTER_RESIDUALS,
            advice="Apply HiDiffusion without reuse.",
        )
