"""OpenAI's request for edited pictures: a form with files, read into what a request for pictures is."""

from __future__ import annotations

import io
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile

from hidiff_runtime.pictures.images import decode_picture
from hidiff_runtime.serving.fields import BY_NAME, Kind
from hidiff_runtime.serving.http.errors import ApiError, validation_error
from hidiff_runtime.serving.http.generation import Generation
from hidiff_runtime.serving.limits import Limits

_READ: dict[Kind, TypeAdapter[Any]] = {
    "text": TypeAdapter(str),
    "whole": TypeAdapter(int),
    "number": TypeAdapter(float),
    "flag": TypeAdapter(bool),
}


class Edit(Generation):
    """A form's content."""

    def given(self, limits: Limits) -> dict[str, object]:
        """As a request for pictures has it, with a mask that is white where to paint.

        OpenAI's mask is transparent there; one without transparency is taken as it is.
        """
        found = super().given(limits)
        mask = found.get("mask")
        if isinstance(mask, bytes):
            found["mask"] = _white_where_transparent(mask, limits)
        return found


async def read_form(form: FormData) -> Edit:
    """The request that a form stands for; all of it is text but the pictures.

    Raises:
        ApiError: a value is not what it has to be, a name comes twice, or there is no image.
    """
    values: dict[str, object] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")  # as OpenAI's clients name a list's files
        if name in values:
            raise ApiError(400, f"{name[:60]} may be given once.", code="invalid_value", param=name[:60])
        values[name] = await value.read() if isinstance(value, UploadFile) else _plain(name, value)
    if "image" not in values:
        raise ApiError(400, "An edit needs an image.", code="missing_required_parameter", param="image")
    try:
        return Edit.model_validate(values, strict=False)
    except ValidationError as error:
        raise validation_error(error.errors()[0]) from error


def _plain(name: str, text: str) -> object:
    """A form's text as the field's kind; other names are read with the rest."""
    reader = _READ.get(BY_NAME[name].kind) if name in BY_NAME else None
    if reader is None:
        return text
    try:
        return reader.validate_python(text)
    except ValidationError as error:
        raise validation_error({**error.errors()[0], "loc": (name,)}) from error


def _white_where_transparent(mask: bytes, limits: Limits) -> bytes:
    picture = decode_picture(mask, "mask", pixels=limits.image_pixels)
    if not picture.has_transparency_data:
        return mask
    alpha = picture.convert("RGBA").getchannel("A")
    content = io.BytesIO()
    alpha.point(lambda value: 255 - value).save(content, "PNG")
    return content.getvalue()
