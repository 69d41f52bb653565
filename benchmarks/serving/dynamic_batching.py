"""What `hidiff-serve --dynamic-batching` gains: the same requests with it and without, in turns.

    hidiff-export build demo --set 'batches=[1, 4]' -o /tmp/demo-batches
    python benchmarks/serving/dynamic_batching.py /tmp/demo-batches > benchmarks/serving/dynamic_batching.md

Two servers of one bundle are asked in turns by as many clients as keep four requests waiting; a server that is not
asked computes nothing. Clients and servers share the machine. Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median

SERVE = Path(sys.executable).parent / "hidiff-serve"


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[str]:
    """Starts a server; yields its address once it is ready."""
    words = [str(SERVE), str(bundle), "--port", "0", "--queue", "64", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found is not None
        address = found.group()
        while not ready(address):
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def ready(address: str) -> bool:
    """Returns whether requests are served."""
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, seed: int, steps: int) -> bytes:
    """Asks for a picture; returns the answer."""
    body = json.dumps({"prompt": "a red apple, on a blue background", "seed": seed, "steps": steps}).encode()
    request = urllib.request.Request(
        f"{address}/v1/images/generations", body, {"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        content: bytes = answer.read()
    return content


def timed(address: str, pictures: int, clients: int, steps: int) -> float:
    """Returns the seconds that all pictures took."""
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda seed: ask(address, seed, steps), range(pictures)))
    return time.monotonic() - started


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="with batches of 1 and 4")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with ExitStack() as closing:
        plain = closing.enter_context(server(given.bundle))
        batching = closing.enter_context(server(given.bundle, "--dynamic-batching"))
        asked = (given.pictures, given.clients, given.steps)
        pairs = [(timed(plain, *asked), timed(batching, *asked)) for _ in range(given.rounds)]
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(
        f"# Dynamic batching\n\n{model.group(1) if model else platform.processor()}, {os.cpu_count()} cores; "
        f"onnxruntime {version('onnxruntime')}. {given.pictures} requests of {given.steps} steps by {given.clients} "
        f"clients, {given.rounds} times in turns.\n"
    )
    print("| round | one by one, s | batched, s | gain |\n| ---: | ---: | ---: | ---: |")
    for number, (one, other) in enumerate(pairs, start=1):
        print(f"| {number} | {one:.1f} | {other:.1f} | {one / other:.2f} |")
    print(f"\nMedian gain {median(one / other for one, other in pairs):.2f}.")


if __name__ == "__main__":
    main()
