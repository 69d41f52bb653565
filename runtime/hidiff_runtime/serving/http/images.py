"""``/v1/images``: pictures from prompts, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hidiff_runtime.serving.http.edit_models import read_form
from hidiff_runtime.serving.http.errors import ApiError, PlainJson, api_error, log_fault
from hidiff_runtime.serving.http.models import model_name
from hidiff_runtime.serving.http.queued_job import Event, ImageEvent, StepEvent
from hidiff_runtime.serving.http.request_bodies import release_body
from hidiff_runtime.serving.http.request_models import GenerationRequest, read_json
from hidiff_runtime.serving.http.service_loader import ServiceLoader
from hidiff_runtime.serving.http.sse import EventStream, comment, event, while_connected

VARIATIONS = (
    "There are no variations here, and OpenAI has retired its own: "
    "send the image to /v1/images/edits, with a prompt and a strength."
)

_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Nothing is billed by tokens, but some clients want to read of them."""

_SCHEMA = {"content": {"application/json": {"schema": GenerationRequest.model_json_schema()}}, "required": True}
"""Of a request in JSON, for ``/openapi.json``."""


def images_router(host: ServiceLoader, seconds: float) -> APIRouter:
    """Returns the routes.

    Args:
        host: of the service.
        seconds: that a request may take, waiting included.
    """
    router = APIRouter(prefix="/v1/images")

    @router.post("/generations", response_model=None, openapi_extra={"requestBody": _SCHEMA})
    async def generate(request: Request) -> Response:
        """Pictures from a prompt, and from pictures as ``data:`` URLs."""
        _refuse_query(request)
        return await _answer(request, await read_json(request), host, seconds, "image_generation")

    @router.post("/edits", response_model=None)
    async def edit(request: Request) -> Response:
        """Pictures from a form with an image, and with a mask where a part of it alone is to change."""
        _refuse_query(request)
        return await _answer(request, await read_form(request), host, seconds, "image_edit")

    @router.post("/variations", include_in_schema=False)
    async def vary() -> None:
        """Says where to go instead."""
        raise ApiError(404, VARIATIONS, code="not_found")

    return router


async def _answer(
    request: Request, body: GenerationRequest, host: ServiceLoader, seconds: float, name: str
) -> Response:
    worker, file_format = host.worker, body.file_format
    streams = bool(body.stream)
    job = await worker.submit(
        partial(body.runs, name=model_name(worker.service)),
        pictures=body.has_pictures,
        previews=(body.partial_images or 0) if streams else 0,
        deadline=time.monotonic() + seconds,
        encode=file_format.encode,
    )
    del body  # which holds the pictures' files
    # What all pictures of a request have in common, as OpenAI tells it.
    about = {"background": "opaque", "output_format": file_format.name, "size": f"{job.size[0]}x{job.size[1]}"}
    release_body(request.scope)
    if streams:
        return EventStream(_lines(job.events(), name, about), job.end)
    try:
        pictures = await while_connected(request, _pictures(job.events()))
    finally:
        job.end()
    data = [_told(picture) for picture in pictures]
    return PlainJson({"created": int(time.time()), **about, "data": data})


def _refuse_query(request: Request) -> None:
    """Refuses parameters where nobody reads them."""
    for name in request.query_params:
        told = f"{name[:30]!r} stands behind the address: send it in the body, where parameters are."
        raise ApiError(400, told, code="unknown_parameter", param=name[:60])


def _told(picture: ImageEvent) -> dict[str, Any]:
    """Returns a picture, and what it was made with."""
    return {"b64_json": picture.file, "seed": picture.parameters["seed"], "parameters": picture.parameters}


async def _pictures(events: AsyncGenerator[Event, None]) -> list[ImageEvent]:
    return [news async for news in events if isinstance(news, ImageEvent)]


async def _lines(events: AsyncGenerator[Event, None], name: str, about: dict[str, Any]) -> AsyncGenerator[str, None]:
    """The events as OpenAI's clients read them, with steps as comments between them."""
    previews = 0
    yield comment("accepted")
    try:
        async for news in events:
            told = {"created_at": int(time.time()), "quality": "auto", **about}
            if isinstance(news, ImageEvent):
                yield event(f"{name}.completed", {**told, **_told(news), "usage": _USAGE})
            elif isinstance(news, StepEvent):
                yield comment("progress", news.progress)
                if news.preview is not None:
                    shown = {"b64_json": news.preview, "partial_image_index": previews, **news.progress}
                    yield event(f"{name}.partial_image", {**told, **shown})
                    previews += 1
            else:
                yield comment("waiting")
    except Exception as error:
        log_fault(error)
        yield event("error", api_error(error).body)
