"""What clients that mean no good cost `hidiff-serve`: memory, descriptors, log, and how long probes wait.

    export PYTHONPATH=.:runtime:runtime/tests
    python benchmarks/serving/hostile_clients.py --json hostile_clients.json
    python benchmarks/serving/hostile_clients.py --source ANOTHER_CHECKOUT

From the repository's folder. Each attack has a server of its own, of the tests' toy bundle, whose pictures cost next to
nothing: what is seen is the server's front. `--source` takes the served code from another checkout. While an attack
goes on, a probe asks ``/health/live`` every 0.1 s and waits up to 10 s, and the server's resident memory and
descriptors are looked at as often. Clients and server share the machine. Prints Markdown. Nothing here is asserted by
the test-suite.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from http_process import Process, started
from http_server import GENERATIONS, proven

ROOT = Path(__file__).parents[2]
MIB = 2**20
FEW = 256
"""Descriptors of the server that unfinished heads are sent to."""

MANY = 1024
"""Descriptors of the others."""

EVERY = 0.1
PATIENCE = 10.0


@dataclass
class Target(Process):
    """A server with who watches it."""

    waited: list[float] = field(default_factory=list)
    unanswered: int = 0
    most_memory: int = 0
    most_descriptors: int = 0

    def ask(self) -> None:
        """Asks once whether the server lives."""
        started_at = time.monotonic()
        try:
            assert self.probe(PATIENCE) == 200
        except (OSError, http.client.HTTPException):
            self.unanswered += 1
        self.waited.append(time.monotonic() - started_at)

    def look(self) -> None:
        """Looks once at what it costs."""
        self.most_memory = max(self.most_memory, self.memory())
        self.most_descriptors = max(self.most_descriptors, self.descriptors())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Asks and looks until the block ends."""
        ended = threading.Event()

        def repeat(work: Callable[[], None]) -> None:
            while not ended.wait(EVERY):
                work()

        threads = [threading.Thread(target=repeat, args=(each,)) for each in (self.ask, self.look)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()


@contextmanager
def served(source: Path, bundle: Path, work: Path, descriptors: int) -> Iterator[Target]:
    """A server of `bundle` that is ready."""
    with started(bundle, work, descriptors=descriptors, source=source / "runtime") as process:
        yield Target(**vars(process))


def heads(target: Target) -> None:
    """400 clients whose heads never end, and who come again when they are sent away; 20 s."""
    end = time.monotonic() + 20

    def client() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError), target.connect() as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
                while time.monotonic() < end:
                    time.sleep(1)
                    connection.sendall(b"X-More: to come\r\n")

    threads = [threading.Thread(target=client) for _ in range(400)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bodies(target: Target) -> None:
    """30 bodies of 59 MB, whose last byte never comes; 5 s after the last but one."""
    content = b"a" * MIB

    def client() -> None:
        with contextlib.suppress(OSError), target.begin(59 * MIB) as connection:
            for _ in range(58):
                connection.sendall(content)
            sent.release()
            gone.wait(60)

    sent, gone = threading.Semaphore(0), threading.Event()
    threads = [threading.Thread(target=client) for _ in range(30)]
    for thread in threads:
        thread.start()
    for _ in threads:
        sent.acquire(timeout=2)
    time.sleep(5)
    gone.set()
    for thread in threads:
        thread.join()


def _rounds(target: Target, path: str, kind: str, content: bytes) -> None:
    """Four rounds of 20 whole bodies at once."""

    def client() -> None:
        with contextlib.suppress(OSError), target.begin(len(content), path=path, kind=kind) as connection:
            connection.sendall(content)
            connection.recv(4096)

    for _ in range(4):
        threads = [threading.Thread(target=client) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def texts(target: Target) -> None:
    """Four rounds of 20 bodies of 30 MB at once, in JSON of an unknown name."""
    _rounds(target, GENERATIONS, "application/json", b'{"prompt": "a", "nothing": "' + b"a" * (30 * MIB) + b'"}')


def forms(target: Target) -> None:
    """The same as forms, with a file that is too large."""
    head = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    content = head + b"a" * (30 * MIB) + b"\r\n--cut--\r\n"
    _rounds(target, "/v1/images/edits", "multipart/form-data; boundary=cut", content)


def lists(target: Target) -> None:
    """60 MB of JSON: a list of empty lists."""
    content = b"[" + b"[]," * (20 * MIB - 1) + b"[]]"
    with contextlib.suppress(OSError), target.begin(len(content)) as connection:
        connection.sendall(content)
        connection.recv(4096)


def chunks(target: Target) -> None:
    """10 clients that each send half a megabyte in chunks of one byte."""
    content = b"1\r\na\r\n" * (MIB // 2)
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    def client() -> None:
        with contextlib.suppress(OSError), target.connect() as connection:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + content + b"0\r\n\r\n")
            connection.recv(4096)

    threads = [threading.Thread(target=client) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


ATTACKS: dict[str, tuple[Callable[[Target], None], int]] = {
    "unfinished heads": (heads, FEW),
    "unfinished bodies": (bodies, MANY),
    "rounds of JSON": (texts, MANY),
    "rounds of forms": (forms, MANY),
    "JSON of lists": (lists, MANY),
    "chunks of a byte": (chunks, MANY),
}


def attack(name: str, target: Target) -> dict[str, Any]:
    """What one attack costs, and what of it is left ten seconds after."""
    work, _ = ATTACKS[name]
    before, began = target.memory(), time.monotonic()
    with target.watched():
        work(target)
    took = time.monotonic() - began
    time.sleep(10)
    return {
        "attack": name,
        "seconds": took,
        "probes": len(target.waited),
        "unanswered": target.unanswered,
        "longest_probe_s": max(target.waited),
        "memory_before_mib": before,
        "memory_most_mib": target.most_memory,
        "memory_after_mib": target.memory(),
        "descriptors": target.most_descriptors,
        "log_bytes": target.log.stat().st_size,
    }


def stop(target: Target, signals: list[signal.Signals], *, drawing: bool) -> dict[str, Any]:
    """How a server ends: with half a body on the way, or with 14 requests of which one is drawn and the others wait."""
    connections = []
    if drawing:
        target.hold.touch()
    body = json.dumps({"prompt": "a"}).encode()
    for _ in range(14 if drawing else 1):
        connections.append(target.begin(len(body), body) if drawing else target.begin(1000, b'{"prompt": '))
    time.sleep(1)
    began = time.monotonic()
    for number in signals:
        target.signal(number)
        time.sleep(1)
    target.hold.unlink(missing_ok=True)
    code = target.end()
    took = time.monotonic() - began
    for connection in connections:
        connection.close()
    return {
        "signals": [each.name for each in signals],
        "drawing": drawing,
        "seconds": took,
        "code": code,
        "tracebacks": target.said().count("Traceback"),
    }


def _tell_attack(row: dict[str, Any]) -> None:
    memory = " / ".join(str(row[f"memory_{when}_mib"]) for when in ("before", "most", "after"))
    answered = f"{row['probes'] - row['unanswered']} of {row['probes']}"
    print(
        f"| {row['attack']} | {answered} | {row['longest_probe_s']:.2f} | {memory} "
        f"| {row['descriptors']} | {row['log_bytes']} |",
        flush=True,
    )


def _tell_stop(row: dict[str, Any]) -> None:
    meanwhile = "14 requests, one being drawn" if row["drawing"] else "half a body on the way"
    print(
        f"| {', '.join(row['signals'])} | {meanwhile} | {row['seconds']:.1f} | {row['code']} | {row['tracebacks']} |",
        flush=True,
    )


def _machine() -> dict[str, str]:
    return {
        "machine": f"{os.cpu_count()} processors, {platform.platform()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("uvicorn", "h11", "starlette", "fastapi", "python-multipart")},
    }


def measure(source: Path, folder: Path) -> dict[str, Any]:
    """All attacks and all ends, printed as they are done."""
    bundle = proven(folder / "bundle")
    found: dict[str, Any] = {**_machine(), "attacks": [], "ends": []}
    print("| attack | probes answered | longest, s | memory before / most / after, MiB | descriptors | log, bytes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name, (_, descriptors) in ATTACKS.items():
        with served(source, bundle, folder, descriptors) as target:
            found["attacks"].append(attack(name, target))
        _tell_attack(found["attacks"][-1])
    print("\n| signals | meanwhile | ends after, s | exit code | tracebacks |\n| --- | --- | ---: | ---: | ---: |")
    ends = (([signal.SIGTERM], False), ([signal.SIGINT, signal.SIGINT], True))
    for signals, drawing in ends:
        with served(source, bundle, folder, FEW) as target:
            found["ends"].append(stop(target, list(signals), drawing=drawing))
        _tell_stop(found["ends"][-1])
    return found


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, default=ROOT, help="a checkout to take the served code from")
    parser.add_argument("--json", type=Path, help="file to write what was found to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.source.resolve(), Path(folder))
    print(f"\n{', '.join(f'{name} {value}' for name, value in found.items() if isinstance(value, str))}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
