"""OpenAI's request for edited pictures: a form with files, read into what a request for pictures is."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.request_fields import BY_NAME, TYPES, Kind
from hidiff_runtime.pipeline.request_values import read_picture
from hidiff_runtime.serving.http.alpha_masks import split_hole, white_where_transparent, without_transparency
from hidiff_runtime.serving.http.errors import ApiError, api_error, validation_error
from hidiff_runtime.serving.http.openai_fields import UNSUPPORTED, refuse_unsupported
from hidiff_runtime.serving.http.request_models import GenerationRequest
from hidiff_runtime.serving.service import Service

FORM_FIELDS, FORM_FILES = 40, 20
"""Parts that a form may have; OpenAI takes 16 images."""

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")

_READ: dict[Kind, TypeAdapter[Any]] = {
    kind: TypeAdapter(types[-1]) for kind, types in TYPES.items() if kind != "picture"
}


class EditRequest(GenerationRequest):
    """A form's content."""

    def given(self, service: Service) -> dict[str, object]:
        """Returns as a request for pictures has it, with a mask that is white where to paint.

        OpenAI's mask is transparent there; one without transparency is taken as it is. Where there is no mask, the
        image's own hole is one.
        """
        found = super().given(service)
        try:
            image = read_picture("image", found["image"], service.limits)
            if found.get("mask") is None:
                image, mask = split_hole(image, self.bucket(service))
            else:
                mask = white_where_transparent(read_picture("mask", found["mask"], service.limits))
                image = without_transparency(image)
        except InputError as error:
            raise api_error(error) from error
        return {**found, "image": image, "mask": mask}


async def read_form(request: Request) -> EditRequest:
    """The request that a form stands for; all of it is text but the pictures.

    Raises:
        ApiError: it is no form, a value is not what it has to be, a name comes twice, or there is no image.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in FORMS:
        told = "An edit must be a form: send multipart/form-data, or JSON with a data: URL to /v1/images/generations."
        raise ApiError(400, told, code="invalid_content_type")
    try:
        async with request.form(max_files=FORM_FILES, max_fields=FORM_FIELDS) as form:
            values = await _values(form)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        told = f"The form cannot be read ({error.detail.rstrip('.')}): send each field once, as multipart/form-data."
        raise ApiError(400, told, code="invalid_form") from error
    refuse_unsupported(values)
    if values.get("image") is None:
        told = "An edit needs an image: add a file by the name of image to the form."
        raise ApiError(400, told, code="missing_required_parameter", param="image")
    try:
        return EditRequest.model_validate(values, strict=False)
    except ValidationError as error:
        raise validation_error(error.errors()[0]) from error


async def _values(form: FormData) -> dict[str, object]:
    """The parts by name; an empty one but the prompt stands for left out, as forms have no null."""
    values: dict[str, object] = {}
    for key, value in form.multi_items():
        name = _name(key)
        if values.get(name) is not None and name not in UNSUPPORTED:
            told = "Give one of them."
            if name == "image":
                told = "OpenAI's edits take several; this server starts from one: send one image."
            raise ApiError(400, f"{name[:60]} is there twice. {told}", code="invalid_value", param=name[:60])
        content = await value.read() if isinstance(value, UploadFile) else _plain(name, value)
        empty = not value.filename and not content if isinstance(value, UploadFile) else not value
        values[name] = None if empty and name != "prompt" else content
    return values


def _name(key: str) -> str:
    """Returns a part's field: OpenAI's clients send lists' files as ``image[]``, parts of objects as ``svg[model]``."""
    name = key.partition("[")[0]
    return name if name in UNSUPPORTED else key.removesuffix("[]")


def _plain(name: str, text: str) -> object:
    """Returns a form's text as the field's kind; other names are read with the rest."""
    reader = _READ.get(BY_NAME[name].kind) if name in BY_NAME else None
    if reader is None or not text:
        return text
    try:
        return reader.validate_python(text)
    except ValidationError as error:
        raise validation_error({**error.errors()[0], "loc": (name,)}) from error
