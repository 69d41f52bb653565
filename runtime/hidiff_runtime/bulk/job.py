"""A whole bulk job: rows read, compared with what is there, made by the pool, and written down."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hidiff_runtime.bulk.job_progress import JobProgress
from hidiff_runtime.bulk.output import Output
from hidiff_runtime.bulk.ray_pool import Cluster, Pool, connected
from hidiff_runtime.bulk.resume import ResumePlan, plan_resume
from hidiff_runtime.bulk.row_worker import DIED, LIMITS, Outcome, Work, request_values
from hidiff_runtime.bulk.rows import DeadLetter, Row, find_rows, read_prompts
from hidiff_runtime.bulk.storage import Location, Store
from hidiff_runtime.errors import EngineError, InputError, StorageError
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.pipeline import Pipeline, require_text_and_vae
from hidiff_runtime.pipeline.prompt_encoding import TokenCounter
from hidiff_runtime.pipeline.request_summary import FIRST, describe_request
from hidiff_runtime.pipeline.request_values import read_request
from hidiff_runtime.prompt_files.field_values import Value
from hidiff_runtime.version import __version__

MOST_DEATHS = 3
"""Rows in a row that end their workers: then it is the machines that are at fault, and the job ends."""


@dataclass(frozen=True)
class Job:
    """What is wanted.

    Args:
        folder: of the bundle, on every machine.
        prompts: the file.
        output: where pictures go.
        pool: of workers.
        seed: that the seeds of rows without one are derived from.
        defaults: values of every row that does not say otherwise.
        ignored: columns that are no fields.
        opening: options of :func:`hidiff_runtime.open`.
        recheck: how pictures that are there are looked at: ``hash`` or ``size``.
        retry_failed: whether rows that failed before are tried again.
    """

    folder: Path
    prompts: Location
    output: Location
    pool: Pool
    seed: int = 0
    defaults: Mapping[str, Value] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    opening: Mapping[str, Any] = field(default_factory=dict)
    recheck: str = "hash"
    retry_failed: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What pictures depend on besides rows and bundle."""
        return {"seed": self.seed, "set": dict(self.defaults)}


@dataclass
class Summary:
    """What came of a job.

    Args:
        output: where.
        bundle: its hash.
        rows: that were asked for.
        finished: that were done before.
        made: in this job.
        found: whose pictures were there whole, though the index did not know them.
        failed: that are in the dead letters.
        again: made again, by the reason.
        interrupted: begun more than once, since a worker ended in the middle.
        seconds: of the job, from the start of Ray.
        parity: the SHA-256 of the warm-up pictures of all workers; several where machines do not draw the same.
    """

    output: str
    bundle: str
    rows: int
    finished: int
    failed: int
    made: int = 0
    found: int = 0
    interrupted: int = 0
    seconds: float = 0.0
    again: dict[str, int] = field(default_factory=dict)
    parity: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Rows whose pictures are there."""
        return self.finished + self.made + self.found

    def to_dict(self) -> dict[str, Any]:
        """Returns as JSON values."""
        return {**asdict(self), "done": self.done}


@dataclass(frozen=True)
class Checked:
    """What a job would do.

    Args:
        plan: with the rows that passed the check.
        refused: dead letters of the rows that did not.
        first: rows that passed, as they will be drawn: id, where, and what `describe_request` says.
    """

    plan: ResumePlan
    refused: tuple[DeadLetter, ...]
    first: tuple[dict[str, Any], ...]


def run_job(job: Job) -> Summary:
    """Does a job. What is finished stays finished, however it ends.

    Raises:
        InputError: the prompts cannot be read, or the output belongs to something else.
        BundleError: the bundle cannot make pictures from prompts, or a worker has another.
        ParityError: a worker's engines do not compute what PyTorch computed.
        EngineError: Ray, or a backend, is missing or cannot go on.
        StorageError: the output cannot be read or written.
    """
    manifest = _manifest(job)
    rows, refused = _rows(job)
    store = Store(job.output)
    output = Output(store)
    facts = {"prompts": job.prompts.url, "rows": len(rows) + len(refused), "version": f"hidiff-runtime {__version__}"}
    with store.locked():
        output.begin(manifest.digest, job.settings, facts)
        plan = _plan(job, manifest, rows, refused, output)
        output.keep(plan.failed)
        summary = Summary(
            output=job.output.url,
            bundle=manifest.digest,
            rows=len(rows) + len(refused),
            finished=plan.finished,
            failed=len(plan.failed),
            again=dict(plan.again),
        )
        if plan.todo:
            try:
                _make(job, manifest, plan, output, summary)
            except BaseException:  # what is done is written down, also where an error or Ctrl-C cuts the job off
                with suppress(StorageError):  # of two errors the first tells more
                    output.flush(now=True)
                raise
        output.finish(summary.to_dict())
    return summary


def check_job(job: Job) -> Checked:
    """Looks at each row as a worker would, on this machine and without running any; writes nothing.

    Raises:
        InputError: the prompts cannot be read, or the output belongs to something else.
        BundleError: the bundle cannot make pictures from prompts.
        EngineError: the backend is missing here.
        StorageError: the output cannot be read.
    """
    manifest = _manifest(job)
    rows, refused = _rows(job)
    output = Output(Store(job.output))
    output.look(manifest.digest, job.settings)
    plan = _plan(job, manifest, rows, refused, output)
    found: list[DeadLetter] = []
    first: list[dict[str, Any]] = []
    with Pipeline.open(job.folder, **{**job.opening, "verify": "size"}) as pipeline:
        counter = TokenCounter(pipeline.bundle)
        for row in plan.todo:
            try:
                request = read_request(pipeline, request_values(row, job.prompts.parent), LIMITS)
                facts = describe_request(pipeline.bundle.sized(*request.size).manifest, counter, request)
            except InputError as error:
                found.append(DeadLetter.of(row, error, manifest.digest))
            else:
                first += [{"id": row.id, "where": row.where, **facts}] if len(first) < FIRST else []
    return Checked(plan, tuple(found), tuple(first))


def _manifest(job: Job) -> Manifest:
    manifest = BundleFolder(job.folder, job.opening.get("allow_links", ())).manifest()
    require_text_and_vae(manifest, job.folder)
    return manifest


def _rows(job: Job) -> tuple[list[Row], list[DeadLetter]]:
    raws = read_prompts(job.prompts, job.ignored)
    return find_rows(raws, seed=job.seed, defaults=job.defaults, ignored=job.ignored)


def _plan(job: Job, manifest: Manifest, rows: list[Row], refused: list[DeadLetter], output: Output) -> ResumePlan:
    return plan_resume(
        rows,
        refused,
        output,
        manifest.digest,
        batch=manifest.batch,
        recheck=job.recheck,
        retry_failed=job.retry_failed,
    )


def _make(job: Job, manifest: Manifest, plan: ResumePlan, output: Output, summary: Summary) -> None:
    """Makes what is left to do."""
    started = time.monotonic()
    work = Work(
        folder=str(job.folder.absolute()),
        opening=dict(job.opening),
        bundle=manifest.digest,
        batch=manifest.batch,
        output=job.output,
        inputs=job.prompts.parent,
    )
    with connected(job.pool) as cluster:
        shown = JobProgress(
            summary.rows, summary.finished, summary.failed, manifest.batch, cluster.actors, cluster.alive
        )
        with shown:
            _take(cluster, work, plan, output, summary, shown)
    summary.seconds = round(time.monotonic() - started, 3)


def _take(cluster: Cluster, work: Work, plan: ResumePlan, output: Output, summary: Summary, shown: JobProgress) -> None:
    """Writes down each outcome. Rows that ended their workers are held back until another shows that workers work."""
    left = {row.number for row in plan.todo}
    parities: Counter[str] = Counter(summary.parity)
    ended: list[DeadLetter] = []
    for outcome in cluster.outcomes(work, plan.todo):
        if outcome.fault is not None:
            raise outcome.fault.error()
        left.discard(outcome.row)
        shown.count(failed=outcome.letter is not None)
        summary.interrupted += outcome.attempts > 1
        if outcome.letter is not None and outcome.letter.kind == DIED:
            ended.append(outcome.letter)
            _check_deaths(ended)
            continue
        _bury(ended, output, summary)
        _note(outcome, output, summary, parities)
        summary.parity = sorted(parities)
        output.flush()
    _bury(ended, output, summary)
    if left:
        raise EngineError("Ray lost rows.", given=f"{len(left)}", advice="Run the same command again.")


def _note(outcome: Outcome, output: Output, summary: Summary, parities: Counter[str]) -> None:
    if outcome.letter is not None:
        output.add_dead_letter(outcome.letter)
        summary.failed += 1
        return
    output.add(outcome.pictures)
    parity = outcome.pictures[0].parity
    if parity is None:
        summary.found += 1
    else:
        summary.made += 1
        parities[parity] += 1


def _bury(ended: list[DeadLetter], output: Output, summary: Summary) -> None:
    for letter in ended:
        output.add_dead_letter(letter)
    summary.failed += len(ended)
    ended.clear()


def _check_deaths(ended: list[DeadLetter]) -> None:
    if len(ended) >= MOST_DEATHS:
        raise EngineError(
            "Workers end whatever row they make.",
            given=f"{len(ended)} rows one after another, {ended[0].where} first",
            advice="Look for a lack of memory (fewer --actors) and in Ray's logs, then run the same command again.",
        )
