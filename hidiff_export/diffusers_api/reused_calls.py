"""Calls of a pipeline's UNet that compute its outermost layers alone, over deep features of an earlier call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from hidiff_export.diffusers_api.run_tracker import RunTracker
from hidiff_export.errors import InputError
from hidiff_export.families.reuse_depths import Cut
from hidiff_export.modules.shallow_unet import FeatureSlot, install_feature_output, install_shallow
from hidiff_runtime.phases import Phase
from hidiff_runtime.reused_features import Reuse

_DOWN_RESIDUALS, _MID_RESIDUAL = "down_block_additional_residuals", "mid_block_additional_residual"
_ADAPTER_RESIDUALS = "down_intrablock_additional_residuals"


class ReusedCalls:
    """What stands around the UNet's ``forward``: all of its layers are computed, or the outermost ones.

    The layers are left out for the length of a call, so LoRA layers, FreeU and attention processors may come and go.

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        reuse: how long features serve, and how deep they are.
        tracker: says which evaluation of the run is at hand.
        phases: of each evaluation of the run at hand, for latents of a height and width.
        computed: whether each evaluation of a run of so many is computed, and not forecast.

    Attributes:
        features: of the last full call, [model batch, channels, height, width], as long as a later one takes them.
    """

    def __init__(
        self,
        unet: Any,
        reuse: Reuse,
        tracker: RunTracker,
        phases: Callable[[int, int], Sequence[Phase]],
        computed: Callable[[int], Sequence[bool]],
    ) -> None:
        self._unet = unet
        self._reuse = reuse
        self._cut = Cut.of(unet.config, reuse.depth)
        self._tracker = tracker
        self._phases = phases
        self._computed = computed
        self._slot = FeatureSlot()
        self.features: torch.Tensor | None = None
        self._latents_shape: torch.Size | None = None
        self._last = -1

    def shallow(self, latents: torch.Tensor) -> bool:
        """Returns whether the evaluation at hand is shallow.

        A pipeline may change its batch in mid-run, which the rule does not know: then all layers are computed.

        Args:
            latents: [model batch, channels, height, width], which the UNet is called with.
        """
        index, _ = self._tracker.evaluation()
        return self.features is not None and latents.shape == self._latents_shape and self._planned(latents)[index]

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluates the UNet, or its outermost layers.

        Raises:
            InputError: the pipeline evaluates the UNet several times for one step of the scheduler, or it has a
                T2I-Adapter.
        """
        call = inspect.signature(forward).bind(*args, **kwargs)
        latents: torch.Tensor = call.arguments["sample"]
        self._check(call.arguments)
        index, _ = self._tracker.evaluation()
        later = any(self._planned(latents)[index + 1 :])
        with ExitStack() as handles:
            if self.shallow(latents):
                self._start_from_features(call.arguments, handles)
                output = forward(*call.args, **call.kwargs)
            else:
                self.features, self._latents_shape = None, latents.shape
                install_feature_output(self._unet, self._cut, self._slot, handles)
                output = forward(*call.args, **call.kwargs)
                self.features = self._slot.take().detach()
        if not later:
            self.features = None
        return output

    def _start_from_features(self, arguments: dict[str, Any], handles: ExitStack) -> None:
        assert self.features is not None  # else the evaluation is not shallow
        install_shallow(self._unet, self._cut, self._slot, handles)
        self._slot.put(self.features)
        if (mid := arguments.get(_MID_RESIDUAL)) is not None:
            arguments[_MID_RESIDUAL] = mid.new_zeros(())  # the features have it in them

    def _planned(self, latents: torch.Tensor) -> tuple[bool, ...]:
        _, total = self._tracker.evaluation()
        return self._reuse.shallow(self._phases(*latents.shape[-2:]), self._computed(total))

    def _check(self, arguments: dict[str, Any]) -> None:
        index, total = self._tracker.evaluation()
        if 0 < index == self._last:
            raise InputError(
                "The pipeline calls the UNet more than once for a step, each time with other features.",
                given=f"evaluation {index} of {total}",
                advice="Apply HiDiffusion without reuse.",
            )
        self._last = index
        alone = arguments.get(_DOWN_RESIDUALS) is not None and arguments.get(_MID_RESIDUAL) is None
        if alone or arguments.get(_ADAPTER_RESIDUALS) is not None:
            raise InputError(
                "A T2I-Adapter changes whole blocks of the UNet, of which shallow evaluations compute a part.",
                given=_DOWN_RESIDUALS if alone else _ADAPTER_RESIDUALS,
                advice="Apply HiDiffusion without reuse.",
            )
