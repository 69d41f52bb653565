"""The body of OpenAI's request for pictures, and the runs that it comes to."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hidiff_runtime.errors import InputError
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.image_metadata import FORMAT_NAMES, FileFormat
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.pipeline.request_fields import BY_NAME, FIELDS, PICTURES, Kind
from hidiff_runtime.pipeline.request_fields import Field as RequestField
from hidiff_runtime.pipeline.request_values import RANDOM
from hidiff_runtime.sampling.torch_rng import SEED_MAX
from hidiff_runtime.serving.http.errors import ApiError, unknown_model, validation_error
from hidiff_runtime.serving.http.json_bodies import read_object
from hidiff_runtime.serving.http.openai_fields import UNSUPPORTED, refuse_unsupported
from hidiff_runtime.serving.service import Service

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_JSON_TYPES: dict[Kind, str]
_JSON_TYPES = {"text": "string", "whole": "integer", "number": "number", "flag": "boolean", "picture": "string"}


def _add_fields(schema: dict[str, Any]) -> None:
    """Adds every name of `FIELDS` to the JSON schema that clients read; what reads values is the service."""
    schema["properties"] |= {field.name: _field_schema(field) for field in FIELDS}
    schema["required"] = ["prompt"]


def _field_schema(field: RequestField) -> dict[str, Any]:
    told = field.help + ("; a data: URL in base64" if field.kind == "picture" else "")
    kind = _JSON_TYPES[field.kind]
    found: dict[str, Any] = {"type": kind if field.name == "prompt" else [kind, "null"], "description": told}
    if field.choices:
        found["enum"] = [*field.choices, None]
    bounds = zip(("minimum", "maximum"), field.bounds, strict=False)
    return found | {key: bound for key, bound in bounds if math.isfinite(bound)}


class GenerationRequest(BaseModel):
    """What OpenAI's images endpoint takes and a bundle can do; besides, every name of `FIELDS`.

    Null is as good as leaving out.
    """

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra=_add_fields)

    model: str | None = None
    n: int | None = Field(None, ge=1)
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    background: str | None = None
    quality: str | None = None
    moderation: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=1000)
    user: str | None = None
    safety_identifier: str | None = None

    @property
    def file_format(self) -> FileFormat:
        """How the pictures are sent. Raises ApiError for a PNG file that is to be compressed with losses."""
        name = next((each for each in FORMAT_NAMES if each == self.output_format), FORMAT_NAMES[0])
        quality = 100 if self.output_compression is None else self.output_compression
        if name == "png" and quality < 100:
            told = "output_compression is for jpeg and webp, a PNG file is whole: leave it out, or give output_format."
            raise ApiError(400, told, code="unsupported_value", param="output_compression")
        return FileFormat(name, quality)

    @property
    def has_pictures(self) -> bool:
        """Whether there are pictures to be decoded."""
        return any((self.model_extra or {}).get(name) is not None for name in PICTURES)

    def given(self, service: Service) -> dict[str, object]:  # noqa: ARG002 - what reads a form needs it
        """Returns what is not OpenAI's, but ours. Raises ApiError for a name that is neither."""
        found = {name: value for name, value in (self.model_extra or {}).items() if name not in UNSUPPORTED}
        for name in found:
            if name not in BY_NAME:
                told = f"There is no parameter {name[:30]!r} here. Beside OpenAI's there are {', '.join(BY_NAME)}."
                raise ApiError(400, told, code="unknown_parameter", param=name[:60])
        return {**found, **self._sides()}

    def bucket(self, service: Service) -> Manifest:
        """Returns what the bundle holds for the size that is asked for.

        Raises:
            ApiError: it has none of that size, or size is no size.
            InputError: it has none of that width and height.
        """
        bundle, sides = service.pipeline.bundle, self._sides()
        if sides:
            try:
                return bundle.sized(**sides).manifest
            except InputError as error:
                raise ApiError(400, f"{error.summary} {error.advice}", code="invalid_value", param="size") from error
        extra = self.model_extra or {}
        asked = {side: extra.get(side) for side in ("width", "height")}
        return bundle.sized(**{side: value for side, value in asked.items() if type(value) is int}).manifest

    def _sides(self) -> dict[str, int]:
        """Returns OpenAI's size as our width and height; neither where it leaves them to the bundle."""
        if self.size in (None, "auto"):
            return {}
        extra = self.model_extra or {}
        match = _SIZE.fullmatch(str(self.size))
        if match is None:
            told = "size must be WIDTHxHEIGHT in pixels, such as 1024x1024, or auto."
            raise ApiError(400, told, code="invalid_value", param="size")
        sides = dict(zip(("width", "height"), map(int, match.groups()), strict=True))
        if any(extra.get(side) not in (None, value) for side, value in sides.items()):
            told = "size and width or height say different things: give one of them."
            raise ApiError(400, told, code="invalid_value", param="size")
        return sides

    def runs(self, service: Service, name: str) -> Sequence[Request]:
        """Returns the runs, with seeds that follow each other; the first seed is drawn where none is given.

        Raises:
            ApiError: the model is another, or a parameter is not one there is.
            InputError: a value is not one this server takes.
        """
        if self.model not in (None, name):
            raise unknown_model(self.model, name)
        count = self._count(self.bucket(service), service.limits.pictures)
        given = self.given(service)
        if given.get("seed") is None:
            given["seed"] = RANDOM
        first = service.request(given)
        seed = first.settings.seed
        if seed + count - 1 > SEED_MAX:
            told = f"The seeds of {count} pictures follow each other, to at most 2**64 - 1: give a smaller seed."
            raise ApiError(400, told, code="invalid_value", param="seed")
        return [first.seeded(seed + number) for number in range(count)]

    def _count(self, manifest: Manifest, most: int) -> int:
        """Returns how many runs make ``n`` pictures."""
        batch = manifest.batch
        runs, rest = divmod(batch if self.n is None else self.n, batch)
        if rest:
            told = f"This bundle makes {batch} pictures a run: give a multiple of that as n."
            raise ApiError(400, told, code="invalid_value", param="n")
        if runs > most:
            told = f"This server makes up to {most * batch} pictures a request: give n up to that."
            raise ApiError(400, told, code="invalid_value", param="n")
        return runs


async def read_json(request: HttpRequest) -> GenerationRequest:
    """The request that a body of JSON stands for.

    Raises:
        ApiError: it is not JSON, no object, or a value is not what it has to be.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        told = (
            "The body must be JSON, with the header 'Content-Type: application/json': "
            "send that, or a form with an image to /v1/images/edits."
        )
        raise ApiError(400, told, code="invalid_content_type")
    values = await read_object(request)
    refuse_unsupported(values)
    try:
        return GenerationRequest.model_validate(values)
    except ValidationError as error:
        raise validation_error(error.errors()[0]) from error
