"""``hidiff-serve``: pictures over HTTP, as OpenAI's images endpoint."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hidiff_runtime.cli import EXIT_CODES
from hidiff_runtime.cli.shared_options import add_opening, named_value, opening
from hidiff_runtime.console.notices import NOTICES
from hidiff_runtime.console.printing import tell_error, write
from hidiff_runtime.errors import Cancelled, EngineError, HidiffError, InputError
from hidiff_runtime.serving.http.log_throttle import RepeatCounter
from hidiff_runtime.version import __version__

if TYPE_CHECKING:
    from hidiff_runtime.pipeline.request_values import Limits
    from hidiff_runtime.serving.http.access_control import AccessRules
    from hidiff_runtime.serving.http.connections import ConnectionLimits
    from hidiff_runtime.serving.http.request_bodies import BodyLimits
    from hidiff_runtime.serving.http.server import Server
    from hidiff_runtime.serving.service import Service

EXAMPLES = """examples:
  hidiff-serve bundle                                  # http://127.0.0.1:8000, with a page to try it
  hidiff-serve bundle --resident all --limit steps=60
  hidiff-serve bundle --host 0.0.0.0 --api-key-file keys.txt --queue 32 --timeout 120

  curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' \\
    -d '{"prompt": "a lighthouse at dusk", "seed": 1}' | jq -r '.data[0].b64_json' | base64 -d > lighthouse.png
"""


CONNECTIONS = 512
"""At once, unless the command says otherwise."""

OTHER_FILES = 32
"""That a server opens beside its connections: engines, weights, what forms send."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    NOTICES.setLevel(logging.INFO)
    repeats = RepeatCounter()
    for handler in logging.getLogger().handlers:
        handler.addFilter(repeats)
    try:
        return _serve(options)
    except HidiffError as error:
        tell_error(error)
        return error.exit_code
    finally:
        for handler in logging.getLogger().handlers:
            handler.removeFilter(repeats)
        for line in repeats.rest():
            write(f"{line}\n", sys.stderr)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    summary = "serve a bundle as OpenAI's images endpoint, with a page to try it"
    parser = argparse.ArgumentParser(
        "hidiff-serve", description=summary, epilog=f"{EXAMPLES}\n{EXIT_CODES}", formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"hidiff-serve {__version__}")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the bundle's folder")
    group = parser.add_argument_group("where it listens, and who may ask")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=_port, default=8000, help="(default: 8000; 0 takes a free one)")
    group.add_argument(
        "--api-key-file", metavar="FILE", type=Path, help="keys, one a line; requests must carry one as Bearer token"
    )
    group.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name that the server is called by, or that its page has behind a proxy: while it listens on this "
        "machine alone, other names are refused, and pages of other sites are in any case",
    )
    group = parser.add_argument_group("how much it takes on")
    group.add_argument("--queue", type=_positive, default=16, metavar="N", help="requests that may wait (default: 16)")
    group.add_argument(
        "--dynamic-batching",
        action="store_true",
        help="draw requests that wait together, where the bundle has a batch of their size for them",
    )
    group.add_argument(
        "--timeout", type=_positive, default=600, metavar="SECONDS", help="for a request, waiting too (default: 600)"
    )
    group.add_argument(
        "--grace", type=_positive, default=30, metavar="SECONDS", help="for what runs when told to stop (default: 30)"
    )
    group.add_argument(
        "--limit",
        metavar="NAME=VALUE",
        type=named_value,
        action="append",
        default=[],
        help="prompt_characters, image_bytes, image_pixels, steps or pictures of a request; may be given again",
    )
    _add_front(parser)
    add_opening(parser)
    return parser


def _add_front(parser: argparse.ArgumentParser) -> None:
    """Adds the bounds of what comes before a request is read."""
    group = parser.add_argument_group("what clients may cost before they ask for anything")
    told = "connections at once (default: half of the files this process may open, at most 512)"
    group.add_argument("--connections", type=_positive, metavar="N", help=told)
    for name, default, told in (
        ("head-timeout", 10, "for a request's head"),
        ("body-timeout", 60, "for a request's body"),
        ("idle-timeout", 5, "for a connection between two requests"),
        ("send-timeout", 60, "for a client that takes nothing of its answer"),
    ):
        group.add_argument(
            f"--{name}", type=_positive, default=default, metavar="SECONDS", help=f"{told} (default: {default})"
        )
    told = "for all bodies together, while they come and are read (default: four times the largest body)"
    group.add_argument("--body-memory", type=_positive, metavar="BYTES", help=told)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    try:
        from hidiff_runtime.serving.http.app import create_app
        from hidiff_runtime.serving.http.prometheus import Prometheus
        from hidiff_runtime.serving.http.server import Server
        from hidiff_runtime.serving.http.service_loader import ServiceLoader
    except ImportError as error:
        raise EngineError(
            "The server needs FastAPI, uvicorn and prometheus-client, which are not all installed.",
            given=error,
            advice="pip install 'hidiff-runtime[serve]'",
        ) from error
    from hidiff_runtime.heap_trim import trim_heap_after_large_bodies
    from hidiff_runtime.serving.metrics import MetricsRecorder
    from hidiff_runtime.serving.service import Service

    limits = _limits(options)
    rules = _rules(options, limits)
    bundle_options = opening(options)
    connections, bodies = _connection_limits(options), _body_limits(options, rules)
    listening = listen(options.host, options.port)
    prometheus = Prometheus()
    meter = MetricsRecorder(prometheus)
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    open_service = partial(Service.open, options.folder, limits=limits, meter=meter, **bundle_options)
    host = ServiceLoader(
        open_service,
        meter,
        waiting=options.queue,
        dynamic_batching=options.dynamic_batching,
        failed=failed,
        ready=_tell_ready,
    )
    app = create_app(host, meter, prometheus.registry, rules=rules, seconds=options.timeout, bodies=bodies)
    server = Server(app, listening, connections, options.grace)
    trim_heap_after_large_bodies()
    code = _run(server, listening)
    if failures:
        raise failures[0]
    if host.opening:  # what opens engines cannot be stopped, and Python does not end well beside it
        sys.stdout.flush()
        os._exit(code)
    return code


def _run(server: Server, listening: socket.socket) -> int:
    """Serves until a signal; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn stops at it, and raises it again in the end
    _tell_listening(listening)
    try:
        server.run()
    except KeyboardInterrupt:
        return Cancelled.exit_code
    return 0


def _limits(options: argparse.Namespace) -> Limits:
    from hidiff_runtime.pipeline.request_values import Limits

    names = [field.name for field in fields(Limits)]
    for name, _ in options.limit:
        if name not in names:
            raise InputError("There is no such limit.", given=name, advice=f"There are {', '.join(names)}.")
    return Limits(**dict(options.limit))


def _rules(options: argparse.Namespace, limits: Limits) -> AccessRules:
    """Returns who may ask, and how much may be sent: three pictures in base64, and the rest of a request."""
    from hidiff_runtime.serving.http.access_control import LOOPBACK, AccessRules, hashed

    keys = tuple(hashed(key) for key in _keys(options.api_key_file)) if options.api_key_file else ()
    own = options.host in LOOPBACK
    allowed = tuple(name.lower() for name in options.allow_host)
    hosts = (*LOOPBACK, *allowed) if own and not keys else None
    if not own and not keys:
        write("warning: without --api-key-file, everyone who reaches this address may ask for pictures\n", sys.stderr)
    return AccessRules(keys, hosts, largest=4 * limits.image_bytes + 2**20, origins=allowed)


def _connection_limits(options: argparse.Namespace) -> ConnectionLimits:
    """Returns how many connections there may be beside the files that are open, and how long they may take."""
    from hidiff_runtime.serving.http.connections import ConnectionLimits

    files = _open_files()
    most = options.connections or min(CONNECTIONS, files // 2)
    if most + OTHER_FILES > files:
        raise InputError(
            "This process may open too few files for so many connections.",
            given=f"{most} connections, {files} files (ulimit -n)",
            advice=f"Raise the limit on open files, or give --connections {max(1, files - OTHER_FILES)} or fewer.",
        )
    return ConnectionLimits(most, options.head_timeout, options.idle_timeout, options.send_timeout)


def _open_files() -> int:
    """Returns how many files and connections this process may have open."""
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return 2 * CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * CONNECTIONS if soft == resource.RLIM_INFINITY else soft


def _body_limits(options: argparse.Namespace, rules: AccessRules) -> BodyLimits:
    from hidiff_runtime.serving.http.request_bodies import BodyLimits

    together = options.body_memory or 4 * rules.largest
    if together < rules.largest:
        raise InputError(
            "The memory for all bodies is less than one may take.",
            given=f"--body-memory {together}, a body of up to {rules.largest} bytes",
            advice=f"Give {rules.largest} or more, or a smaller --limit image_bytes=BYTES: a body is four times that.",
        )
    return BodyLimits(options.body_timeout, together)


def _keys(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError("The keys cannot be read.", given=f"{path}: {told}", advice="Give one key a line.") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise InputError("There is no key in the file.", given=path, advice="Write one a line.")
    return keys


def listen(host: str, port: int) -> socket.socket:
    """Returns the socket that the server listens on. Raises InputError where it cannot."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            "The server cannot listen there.", given=f"{host}, port {port}: {error}", advice="Choose another port."
        ) from error
    # Connections inherit it. asyncio sets it on sockets of its own making alone, and without it the end of an answer
    # waits for the client to acknowledge its beginning: 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _tell_listening(listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    write(f"listening on http://{shown}:{port}, opening the bundle\n", sys.stdout)


def _tell_ready(service: Service) -> None:
    bundle = service.pipeline.bundle
    write(
        f"ready: bundle {service.bundle_hash[:12]}, parity {service.parity_hash[:12]}, {bundle.backend}\n", sys.stdout
    )
