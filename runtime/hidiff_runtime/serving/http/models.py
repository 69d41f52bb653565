"""``/v1/models``: the one model there is, with what a page needs to know to ask it for pictures."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from hidiff_runtime.denoising.conditioning import takes_channels
from hidiff_runtime.format.left_out import LEFT_OUT, left_out
from hidiff_runtime.serving.http.errors import PlainJson, unknown_model
from hidiff_runtime.serving.http.service_loader import ServiceLoader
from hidiff_runtime.serving.service import Service


def model_name(service: Service) -> str:
    """Returns what clients call the model: the recipe's name."""
    manifest = service.pipeline.bundle.manifest
    return str(manifest.recipe.get("name") or manifest.family)


def models_router(host: ServiceLoader) -> APIRouter:
    """Returns the routes."""
    router = APIRouter(prefix="/v1/models")
    created = int(time.time())

    @router.get("/", include_in_schema=False, response_model=None)
    @router.get("", response_model=None)
    def every() -> PlainJson:
        """Answers with OpenAI's list."""
        return PlainJson({"object": "list", "data": [_card(host.worker.service, created)]})

    @router.get("/{name:path}", response_model=None)
    def one(name: str) -> PlainJson:
        """Returns one of the list."""
        card = _card(host.worker.service, created)
        if card["id"] != name:
            raise unknown_model(name, card["id"])
        return PlainJson(card)

    return router


def _texts(value: object) -> list[str]:
    """Returns the texts of a list out of a manifest's recipe, whose values nothing has checked."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _card(service: Service, created: int) -> dict[str, Any]:
    bundle, limits = service.pipeline.bundle, service.limits
    manifest = bundle.manifest
    details = {
        "width": manifest.width,
        "height": manifest.height,
        "sizes": [f"{bucket.width}x{bucket.height}" for bucket in manifest.whole.buckets],
        "batch": manifest.batch,
        "family": manifest.family,
        "task": manifest.task,
        "guidance": manifest.guidance,
        "guidance_rescale": manifest.guidance_rescale,
        **dict.fromkeys(LEFT_OUT),
        **left_out(manifest),
        "steps": [count for count in manifest.steps if count <= limits.steps],
        "samplers": sorted(manifest.samplers),
        "sampler": manifest.default_sampler,
        "needs_mask": takes_channels(manifest),
        "needs_control_image": manifest.controlnet is not None,
        "bundle": service.bundle_hash,
        "parity": service.parity_hash,
        "backend": bundle.backend,
        "precision": manifest.precision,
        "example_prompts": _texts(manifest.recipe.get("example_prompts")),
        "limits": vars(limits),
    }
    return {
        "id": model_name(service),
        "object": "model",
        "created": created,
        "owned_by": "hidiff-runtime",
        "hidiff": details,
    }
