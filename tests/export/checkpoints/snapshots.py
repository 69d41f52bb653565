"""Everything about a module tree that a patch could leave changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def snapshot(root: nn.Module) -> dict[str, Any]:
    """For each module its class and attributes; for each table of hooks or tensors its keys and the objects in it.

    Equal snapshots mean the same classes, attributes, hooks, children, parameters and buffers, by identity.
    """
    return {name: (type(module), _attributes(module)) for name, module in root.named_modules()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: _identity(value) for key, value in vars(module).items()}


def _identity(value: Any) -> Any:
    if isinstance(value, Mapping):
        return (id(value), [(key, id(entry)) for key, entry in value.items()])
    if isinstance(value, bool | int | float | str | tuple):
        return value
    return id(value)
