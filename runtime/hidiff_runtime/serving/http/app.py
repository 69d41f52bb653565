"""The application: its routes, what guards them, and when the bundle opens and closes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from hidiff_runtime.serving.http.access_control import AccessControl, AccessRules
from hidiff_runtime.serving.http.errors import add_handlers
from hidiff_runtime.serving.http.images import images_router
from hidiff_runtime.serving.http.models import models_router
from hidiff_runtime.serving.http.page import read_page
from hidiff_runtime.serving.http.request_bodies import Bodies, BodyLimits
from hidiff_runtime.serving.http.service_loader import ServiceLoader
from hidiff_runtime.serving.http.unanswered import UnansweredRequests
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.version import __version__


def create_app(
    host: ServiceLoader,
    meter: MetricsRecorder,
    registry: CollectorRegistry,
    *,
    rules: AccessRules,
    seconds: float,
    bodies: BodyLimits | None = None,
) -> FastAPI:
    """Returns the application; starting it opens the host's service, ending it closes that.

    Args:
        host: of the service.
        meter: told of bodies that are refused.
        registry: what ``/metrics`` shows.
        rules: what is refused before a body is read.
        seconds: that a request may take.
        bodies: what bodies may cost.
    """

    @asynccontextmanager
    async def living(_app: FastAPI) -> AsyncIterator[None]:
        host.start()
        yield
        await to_thread.run_sync(host.close)

    app = FastAPI(title="hidiff-serve", version=__version__, lifespan=living, docs_url=None, redoc_url=None)
    add_handlers(app, meter)
    app.add_middleware(Bodies, largest=rules.largest, limits=bodies or BodyLimits(), meter=meter)
    app.add_middleware(AccessControl, rules=rules)
    app.add_middleware(UnansweredRequests)  # the last one added is asked first
    app.include_router(images_router(host, seconds))
    app.include_router(models_router(host))
    page, page_headers = read_page()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return Response(page, media_type="text/html", headers=page_headers)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        """Whether pictures can be asked for."""
        worker = host.worker
        worker.check_ready()
        return {"status": "ready", "bundle": worker.service.bundle_hash}

    @app.get("/metrics")
    def metrics() -> Response:
        """Answers Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app
