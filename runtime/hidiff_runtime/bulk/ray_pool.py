"""The pool of workers: the one module that knows Ray."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import secrets
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidiff_runtime.bulk.row_worker import Outcome, RowWorker, Work
from hidiff_runtime.bulk.rows import Row
from hidiff_runtime.bulk.storage import INSTALL
from hidiff_runtime.errors import EngineError, InputError
from hidiff_runtime.optional_libraries import optional_library

MOST_BLOCKS = 10_000
"""Rows travel in blocks: of one row each in jobs of up to so many, of more in larger ones."""

BEAT_SECONDS = 3.0

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
_NO_PRESTART = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
"""Else Ray starts an idle process for each core."""


@dataclass(frozen=True)
class Pool:
    """The workers that are wanted.

    Args:
        actors: how many; None for one for each GPU there is, or one.
        gpus: of each.
        cpus: of each.
        address: of a cluster; None starts Ray on this machine for the time of the job.
        memory: bytes of the object store of a Ray that is started here.
        noisy: whether Ray's own messages are shown.

    Raises:
        InputError: the address is one for Ray's client, over which Ray Data does not run.
    """

    actors: int | None
    gpus: float
    cpus: float
    address: str | None
    memory: int | None = None
    noisy: bool = False

    def __post_init__(self) -> None:
        if self.address is not None and "://" in self.address:
            raise InputError(
                "Ray Data does not run over Ray's client.",
                given=self.address,
                advice="Run the command on a machine of the cluster with --ray auto, by 'ray job submit' for instance.",
            )


class Coordinator:
    """An actor that outlives workers: how often each row was begun, and which workers are alive."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()
        self._beats: dict[str, float] = {}

    def begin(self, row: int) -> int:
        """Counts one more time that a row is begun."""
        self._begun[row] += 1
        return self._begun[row]

    def beat(self, worker: str) -> None:
        """Notes that a worker is alive."""
        self._beats[worker] = time.monotonic()

    def alive(self) -> int:
        """Workers that were alive a moment ago."""
        now = time.monotonic()
        return sum(now - beat < 3 * BEAT_SECONDS for beat in self._beats.values())


class RayWorker:
    """An actor of the pool: makes the rows of one block after another; ``board`` is a handle of the `Coordinator`."""

    def __init__(self, work: Work, board: Any) -> None:
        import ray

        self._maker = RowWorker(work, lambda row: int(ray.get(board.begin.remote(row))), lambda: os._exit(1))
        self._board = board
        threading.Thread(target=self._beat, name="hidiff-beat", daemon=True).start()

    def __call__(self, block: Any) -> Any:
        """Returns a table with an outcome for each row of a table of rows."""
        import pyarrow

        outcomes = [self._maker.make(Row.from_json(text)) for text in block["row"].to_pylist()]
        return pyarrow.table({"outcome": [outcome.to_json() for outcome in outcomes]})

    def _beat(self) -> None:
        name = f"{platform.node()}:{os.getpid()}"
        while True:
            self._board.beat.remote(name)
            time.sleep(BEAT_SECONDS)


class Cluster:
    """A Ray that was found or started, with so many actors as workers."""

    def __init__(self, pool: Pool, actors: int) -> None:
        import ray

        self.pool = pool
        self.actors = actors
        self._ray = ray
        self._alive = 0
        self._board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Coordinator).remote()

    def alive(self) -> int:
        """Workers that are alive, as far as was heard last."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._alive = int(self._ray.get(self._board.alive.remote(), timeout=1.0))
        return self._alive

    def outcomes(self, work: Work, rows: Sequence[Row]) -> Iterator[Outcome]:
        """Makes rows; what came of each as it is done, in any order. Ending the iteration ends the workers.

        Ray Data replaces a worker that dies, and its block is made again; rows of it that were finished are found.

        Raises:
            EngineError: Ray or its workers cannot go on.
        """
        from ray.data import ActorPoolStrategy, from_items

        # from_arrow would run a task for each block.
        items = from_items([{"row": row.to_json()} for row in rows], override_num_blocks=min(len(rows), MOST_BLOCKS))
        dataset = items.map_batches(
            RayWorker,
            batch_size=None,  # a block
            batch_format="pyarrow",
            # One block at a time: else a row that ends its worker takes blocks with it that only waited there.
            compute=ActorPoolStrategy(size=self.actors, max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(work, self._board),
            num_cpus=self.pool.cpus,
            num_gpus=self.pool.gpus or None,
        )
        try:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for text in table["outcome"].to_pylist():
                    yield Outcome.from_json(text)
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                "Ray's workers cannot go on.",
                given=_last_line(error),
                advice="All machines need hidiff-runtime[bulk] of one version. Run the same command again to go on.",
            ) from error


@contextmanager
def connected(pool: Pool) -> Iterator[Cluster]:
    """Yields a cluster for a job; what was started is ended.

    Raises:
        EngineError: Ray is not installed, does not start or answer, or has no place for a worker.
    """
    _set_environment(pool)
    hidden = contextlib.nullcontext() if pool.noisy else contextlib.redirect_stdout(io.StringIO())
    with hidden, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's about itself
        ray = optional_library("ray", "Bulk jobs need Ray Data", INSTALL)
        optional_library("ray.data", "Bulk jobs need Ray Data", INSTALL)
        _start(ray, pool)
        try:
            with _terminated_as_interrupted():
                yield Cluster(pool, _actors(ray, pool))
        finally:
            ray.shutdown()


def _set_environment(pool: Pool) -> None:
    """What Ray reads when it is imported, where nobody has set it."""
    wanted = dict(_QUIET)
    if pool.address is None:  # it listens on the machine's address: only who has the token may give it commands
        wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **_NO_PRESTART}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _start(ray: Any, pool: Pool) -> None:
    level = logging.INFO if pool.noisy else logging.CRITICAL
    here: dict[str, Any] = {}
    if pool.address is None:
        here = {"num_cpus": max(os.cpu_count() or 1, round((pool.actors or 1) * pool.cpus)), "include_dashboard": False}
        here |= {} if pool.memory is None else {"object_store_memory": pool.memory}
    try:
        with contextlib.nullcontext() if pool.noisy else _silence():
            ray.init(address=pool.address or "local", log_to_driver=pool.noisy, logging_level=level, **here)
    except (ray.exceptions.RayError, ConnectionError, OSError, ValueError, RuntimeError, ImportError) as error:
        raise EngineError(
            "Ray does not start." if pool.address is None else "The Ray cluster does not answer.",
            given=f"{pool.address or 'this machine'}: {_first_cause(error)}",
            advice="Look at --ray, set RAY_AUTH_MODE=token where a cluster wants one; --ray-log shows Ray's messages.",
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1.0  # a block, and the opening of a bundle, take what they take
    logging.getLogger("ray.data").setLevel(level)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a job as Ctrl-C does; Ray's own handler would exit with the signal's number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps what Ray's compiled parts print as they start, which is no error, from standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _actors(ray: Any, pool: Pool) -> int:
    """Returns how many workers there will be. A cluster may grow; what is started here cannot."""
    gpus = float(ray.cluster_resources().get("GPU", 0))
    if pool.gpus and pool.address is None and gpus < pool.gpus:
        raise EngineError(
            "This machine has no GPU for a worker.",
            given=f"{gpus:g} GPUs, {pool.gpus:g} for each worker",
            advice="Give --gpus-per-actor 0 for workers on the CPU, or --ray with the address of a cluster.",
        )
    if pool.actors is not None:
        return pool.actors
    return max(1, int(gpus // pool.gpus)) if pool.gpus else 1


def _first_cause(error: BaseException) -> str:
    """Returns the last line of what it all began with."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return _last_line(error)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__
