"""What is refused before a body is read: without the key, from another site's page, or too large."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hidiff_runtime.serving.http.errors import KEY, ApiError
from hidiff_runtime.serving.http.request_bodies import too_large

OPEN = ("/", "/health/live", "/health/ready")
"""Paths that need no key: the page, which asks for it, and what probes look at."""

_SHOWN = 60
"""Characters of a site that an error shows."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class AccessRules:
    """What the guard lets through.

    Args:
        keys: SHA-256 of every key; none where everyone may ask.
        hosts: names by which the server may be called, None for any. Without it, another site's page could give its
            own name the address 127.0.0.1, and be the same site to a browser.
        largest: bytes of a body.
        origins: names of sites whose pages may ask, besides the server's own: those of a proxy that does not pass its
            own name on.
    """

    keys: tuple[bytes, ...]
    hosts: tuple[str, ...] | None
    largest: int
    origins: tuple[str, ...] = ()


def hashed(key: str) -> bytes:
    """Returns a key as `AccessRules` takes it: of one length, so that comparing tells nothing."""
    return hashlib.sha256(key.encode()).digest()


class AccessControl:
    """ASGI middleware around the application, which lets through what the rules do."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or calls the application."""
        error = self._refused(scope) if scope["type"] == "http" else None
        await (self._app if error is None else error.response())(scope, receive, send)

    def _refused(self, scope: Scope) -> ApiError | None:
        path, method, headers = scope["path"], scope["method"], Headers(scope=scope)
        if self._rules.hosts is not None and _name(headers.get("host", "")) not in self._rules.hosts:
            return ApiError(403, "This server is not called by that name.", code="wrong_host")
        site = None if method in ("GET", "HEAD") else _other_site(headers, self._rules.origins)
        if site is not None:
            told = (
                f"Pages of other sites may not ask this server: this one is of {site!r}. "
                "Open the server's own address, or start it with --allow-host and the page's name."
            )
            return ApiError(403, told, code="cross_site")
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
    """Returns a Host header without its port."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def _other_site(headers: Headers, allowed: Sequence[str]) -> str | None:
    """Returns the site of the page that asks; None where it is the server's own, is allowed, or no page asks.

    Browsers let no page set these headers. Sec-Fetch-Site says it all, but browsers send it neither to plain http
    beyond this machine nor if they are old, and then an Origin with every POST.
    """
    origins = headers.getlist("origin")
    if origins and all(_names(origin, allowed) for origin in origins):
        return None
    site = headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin"):
        return (origins or [f"another ({site})"])[0][:_SHOWN]
    if site == "same-origin":  # also where a proxy calls the server by another name
        return None
    host = headers.get("host", "").lower()
    return next((origin[:_SHOWN] for origin in origins if not _is_own(origin, host)), None)


def _is_own(origin: str, host: str) -> bool:
    """Returns whether an Origin is what the Host header says; a port that is the scheme's own may be left out."""
    scheme, _, name = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return port is not None and name != "" and name.removesuffix(port) == host.removesuffix(port)


def _names(origin: str, allowed: Sequence[str]) -> bool:
    """Returns whether an Origin is a site of one of these names, at any port."""
    scheme, _, name = origin.lower().partition("://")
    return scheme in ("http", "https") and _name(name) in allowed
