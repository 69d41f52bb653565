"""What is refused before a body is read: without the key, from another site's page, or too large."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hidiff_runtime.serving.http.bodies import too_large
from hidiff_runtime.serving.http.errors import KEY, ApiError

OPEN = ("/", "/health/live", "/health/ready")
"""Paths that need no key: the page, which asks for it, and what probes look at."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Rules:
    """What the guard lets through.

    Args:
        keys: SHA-256 of every key; none where everyone may ask.
        hosts: names by which the server may be called, None for any. Without it, another site's page could give its
            own name the address 127.0.0.1, and be the same site to a browser.
        largest: bytes of a body.
    """

    keys: tuple[bytes, ...]
    hosts: tuple[str, ...] | None
    largest: int


def hashed(key: str) -> bytes:
    """A key as `Rules` takes it: of one length, so that comparing tells nothing."""
    return hashlib.sha256(key.encode()).digest()


class Guard:
    """ASGI middleware around the application.

    Args:
        app: the application.
        rules: what it lets through.
    """

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or calls the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._refused(scope["path"], scope["method"], Headers(scope=scope))
        if error is not None:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refused(self, path: str, method: str, headers: Headers) -> ApiError | None:
        if self._rules.hosts is not None and _name(headers.get("host", "")) not in self._rules.hosts:
            return ApiError(403, "This server is not called by that name.", code="wrong_host")
        if method not in ("GET", "HEAD") and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return ApiError(403, "Pages of other sites may not ask this server.", code="cross_site")
        if path not in OPEN and not _has_key(headers.get("authorization", ""), self._rules.keys):
            challenge = {"WWW-Authenticate": "Bearer"}
            return ApiError(
                401, "A key is needed, or this one is wrong.", kind=KEY, code="invalid_api_key", headers=challenge
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._rules.largest:
            return too_large(self._rules.largest)
        return None


def _has_key(authorization: str, keys: Sequence[bytes]) -> bool:
    """Compares with every key, in a time that does not depend on which one is right."""
    scheme, _, key = authorization.partition(" ")
    given = hashed(key.strip() if scheme.lower() == "bearer" else "")
    right = [hmac.compare_digest(given, known) for known in keys]
    return any(right) or not keys


def _name(host: str) -> str:
    """A Host header without its port."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]
