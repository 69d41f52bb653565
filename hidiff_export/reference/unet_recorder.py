"""Observes a live UNet under HiDiffusion: what each call was given, the window shifts among it, and what it gave."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hidiff_export.errors import ParityError
from hidiff_export.families.geometry import WindowShape
from hidiff_export.modules.window_attention import WINDOW_ORDERS, TokenOrder, token_orders
from hidiff_runtime.reused_features import DEEP_FEATURES

Array = NDArray[Any]


@dataclass(frozen=True)
class RecordedEvaluation:
    """One call of the pipeline's UNet.

    Args:
        inputs: by graph input name, as the phase's graph takes them, but for the window shifts and a ControlNet's
            residuals.
        window_shifts: int32, one for each windowed block.
        noise_pred: what came out.
    """

    inputs: Mapping[str, Array]
    window_shifts: Array
    noise_pred: Array


@contextmanager
def recorded_evaluations(
    unet: nn.Module,
    windows: Sequence[tuple[WindowShape, ...]],
    started: Callable[[int], None],
    computed: Callable[[], bool] = lambda: True,
    features: Callable[[], torch.Tensor | None] = lambda: None,
) -> Iterator[list[RecordedEvaluation]]:
    """Yields the list to which each call of a UNet that is computed is added while the context lasts.

    Args:
        unet: diffusers' ``UNet2DConditionModel``, HiDiffusion in force on it.
        windows: how each call is expected to cut its windowed blocks.
        started: told the number of each call, from 0, when it begins.
        computed: whether the call at hand is, and not forecast.
        features: gives the deep features that the call at hand is about to take; None where it has all layers.

    Raises:
        ParityError: within a call, that its windows are others.
    """
    evaluations: list[RecordedEvaluation] = []
    taken: dict[str, torch.Tensor] = {}
    signature = inspect.signature(unet.forward)

    def before(_unet: nn.Module, _args: Any) -> None:
        taken.clear()
        if computed():
            deep = features()
            taken.update({} if deep is None else {DEEP_FEATURES: deep})
            started(len(evaluations))

    def after(_unet: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not computed():
            return
        call = signature.bind(*args, **kwargs).arguments
        tensors: dict[str, torch.Tensor] = {
            "latents": call["sample"],
            "timestep": torch.as_tensor(call["timestep"]).reshape(1),
            "prompt_embeds": call["encoder_hidden_states"],
            **(call.get("added_cond_kwargs") or {}),
            **taken,
        }
        inputs = {name: tensor.to(torch.float32).numpy().copy() for name, tensor in tensors.items()}
        orders: Sequence[TokenOrder] = (call.get("cross_attention_kwargs") or {}).get(WINDOW_ORDERS, ())
        shapes = windows[len(evaluations)]
        shifts = np.array([_shift(*pair) for pair in zip(orders, shapes, strict=True)], dtype=np.int32)
        # Without guidance the UNet is asked for the prompts alone, whose output stands for both halves.
        noise_pred = output[0][-len(call["sample"]) :].numpy().copy()
        evaluations.append(RecordedEvaluation(inputs, shifts, noise_pred))

    with ExitStack() as handles:
        handles.callback(unet.register_forward_pre_hook(before).remove)
        handles.callback(unet.register_forward_hook(after, with_kwargs=True).remove)
        yield evaluations


def _shift(order: TokenOrder, shape: WindowShape) -> int:
    """Returns which window shift gives this order of tokens."""
    known = _gathers(shape)
    same = (
        [] if order.gather.shape != known.shape[1:] else (known == order.gather).all(dim=1).nonzero().flatten().tolist()
    )
    if not same:
        raise ParityError(
            "HiDiffusion cut a feature map into other windows than the plan says.",
            given=f"expected {shape}, got {order.gather.numel()} tokens",
            advice="Report this: the phases of the run and of the plan differ.",
        )
    return int(same[0])


@cache
def _gathers(shape: WindowShape) -> torch.Tensor:
    return token_orders(shape).gather
