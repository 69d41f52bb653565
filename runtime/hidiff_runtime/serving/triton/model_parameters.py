"""The parameters in ``config.pbtxt`` by which a repository tells a model what to serve; all are texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.request_values import Limits

STREAM = "stream"
"""Of the front: which model it asks."""

AT_ONCE = "at_once"
"""Of the front: how many requests it has at that model at a time; one where it is left out."""

AGAIN = "Write the model repository again."


@dataclass(frozen=True)
class Parameters:
    """What the stream model serves.

    Args:
        bundle: its folder: absolute, or relative to the model's version folder.
        bundle_hash: the manifest's digest when the repository was written; another bundle is refused.
        limits: of each request.
        options: those of :func:`hidiff_runtime.open`.
        allow_links: another one of them: folders on the server that links in the bundle may lead into.
        dynamic_batching: whether waiting requests of one row each are drawn together, where the bundle has a batch for
            them and they are alike in all that a run has once.
    """

    bundle: str
    bundle_hash: str
    limits: Limits = field(default_factory=Limits)
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    allow_links: tuple[str, ...] = ()
    dynamic_batching: bool = False

    def to_config(self) -> dict[str, str]:
        """Returns the values by their names in ``config.pbtxt``."""
        limits = {f"max_{name}": str(value) for name, value in asdict(self.limits).items()}
        options = json.dumps(dict(self.options), sort_keys=True)
        links = {"allow_links": json.dumps(self.allow_links)} if self.allow_links else {}
        batching = {"dynamic_batching": "true"} if self.dynamic_batching else {}
        return {
            "bundle": self.bundle,
            "bundle_hash": self.bundle_hash,
            "options": options,
            **links,
            **batching,
            **limits,
        }

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Parameters:
        """Returns those of a model's configuration as Triton gives it. Limits may be left out.

        Raises:
            InputError: one is missing or not what it must be.
        """
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        missing = [name for name in ("bundle", "bundle_hash") if not given.get(name)]
        if missing:
            raise InputError(f"config.pbtxt has no parameter {missing[0]}.", advice=AGAIN)
        limits = {
            item.name: _whole(f"max_{item.name}", given[f"max_{item.name}"])
            for item in fields(Limits)
            if f"max_{item.name}" in given
        }
        options, links = _options(given.get("options", "{}")), _links(given.get("allow_links", "[]"))
        batching = _flag("dynamic_batching", given.get("dynamic_batching", "false"))
        return cls(given["bundle"], given["bundle_hash"], Limits(**limits), options, links, batching)


def at_once(config: Mapping[str, Any]) -> int:
    """Returns the front's `AT_ONCE`, from 1. Raises InputError where it is no such number."""
    found = config.get("parameters", {}).get(AT_ONCE)
    return 1 if found is None else max(1, _whole(AT_ONCE, found["string_value"]))


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise InputError(
            f"The parameter {name} must be true or false.", given=text, advice="Change it in config.pbtxt."
        )
    return text == "true"


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(
            f"The parameter {name} must be a whole number.", given=text, advice="Change it in config.pbtxt."
        )
    return int(text)


def _options(text: str) -> dict[str, str | int | bool]:
    found = _json("options", text)
    if not isinstance(found, dict) or not all(isinstance(value, (str, int)) for value in found.values()):
        raise InputError("The parameter options must be a JSON object of plain values.", given=text[:200], advice=AGAIN)
    return found


def _links(text: str) -> tuple[str, ...]:
    found = _json("allow_links", text)
    if not isinstance(found, list) or not all(isinstance(value, str) for value in found):
        raise InputError("The parameter allow_links must be a JSON array of paths.", given=text[:200], advice=AGAIN)
    return tuple(found)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"The parameter {name} is not JSON.", given=text[:200], advice=AGAIN) from error
