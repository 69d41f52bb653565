"""Who may ask: those with a key, the server's own page, and whoever calls the server by its name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from http_server import GENERATIONS, LARGEST, PROMPT, Server, proven, refused, serving

from hidiff_runtime.serving.http.access_control import LOOPBACK, AccessRules, hashed

EDITS = "/v1/images/edits"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(proven(tmp_path_factory.mktemp("access") / "bundle")) as started:
        yield started


KEYED = AccessRules(keys=(hashed("first"), hashed("second")), hosts=None, largest=LARGEST)


@pytest.fixture(scope="module")
def keyed(server: Server) -> Iterator[Server]:
    with serving(server.folder, rules=KEYED) as started:
        yield started


@pytest.mark.parametrize(
    "headers",
    [{}, *({"authorization": text} for text in ("Bearer wrong", "Bearer ", "Bearer", "first", "Basic first"))],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", GENERATIONS, "/v1/images/edits", "/openapi.json"])
def test_refuses_without_a_key(keyed: Server, path: str, headers: dict[str, str]) -> None:
    refused(keyed.ask("POST" if "images" in path else "GET", path, b"", **headers), 401, "invalid_api_key")


@pytest.mark.parametrize("key", ["first", "second"])
def test_takes_either_key(keyed: Server, key: str) -> None:
    assert keyed.post({"prompt": PROMPT, "steps": 4}, authorization=f"Bearer {key}").status == 200
    assert keyed.get("/metrics", authorization=f"bearer {key}").status == 200


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready"])
def test_page_and_probes_need_no_key(keyed: Server, path: str) -> None:
    assert keyed.get(path).status == 200


def test_refuses_pages_of_other_sites(server: Server) -> None:
    body = {"prompt": PROMPT, "steps": 4}
    for site in ("cross-site", "same-site"):
        refused(server.post(body, sec_fetch_site=site), 403, "cross_site")
    assert server.post(body, sec_fetch_site="same-origin").status == 200
    assert server.get("/", sec_fetch_site="cross-site").status == 200


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "file://",
        "http://{host}.evil.example",
        "http://evil.example:{port}",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost:{port}",
        "ftp://{host}",
        "http://{host}@evil.example",
        "http://evil.example/{host}",
        "http://evil.example\xff",
    ],
)
def test_refuses_pages_of_other_sites_that_say_so_by_their_origin(server: Server, origin: str) -> None:
    given = origin.format(host=f"127.0.0.1:{server.port}", port=server.port)
    for path, body in ((GENERATIONS, b"{}"), (EDITS, b"prompt=a")):
        answer = server.ask("POST", path, body, content_type=FORM, origin=given)
        message = refused(answer, 403, "cross_site")
        assert repr(given) in message
        assert "--allow-host" in message
    with serving(server.folder, rules=KEYED) as keyed:
        for headers in ({}, {"authorization": "Bearer first"}):
            refused(keyed.post({"prompt": PROMPT, "steps": 4}, origin="http://evil.example", **headers), 403)


def test_takes_its_own_page_and_what_no_page_asks(server: Server) -> None:
    body, own = {"prompt": PROMPT, "steps": 4}, f"127.0.0.1:{server.port}"
    assert server.post(body, origin=f"http://{own}").status == 200
    assert server.post(body, origin=f"HTTP://{own}".upper()).status == 200
    assert server.post(body).status == 200
    for host, origin in (
        ("pictures.example", "https://pictures.example"),  # a proxy that passes its name on
        ("pictures.example:443", "https://pictures.example"),
        ("pictures.example:80", "http://pictures.example"),
        ("[::1]:8000", "http://[::1]:8000"),
    ):
        assert server.post(body, host=host, origin=origin).status == 200
    refused(server.post(body, host="pictures.example:443", origin="http://pictures.example"), 403, "cross_site")
    # A proxy that does not: the browser says that the page is the proxy's own.
    assert server.post(body, origin="https://pictures.example", sec_fetch_site="same-origin").status == 200
    assert server.get("/", origin="http://evil.example").status == 200


def test_takes_pages_of_sites_that_are_allowed(server: Server) -> None:
    rules = AccessRules(keys=(), hosts=None, largest=LARGEST, origins=("pictures.example", "::1"))
    body = {"prompt": PROMPT, "steps": 4}
    with serving(server.folder, rules=rules) as named:
        for origin in ("https://pictures.example", "http://Pictures.example:8080", "http://[::1]:3000"):
            for headers in ({}, {"sec_fetch_site": "cross-site"}):
                assert named.post(body, origin=origin, **headers).status == 200
        for origin in ("https://pictures.example.evil.example", "null", "app://pictures.example"):
            refused(named.post(body, origin=origin), 403, "cross_site")


def test_refuses_to_be_called_by_another_name(server: Server) -> None:
    rules = AccessRules(keys=(), hosts=(*LOOPBACK, "pictures.test"), largest=LARGEST)
    with serving(server.folder, rules=rules) as named:
        for name in ("127.0.0.1", f"localhost:{named.port}", "[::1]:80", "Pictures.test"):
            assert named.get("/v1/models", host=name).status == 200
        for name in ("evil.test", "127.0.0.1.evil.test", "[::2]"):
            refused(named.get("/v1/models", host=name), 403, "wrong_host")
