"""A bundle behind the tests' Triton server: requests a second, what Triton adds to the runtime, memory of many.

    export PYTHONPATH=.:runtime/tests
    python benchmarks/serving/load.py throughput BUNDLE --json load.json
    python benchmarks/serving/load.py overhead BUNDLE --json load.json
    python benchmarks/serving/load.py soak BUNDLE --json load.json

From the repository's folder, with the environments of `make install`. Server and clients share the machine; engines run
on one thread and stay open. `throughput` asks by each way with 1, 4 and 16 clients, each of which waits for its answer
before it asks again. `overhead` alternates a request to the server with the same one to a process of its own that calls
the runtime (`direct.py`), in turned order. What surrounds a run is the client's time less the server's own of the same
run; the PNG file in it, which the runtime alone makes too, is taken off. What a server does beside steps is a run's
time less its steps', and runs of few and of many steps tell what of it is each step's. `soak` looks at the
resident memory of server and models every 50 requests, of which some are refused and some cancelled. Each prints
Markdown. Nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tritonclient.grpc
from needs import triton_folder

from benchmarks.serving.ways import OPTIONS, PROMPT, WAYS, Way, serving
from hidiff_runtime.format.manifest import Manifest
from tests.deploy import clients
from tests.deploy.clients import MODEL, STREAM, inputs, post
from tests.deploy.server import TritonServer

HERE = Path(__file__).parent
CLIENTS = (1, 4, 16)
EVERY = 50
"""Requests between two looks at the memory."""


def _quantile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]


def throughput(bundle: Path, requests: int) -> dict[str, Any]:
    """Requests a second and latencies, by way and number of clients."""
    steps = min(Manifest.read(bundle).steps)
    print("| way | clients | requests | requests/s | p50, ms | p95, ms |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    with serving(bundle) as server:
        for way in WAYS:
            for count in CLIENTS:
                turns = -(-requests // count)

                def client(number: int, way: Way = way, turns: int = turns) -> list[float]:
                    took = []
                    with way.connect(server) as connected:
                        for turn in range(turns):
                            started = time.perf_counter()
                            way.ask(connected, number * 1000 + turn, steps)
                            took.append(time.perf_counter() - started)
                    return took

                started = time.perf_counter()
                with ThreadPoolExecutor(count) as pool:
                    took = [seconds for found in pool.map(client, range(count)) for seconds in found]
                rate = len(took) / (time.perf_counter() - started)
                p50, p95 = (1e3 * _quantile(took, part) for part in (0.5, 0.95))
                print(f"| {way.name} | {count} | {len(took)} | {rate:.2f} | {p50:.0f} | {p95:.0f} |", flush=True)
                rows.append(
                    {
                        "way": way.name,
                        "clients": count,
                        "requests": len(took),
                        "per_s": rate,
                        "p50_ms": p50,
                        "p95_ms": p95,
                    }
                )
    return {"steps": steps, "rows": rows}


class Direct:
    """The process that calls the runtime itself, on the server's Python.

    Attributes:
        pid: of the process.
    """

    def __init__(self, bundle: Path) -> None:
        python = triton_folder().parents[4] / "bin/python"
        command = [str(python), str(HERE / "direct.py"), str(bundle), "--options", json.dumps(OPTIONS)]
        # A session of its own, as the server's: the scheduler shares the processors among sessions first.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.pid = self._process.pid

    def ask(self, seed: int, steps: int) -> dict[str, Any]:
        """Draws one picture."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": PROMPT, "seed": seed, "steps": steps}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _spent(server: TritonServer) -> tuple[float, float, float]:
    """Seconds of all runs so far and of their steps, and how many steps they were."""
    names = ("hidiff_request_seconds_sum", "hidiff_step_seconds_sum", "hidiff_step_seconds_count")
    runs, steps, count = (sum(server.measured(name).values()) for name in names)
    return runs, steps, count


def _pair(server: TritonServer, way: Way, client: Any, direct: Direct, seed: int, steps: int) -> dict[str, float]:
    """One request to both, the server first where the seed is even, in milliseconds.

    What surrounds a run is told by the server's own clock of the same request: how fast the machine is just then falls
    on neither side.
    """

    def alone() -> dict[str, float]:
        told = direct.ask(seed, steps)
        checks.append(told["sha256"])
        return {
            "run": 1e3 * told["run"],
            "file": 1e3 * told["file"],
            "between": 1e3 * (told["run"] - sum(told["steps"])),
            "step": 1e3 * statistics.fmean(told["steps"]),
        }

    def served() -> dict[str, float]:
        before, started = _spent(server), time.perf_counter()
        content = way.ask(client, seed, steps)
        whole = time.perf_counter() - started
        checks.append(hashlib.sha256(content).hexdigest())
        run, step, count = (there - here for here, there in zip(before, _spent(server), strict=True))
        return {
            "run, served": 1e3 * run,
            "around": 1e3 * (whole - run),
            "between, served": 1e3 * (run - step),
            "step, served": 1e3 * step / count,
        }

    checks: list[str] = []
    first, second = (alone, served) if seed % 2 else (served, alone)
    found = {**first(), **second()}
    if way.exact and len(set(checks)) != 1:
        raise RuntimeError("The server's picture is not the runtime's.")
    return found


_HEADINGS = (
    "way",
    "steps",
    "run alone, ms",
    "around a run, ms",
    "25 to 75 %",
    "its PNG file, ms",
    "Triton adds, ms",
    "beside steps alone, ms",
    "served, ms",
)


def overhead(bundle: Path, pairs: int) -> dict[str, Any]:
    """What a request and a step take longer on the server."""
    tabulated = Manifest.read(bundle).steps
    few, many = min(tabulated), max(tabulated)
    print(f"| {' | '.join(_HEADINGS)} |\n| --- |{' ---: |' * (len(_HEADINGS) - 1)}")
    rows = []
    with serving(bundle) as server:
        direct = Direct(bundle)
        direct.ask(0, few)
        for way in WAYS:
            with way.connect(server) as client:
                medians = {}
                for steps in (few, many):
                    found = [_pair(server, way, client, direct, seed, steps) for seed in range(pairs)]
                    medians[steps] = {name: statistics.median(pair[name] for pair in found) for name in found[0]}
                    around = [_quantile([pair["around"] for pair in found], part) for part in (0.25, 0.75)]
                    rows.append({"way": way.name, "steps": steps, "pairs": pairs, **medians[steps], "spread": around})
                    print(_told(rows[-1]), flush=True)
                rows[-1]["step_added"] = _step_added(medians[few], medians[many], many - few)
        direct.close()
    for row in rows:
        if "step_added" in row:
            share = 100 * row["step_added"] / row["step"]
            print(f"\n{row['way']}: {row['step_added']:+.3f} ms a step, {share:+.2f} % of one", end="")
    print()
    return {"rows": rows}


def _step_added(few: Mapping[str, float], many: Mapping[str, float], steps: int) -> float:
    """Milliseconds that the server spends more beside each step: what runs of many steps have more than of few."""
    served, alone = (many[name] - few[name] for name in ("between, served", "between"))
    return (served - alone) / steps


def _told(row: Mapping[str, Any]) -> str:
    """The table's row."""
    cells = (
        row["way"],
        row["steps"],
        f"{row['run']:.1f}",
        f"{row['around']:.2f}",
        f"{row['spread'][0]:.2f} to {row['spread'][1]:.2f}",
        f"{row['file']:.2f}",
        f"{row['around'] - row['file']:+.2f}",
        f"{row['between']:.2f}",
        f"{row['between, served']:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _resident(server: TritonServer) -> dict[str, int]:
    """Resident bytes of the server's process and of each model's."""
    processes = {"server": server.process.pid, MODEL: server.stubs(MODEL)[0], STREAM: server.stubs(STREAM)[0]}
    return {
        name: int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 for name, process in processes.items()
    }


def _cancel(server: TritonServer, steps: int) -> None:
    """A request that is taken back after its first step."""
    with clients.grpc(server) as client:
        first = threading.Event()
        client.start_stream(lambda result, error: first.set())  # noqa: ARG005 - they are passed by name
        client.async_stream_infer(STREAM, inputs(tritonclient.grpc, prompt=PROMPT, steps=steps))
        first.wait(60)
        client.stop_stream(cancel_requests=True)


def soak(bundle: Path, requests: int) -> dict[str, Any]:
    """Resident memory over many requests: all ways in turn; every tenth is refused, and every twentieth cancelled."""
    steps = min(Manifest.read(bundle).steps)
    samples: list[dict[str, float]] = []
    with serving(bundle) as server:
        opened = [way.connect(server) for way in WAYS]
        connected = [context.__enter__() for context in opened]
        for number in range(requests):
            if number % EVERY == 0:
                samples.append({"requests": number, **_resident(server)})
            way = number % len(WAYS)
            if number % 10 == 9:
                status, _ = post(server, f"{MODEL}/generate", {"prompt": "a" * 5000})
                assert status == 400
            elif number % 20 == 4:
                _cancel(server, steps)
            else:
                WAYS[way].ask(connected[way], number, steps)
        samples.append({"requests": requests, **_resident(server)})
        for context in reversed(opened):
            context.__exit__(None, None, None)
    print("| process | first, MB | after a quarter | last | last of first | growth since a quarter, bytes a request |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = [_growth(name, samples) for name in ("server", MODEL, STREAM)]
    for row in rows:
        cells = " | ".join(f"{row[key] / 1e6:.1f}" for key in ("first", "quarter", "last"))
        print(f"| {row['process']} | {cells} | {row['last'] / row['first']:.3f} | {row['slope']:.0f} |")
    return {"requests": requests, "rows": rows, "samples": samples}


def _growth(name: str, samples: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    late = samples[len(samples) // 4 :]
    slope = statistics.linear_regression([one["requests"] for one in late], [one[name] for one in late]).slope
    edges = {"first": samples[0][name], "quarter": late[0][name], "last": samples[-1][name]}
    return {"process": name, **edges, "slope": slope}


def machine() -> dict[str, str]:
    """What the figures hold for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    load = " ".join(Path("/proc/loadavg").read_text().split()[:3])
    return {"processor": name, "python": platform.python_version(), "load before": load}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "overhead", "soak"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, help="for each cell of throughput, pairs of overhead, all of soak")
    parser.add_argument("--json", type=Path, help="also written there, beside what it holds of the other two")
    given = parser.parse_args()
    what, most = {"throughput": (throughput, 96), "overhead": (overhead, 60), "soak": (soak, 2000)}[given.what]
    found = {"machine": machine(), **what(given.bundle, given.requests or most)}
    print(f"\nload before: {found['machine']['load before']}")
    if given.json is not None:
        held = json.loads(given.json.read_text()) if given.json.exists() else {}
        given.json.write_text(json.dumps({**held, given.what: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
