"""The inputs of a phase's graph, by the names of diffusers' ``UNet2DConditionModel``; no library is needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def stock_arguments(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keyword arguments; window shifts, which the UNet as published does not take, are left out."""
    given = {
        "sample": inputs["latents"],
        "timestep": inputs["timestep"],
        "encoder_hidden_states": inputs["prompt_embeds"],
    }
    if "text_embeds" in inputs:
        given["added_cond_kwargs"] = {name: inputs[name] for name in ("text_embeds", "time_ids")}
    return given
