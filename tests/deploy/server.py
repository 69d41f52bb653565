"""A real Triton server on loopback, from the environment that `make install` makes for it (`.venv-triton`)."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from types import TracebackType

from needs import triton_folder

PATIENCE = 300.0
"""Seconds that a server may take to become ready."""

_MEMORY = Path("/dev/shm")

STUB = "triton_python_backend_stub"


class TritonServer:
    """A server of one model repository. A context manager: ready inside, gone with all its stubs after.

    Args:
        repository: the folder that holds the models.
        work: a folder for the log and for the server's copy of its Python backend.
        control: ``none`` serves all models there are; ``explicit`` those that a client loads.
        options: further options of ``tritonserver``.
        environment: further variables of its environment.
        before: words before the command, of a program that runs it.
        wait: whether entering waits until the server is ready.

    Attributes:
        http: ``127.0.0.1:PORT`` for `tritonclient.http`; ``grpc`` is that for `tritonclient.grpc`, and ``metrics``
            where the metrics are.
        log: the file with all that server and stubs write.
        process: the server's.
    """

    def __init__(
        self,
        repository: Path,
        work: Path,
        *,
        control: str = "none",
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        wait: bool = True,
    ) -> None:
        self.log = work / "tritonserver.log"
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in _free_ports(3))
        self._environment = {**_environment(), **(environment or {})}
        self._wait = wait
        self._memory = f"hidiff-test-{secrets.token_hex(8)}-"
        self._command = [
            *before,
            str(triton_folder() / "bin/tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={_backends(work)}",
            f"--backend-config=python,shm-region-prefix-name={self._memory}",
            f"--model-control-mode={control}",
            *_listening("http", self.http),
            *_listening("grpc", self.grpc),
            *_listening("metrics", self.metrics),
            "--allow-gpu-metrics=false",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=3",
            *options,
        ]

    def __enter__(self) -> TritonServer:
        with ExitStack() as stack, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
            stack.callback(self.stop)
            if self._wait:
                self.wait_ready()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Waits until all models are served, and metrics, whose port opens last.

        Raises:
            RuntimeError: with the end of the log, where the server gives up.
        """
        deadline = time.monotonic() + PATIENCE
        while not (self.ready() and self._measures()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"tritonserver is not ready (exit code {self.process.poll()}):\n{self.said()[-4000:]}"
                )
            time.sleep(0.05)

    def ready(self) -> bool:
        """Whether the server says that it and all its models are ready."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _measures(self) -> bool:
        host, port = self.metrics.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return False
        return True

    def wait_end(self) -> int:
        """Waits until the server has ended by itself; its exit code."""
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        """Ends the server, and whatever of its stubs is left. Does nothing where all have ended."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in _MEMORY.glob(f"{self._memory}*"):  # what a killed process leaves
            region.unlink()
        shutil.rmtree(_MEMORY / f"hidiff-{os.getuid()}-{self.process.pid}", ignore_errors=True)

    def said(self) -> str:
        """What server and stubs have written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stubs(self, model: str) -> list[int]:
        """The process ids of the stubs that run ``model``, one for each of its instances."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            ours = len(words) > 1 and words[0].endswith(STUB.encode()) and f"/{model}/".encode() in words[1]
            if ours and os.getpgid(int(folder.name)) == self.process.pid:
                found.append(int(folder.name))
        return sorted(found)

    def measured(self, start: str) -> dict[str, float]:
        """The metrics whose names begin with ``start``: name and labels as they are written, and the value."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(start))
        return {name: float(value) for name, value in pairs}


def _listening(what: str, address: str) -> tuple[str, str]:
    host, port = address.split(":")
    return f"--{what}-address={host}", f"--{what}-port={port}"


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _backends(work: Path) -> Path:
    """A folder of backends with the Python backend and the stub for the environment's Python in it."""
    folder = work / "backends"
    if not folder.exists():
        shutil.copytree(triton_folder() / "backends", folder)
        shutil.copy2(triton_folder() / f"python_backend_stubs/{_python()[0]}" / STUB, folder / "python" / STUB)
    return folder


def _environment() -> dict[str, str]:
    """The server runs inside its own virtual environment, with nothing of the tests' on its paths."""
    folder = triton_folder().parents[4]
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "VIRTUAL_ENV": str(folder),
        "LD_LIBRARY_PATH": f"{_python()[1]}:{triton_folder().parents[1] / 'nvidia_pytriton.libs'}",
        "OMP_NUM_THREADS": "1",
    }


@cache
def _python() -> tuple[str, str]:
    """Version of the environment's Python, and the folder of its libpython."""
    program = "import sys, sysconfig; print(*sys.version_info[:2], sep='.'); print(sysconfig.get_config_var('LIBDIR'))"
    python = triton_folder().parents[4] / "bin/python"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    version, folder = done.stdout.split("\n", 1)
    return version, folder.strip()
