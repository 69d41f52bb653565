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
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from http_server import GENERATIONS, proven

ROOT = Path(__file__).parents[2]
MIB = 2**20
FEW = 256
"""Descriptors of the server that unfinished heads are sent to."""

EVERY = 0.1
PATIENCE = 10.0


@dataclass
class Target:
    """A server in a process of its own, with who watches it.

    Args:
        process: the server's.
        port: that it listens on.
        log: the file of all that it writes.
        hold: while this file exists, no step ends.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    hold: Path
    waited: list[float] = field(default_factory=list)
    unanswered: int = 0
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def resident(self) -> int:
        """MiB of resident memory now."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) // 1024

    def probe(self) -> None:
        """Asks once whether the server lives."""
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", "/health/live")
            assert connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            self.unanswered += 1
        finally:
            connection.close()
        self.waited.append(time.monotonic() - started)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Probes and looks until the block ends."""
        ended = threading.Event()

        def repeat(look: Callable[[], object]) -> None:
            while not ended.wait(EVERY):
                look()

        def look() -> None:
            self.memory.append(self.resident())
            self.descriptors.append(len(os.listdir(f"/proc/{self.process.pid}/fd")))  # noqa: PTH208

        threads = [threading.Thread(target=repeat, args=(each,)) for each in (self.probe, look)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    def connect(self) -> socket.socket:
        """A connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def begin(self, length: int) -> socket.socket:
        """A request for pictures whose body is to come."""
        connection = self.connect()
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        return connection


@contextmanager
def served(source: Path, bundle: Path, work: Path, descriptors: int) -> Iterator[Target]:
    """A server of `bundle` that is ready."""
    log, hold = work / "log", work / "hold"
    paths = [source / "runtime", ROOT / "runtime/tests"]
    program = [sys.executable, ROOT / "runtime/tests/http_child.py", hold, bundle, "--port", "0"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("wb") as printed:
        process = subprocess.Popen(
            program,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors)),
        )
    try:
        while b"ready: " not in (said := log.read_bytes()):
            assert process.poll() is None, said
            time.sleep(0.05)
        yield Target(process, int(said.split(b",")[0].rpartition(b":")[2]), log, hold)
    finally:
        hold.unlink(missing_ok=True)
        process.kill()
        process.wait()


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


def rounds(target: Target) -> None:
    """Four rounds of 20 whole bodies of 30 MB at once, in JSON of an unknown name."""
    content = b'{"prompt": "a", "nothing": "' + b"a" * (30 * MIB) + b'"}'

    def client() -> None:
        with contextlib.suppress(OSError), target.begin(len(content)) as connection:
            connection.sendall(content)
            connection.recv(4096)

    for _ in range(4):
        threads = [threading.Thread(target=client) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def lists(target: Target) -> None:
    """60 MB of JSON: a list of empty lists."""
    content = b"[" + b"[]," * (20 * MIB - 1) + b"[]]"
    with contextlib.suppress(OSError), target.begin(len(content)) as connection:
        connection.sendall(content)
        connection.recv(4096)


ATTACKS: dict[str, tuple[Callable[[Target], None], int]] = {
    "unfinished heads": (heads, FEW),
    "unfinished bodies": (bodies, 20000),
    "rounds of bodies": (rounds, 20000),
    "JSON of lists": (lists, 20000),
}


def attack(name: str, target: Target) -> dict[str, Any]:
    """What one attack costs, and what of it is left ten seconds after."""
    work, _ = ATTACKS[name]
    before, started = target.resident(), time.monotonic()
    with target.watched():
        work(target)
    took = time.monotonic() - started
    time.sleep(10)
    return {
        "attack": name,
        "seconds": took,
        "probes": len(target.waited),
        "unanswered": target.unanswered,
        "longest_probe_s": max(target.waited),
        "memory_before_mib": before,
        "memory_most_mib": max(target.memory),
        "memory_after_mib": target.resident(),
        "descriptors": max(target.descriptors),
        "log_bytes": target.log.stat().st_size,
    }


def stop(target: Target, signals: list[signal.Signals], *, drawing: bool) -> dict[str, Any]:
    """How a server ends: with half a body on the way, or with 14 requests of which one is drawn and the others wait."""
    connections = []
    if drawing:
        target.hold.touch()
    body = json.dumps({"prompt": "a"}).encode()
    for _ in range(14 if drawing else 1):
        connection = target.begin(len(body) if drawing else 1000)
        connection.sendall(body if drawing else b'{"prompt": ')
        connections.append(connection)
    time.sleep(1)
    started = time.monotonic()
    for number in signals:
        target.process.send_signal(number)
        time.sleep(1)
    target.hold.unlink(missing_ok=True)
    code = target.process.wait(60)
    took = time.monotonic() - started
    for connection in connections:
        connection.close()
    return {
        "signals": [each.name for each in signals],
        "drawing": drawing,
        "seconds": took,
        "code": code,
        "tracebacks": target.log.read_bytes().count(b"Traceback"),
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
