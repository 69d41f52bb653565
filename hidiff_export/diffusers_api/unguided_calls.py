"""Calls of a pipeline's UNet that are not guided: the prompts' half of the batch is evaluated, and stands for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput


def prompts_half(value: Any, batch: int) -> Any:
    """Returns the second half of every tensor of this batch, where guidance has the prompts, and all else as it is.

    Args:
        value: a tensor, anything else, or any of these in lists, tuples and mappings.
        batch: of the UNet's call, both halves together.
    """
    if isinstance(value, torch.Tensor):
        return value[batch // 2 :] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: prompts_half(one, batch) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(prompts_half(one, batch) for one in value)
    return value


class UnguidedCalls:
    """What stands around the UNet's ``forward``: gives its output for both halves where it was asked for one.

    Guidance then makes nothing of it, whatever its scale, in any pipeline: both its halves are equal.

    Attributes:
        halved: whether the call at hand is for the prompts' half alone.
    """

    def __init__(self) -> None:
        self.halved = False

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluates the UNet."""
        output = forward(*args, **kwargs)
        if not self.halved:
            return output
        both = torch.cat([output[0]] * 2)
        return (both, *output[1:]) if isinstance(output, tuple) else UNet2DConditionOutput(sample=both)
