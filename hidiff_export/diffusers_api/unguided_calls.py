"""Calls of a pipeline's UNet that are not guided: the prompts' half of the batch is evaluated, and stands for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

WITHOUT = "Apply HiDiffusion without {}, or give BundleUNet full_run=True."
"""What to do in a pipeline that cannot do with less work."""


def has_both_halves(pipe: Any, latents: torch.Tensor) -> bool:
    """Returns whether the pipeline guides what its UNet gives for these latents: the prompts are their second half."""
    return bool(getattr(pipe, "do_classifier_free_guidance", False)) and len(latents) % 2 == 0


def control_of_prompts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments, by name, that a ControlNet is evaluated with for the prompts alone, of those for both.

    In guess mode the pipeline asks for the prompts alone by itself, and puts zeros before what it gets.
    """
    if arguments.get("guess_mode"):
        return dict(arguments)
    batch = len(arguments["sample"])
    return {name: prompts_half(value, batch) for name, value in arguments.items()}


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
