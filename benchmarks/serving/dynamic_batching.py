"""What `--dynamic-batching` of hidiff-serve and of Triton's models gains: the same requests with it and without.

    hidiff-export build demo --set 'batches=[1, 4]' -o /tmp/demo-batches
    python benchmarks/serving/dynamic_batching.py /tmp/demo-batches
    PYTHONPATH=.:runtime/tests python benchmarks/serving/dynamic_batching.py /tmp/demo-batches --triton

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
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

SERVE = Path(sys.executable).parent / "hidiff-serve"

Ask = Callable[[int, int], bytes]
"""Asks for a picture of this seed in so many steps."""


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[Ask]:
    """Starts hidiff-serve; yields what asks it once it is ready."""
    words = [str(SERVE), str(bundle), "--port", "0", "--queue", "64", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found is not None
        address = found.group()
        while not ready(address):
            time.sleep(0.2)
        yield partial(ask, f"{address}/v1/images/generations")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def triton(bundle: Path, *, dynamic_batching: bool) -> Iterator[Ask]:
    """Starts Triton; yields what asks its model that answers once."""
    from hidiff_export.triton.repository import RepositoryPlan, write
    from tests.deploy.server import TritonServer

    with tempfile.TemporaryDirectory(prefix="hidiff-batching-", dir=bundle.parent) as folder:
        plan = RepositoryPlan(options={"resident": "all"}, dynamic_batching=dynamic_batching)
        write(bundle, Path(folder) / "models", plan)
        with TritonServer(Path(folder) / "models", Path(folder)) as started:
            yield partial(ask, f"http://{started.http}/v2/models/hidiff/generate", output="base64")


def ready(address: str) -> bool:
    """Returns whether requests are served."""
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, seed: int, steps: int, **given: str) -> bytes:
    """Asks for a picture; returns the answer."""
    values = {"prompt": "a red apple, on a blue background", "seed": seed, "steps": steps, **given}
    body = json.dumps(values).encode()
    request = urllib.request.Request(address, body, {"content-type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=600) as answer:
        content: bytes = answer.read()
    return content


def timed(asking: Ask, pictures: int, clients: int, steps: int) -> float:
    """Returns the seconds that all pictures took."""
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda seed: asking(seed, steps), range(pictures)))
    return time.monotonic() - started


def _both(bundle: Path, *, in_triton: bool) -> Sequence[AbstractContextManager[Ask]]:
    """Returns a server without dynamic batching, and one with it."""
    if in_triton:
        return triton(bundle, dynamic_batching=False), triton(bundle, dynamic_batching=True)
    return server(bundle), server(bundle, "--dynamic-batching")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="with batches of 1 and 4")
    parser.add_argument("--triton", action="store_true", help="measure Triton's models, not hidiff-serve")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with ExitStack() as closing:
        plain, batching = (closing.enter_context(one) for one in _both(given.bundle, in_triton=given.triton))
        asked = (given.pictures, given.clients, given.steps)
        pairs = [(timed(plain, *asked), timed(batching, *asked)) for _ in range(given.rounds)]
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(
        f"## {'Triton' if given.triton else 'hidiff-serve'}\n\n"
        f"{model.group(1) if model else platform.processor()}, {os.cpu_count()} cores; "
        f"onnxruntime {version('onnxruntime')}. {given.pictures} requests of {given.steps} steps by {given.clients} "
        f"clients, {given.rounds} times in turns.\n"
    )
    print("| round | one by one, s | batched, s | gain |\n| ---: | ---: | ---: | ---: |")
    for number, (one, other) in enumerate(pairs, start=1):
        print(f"| {number} | {one:.1f} | {other:.1f} | {one / other:.2f} |")
    print(f"\nMedian gain {median(one / other for one, other in pairs):.2f}.")


if __name__ == "__main__":
    main()
