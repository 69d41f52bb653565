"""The body of OpenAI's request for pictures, and the runs that it comes to."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hidiff_runtime.manifest import Manifest
from hidiff_runtime.request import Request
from hidiff_runtime.rng import TorchGenerator
from hidiff_runtime.serving.fields import BY_NAME
from hidiff_runtime.serving.http.errors import ApiError
from hidiff_runtime.serving.limits import Limits
from hidiff_runtime.serving.service import Service

SEEDS = 2**32
"""Seeds that are drawn where none is given are below this; a page's JavaScript holds them exactly."""


class Generation(BaseModel):
    """What OpenAI's images endpoint takes and a bundle can do; besides, every name of `FIELDS`.

    Null is as good as leaving out.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    n: int | None = Field(None, ge=1)
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=1000)
    user: str | None = None
    safety_identifier: str | None = None

    def given(self, limits: Limits) -> dict[str, object]:  # noqa: ARG002 - what reads a form needs them
        """What is not OpenAI's, but ours. Raises ApiError for a name that is neither."""
        found = dict(self.model_extra or {})
        for name in found:
            if name not in BY_NAME:
                told = f"There is no parameter {name[:30]!r} here. Beside OpenAI's there are {', '.join(BY_NAME)}."
                raise ApiError(400, told, code="unknown_parameter", param=name[:60])
        return found

    def runs(self, service: Service, name: str) -> Sequence[Request]:
        """The runs, with seeds that follow each other; the first seed is drawn where none is given.

        Args:
            service: whose bundle makes the pictures.
            name: of the model.

        Raises:
            ApiError: the model is another, or a parameter is not one there is.
            InputError: a value is not one this server takes.
        """
        if self.model not in (None, name):
            raise ApiError(404, f"There is no model {self.model[:60]!r} here.", code="model_not_found", param="model")
        manifest = service.pipeline.bundle.manifest
        size = f"{manifest.width}x{manifest.height}"
        if self.size not in (None, "auto", size):
            raise ApiError(400, f"This bundle makes pictures of {size} alone.", code="invalid_value", param="size")
        count = self._count(manifest, service.limits.pictures)
        given = self.given(service.limits)
        if given.get("seed") is None:
            given["seed"] = secrets.randbelow(SEEDS)
        first = service.request(given)
        seed = first.settings.seed
        TorchGenerator(seed + count - 1)  # refuses one beyond the last there is
        return [replace(first, settings=replace(first.settings, seed=seed + number)) for number in range(count)]

    def _count(self, manifest: Manifest, most: int) -> int:
        """How many runs make ``n`` pictures."""
        batch = manifest.batch
        runs, rest = divmod(batch if self.n is None else self.n, batch)
        if rest:
            raise ApiError(400, f"This bundle makes {batch} pictures a run: n must be a multiple.", param="n")
        if runs > most:
            raise ApiError(400, f"This server makes up to {most * batch} pictures a request.", param="n")
        return runs
