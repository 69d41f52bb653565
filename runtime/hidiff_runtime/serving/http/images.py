"""``/v1/images``: pictures from prompts, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hidiff_runtime.serving.http.edits import read_form
from hidiff_runtime.serving.http.errors import api_error, log_fault
from hidiff_runtime.serving.http.generation import Generation
from hidiff_runtime.serving.http.host import Host
from hidiff_runtime.serving.http.models import model_name
from hidiff_runtime.serving.http.stream import EventStream, comment, event, while_connected
from hidiff_runtime.serving.http.worker import Event, Picture, Step
from hidiff_runtime.serving.service import Service

FORM_FIELDS, FORM_FILES = 40, 3
"""Parts that a form may have."""

_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Nothing is billed by tokens, but some clients want to read of them."""


def images_router(host: Host, seconds: float) -> APIRouter:
    """The routes.

    Args:
        host: of the service.
        seconds: that a request may take, waiting included.
    """
    router = APIRouter(prefix="/v1/images")

    @router.post("/generations", response_model=None)
    async def generate(request: Request, body: Generation) -> Response:
        """Pictures from a prompt, and from pictures as ``data:`` URLs."""
        return await _answer(request, body, host, seconds, "image_generation")

    @router.post("/edits", response_model=None)
    async def edit(request: Request) -> Response:
        """Pictures from a form with an image, and with a mask where a part of it alone is to change."""
        async with request.form(max_files=FORM_FILES, max_fields=FORM_FIELDS) as form:
            body = await read_form(form)
        return await _answer(request, body, host, seconds, "image_edit")

    return router


async def _answer(request: Request, body: Generation, host: Host, seconds: float, name: str) -> Response:
    worker = host.worker
    job = await worker.submit(
        partial(body.runs, name=model_name(worker.service)),
        previews=(body.partial_images or 0) if body.stream else 0,
        deadline=time.monotonic() + seconds,
    )
    about = _about(worker.service)
    if body.stream:
        return EventStream(_lines(job.events(), name, about), job.end)
    try:
        pictures = await while_connected(request, _pictures(job.events()))
    finally:
        job.end()
    data = [{"b64_json": picture.png, "parameters": picture.parameters} for picture in pictures]
    return JSONResponse({"created": int(time.time()), **about, "data": data})


def _about(service: Service) -> dict[str, Any]:
    """What all pictures of the bundle have in common, as OpenAI tells it."""
    manifest = service.pipeline.bundle.manifest
    return {"background": "opaque", "output_format": "png", "size": f"{manifest.width}x{manifest.height}"}


async def _pictures(events: AsyncGenerator[Event, None]) -> list[Picture]:
    return [news async for news in events if isinstance(news, Picture)]


async def _lines(events: AsyncGenerator[Event, None], name: str, about: dict[str, Any]) -> AsyncGenerator[str, None]:
    """The events as OpenAI's clients read them, with steps as comments between them."""
    previews = 0
    yield comment("accepted")
    try:
        async for news in events:
            told = {"created_at": int(time.time()), "quality": "auto", **about}
            if isinstance(news, Picture):
                done = {"b64_json": news.png, "parameters": news.parameters, "usage": _USAGE}
                yield event(f"{name}.completed", {**told, **done})
            elif isinstance(news, Step):
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
