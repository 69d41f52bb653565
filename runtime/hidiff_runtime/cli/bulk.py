"""`hidiff-run bulk`: a table of prompts in, a folder or a bucket of pictures out."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from hidiff_runtime.cli.shared_options import add_opening, opening
from hidiff_runtime.console.printing import write
from hidiff_runtime.errors import InputError, RowsFailed
from hidiff_runtime.pipeline.request_fields import BY_NAME
from hidiff_runtime.text_safety import printable

if TYPE_CHECKING:
    from hidiff_runtime.bulk.job import Checked, Job, Summary
    from hidiff_runtime.bulk.rows import DeadLetter
    from hidiff_runtime.prompt_files.field_values import Value

SUMMARY = "make the pictures of a table of prompts, by workers on one machine or on a Ray cluster"
EXAMPLE = "bulk bundle --prompts prompts.parquet -o s3://bucket/pictures --actors 4"

SHOWN = 20
"""Rows that failed, of which standard error tells."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    _add_rows(command)
    _add_workers(command)
    _add_results(command)
    add_opening(command)


def _add_rows(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("rows")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help=".parquet, .csv, .tsv, .jsonl, .json, .yaml, or .txt (one prompt a line); a path or s3://. Columns: id, "
        f"{', '.join(BY_NAME)}",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="what the seeds of rows without one are derived from (default: 0)"
    )
    group.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a field of all rows that do not say otherwise, such as steps=30; may be given again",
    )
    group.add_argument(
        "--ignore", metavar="NAME", action="append", default=[], help="a column that is no field; may be given again"
    )


def _add_workers(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("workers")
    group.add_argument("--actors", type=_positive, metavar="N", help="workers (default: one for each GPU, or one)")
    group.add_argument(
        "--gpus-per-actor", type=_amount, metavar="N", help="of each worker (default: 1 for TensorRT's engines, else 0)"
    )
    group.add_argument("--cpus-per-actor", type=_amount, metavar="N", default=1.0, help="that it books (default: 1)")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="of a cluster: auto or host:port (default: Ray is started here)",
    )
    group.add_argument("--ray-log", action="store_true", help="show Ray's own messages")
    group.add_argument(
        "--object-store",
        type=_positive,
        metavar="MIB",
        help="memory of a Ray that is started here, for rows on their way (default: Ray's)",
    )


def _add_results(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("results")
    group.add_argument("-o", "--output", metavar="PLACE", required=True, help="a folder, or s3://bucket/prefix")
    group.add_argument(
        "--s3-endpoint", metavar="URL", help="of a server that speaks S3 (default: AWS_ENDPOINT_URL_S3, or Amazon's)"
    )
    group.add_argument("--retry-failed", action="store_true", help="try rows that failed before once more")
    group.add_argument(
        "--recheck",
        choices=("hash", "size"),
        default="hash",
        help="how to look at pictures that are there: read them all, or list them (default: hash)",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="check all rows, show the first as they would be drawn, write nothing"
    )
    group.add_argument("--json", action="store_true", help="print what came of it as JSON")


def run(options: argparse.Namespace) -> int:
    """Does the job, or says what it would do.

    Raises:
        RowsFailed: all is done, and some rows failed.
    """
    from hidiff_runtime.bulk.job import check_job, run_job
    from hidiff_runtime.bulk.output import DEAD

    job = _job(options)
    if options.dry_run:
        checked = check_job(job)
        failed = [*checked.plan.failed, *checked.refused]
        _tell_dead(failed)
        write(_told_check(checked, options), sys.stdout)
        if failed:
            raise RowsFailed(f"{len(failed)} rows would fail.", advice="Mend them, or let them go to the dead letters.")
        return 0
    summary = run_job(job)
    write(json.dumps(summary.to_dict(), indent=2) + "\n" if options.json else _told(summary), sys.stdout)
    if len(summary.parity) > 1:
        write("The workers' machines do not draw the same pictures: see parity in rows.parquet.\n", sys.stderr)
    if summary.failed:
        raise RowsFailed(
            f"{summary.failed} of {summary.rows} rows failed.",
            given=job.output.joined(DEAD).url,
            advice="Mend the rows and run the same command again; --retry-failed tries those that did not change.",
        )
    return 0


def _job(options: argparse.Namespace) -> Job:
    from hidiff_runtime.bulk.job import Job
    from hidiff_runtime.bulk.ray_pool import Pool
    from hidiff_runtime.bulk.storage import Location

    memory = options.object_store
    gpus = options.gpus_per_actor
    pool = Pool(
        actors=options.actors,
        gpus=_default_gpus(options) if gpus is None else gpus,
        cpus=options.cpus_per_actor,
        address=options.ray,
        memory=None if memory is None else memory * 2**20,
        noisy=options.ray_log,
    )
    return Job(
        folder=options.folder,
        prompts=Location.of(options.prompts, options.s3_endpoint),
        output=Location.of(options.output, options.s3_endpoint),
        pool=pool,
        seed=options.seed,
        defaults=_defaults(options.set),
        ignored=tuple(options.ignore),
        opening=opening(options),
        recheck=options.recheck,
        retry_failed=options.retry_failed,
    )


def _defaults(given: list[str]) -> dict[str, Value]:
    """Returns the values of --set."""
    from hidiff_runtime.prompt_files.field_values import parse_value

    found: dict[str, Value] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name == "prompt":
            raise InputError("--set takes NAME=VALUE of a field.", given=text, advice="Such as --set steps=30.")
        found[name] = parse_value(name, value)
    return found


def _default_gpus(options: argparse.Namespace) -> float:
    """Returns one for engines of TensorRT, since the workers' machines and not this one say what is there."""
    from hidiff_runtime import backends
    from hidiff_runtime.format.bundle_folder import BundleFolder

    offered = BundleFolder(options.folder, options.allow_links).manifest().phases[0].engines
    chosen = options.backend or next((name for name in backends.NAMES if name in offered), "")
    return 1.0 if chosen.startswith("tensorrt") else 0.0


def _told(summary: Summary) -> str:
    parts = [f"{summary.done} of {summary.rows} rows done", f"{summary.made} made now"]
    parts += [f"{summary.finished} finished before"] if summary.finished else []
    parts += [f"{summary.found} found finished"] if summary.found else []
    parts += [f"{summary.failed} failed"] if summary.failed else []
    lines = [f"{summary.output}: {', '.join(parts)}, {summary.seconds:.1f} s"]
    lines += [f"made again: {count} rows, since {reason}" for reason, count in summary.again.items()]
    if summary.interrupted:
        lines.append(f"begun again: {summary.interrupted} rows, since a worker ended in the middle")
    return "\n".join(lines) + "\n"


def _told_check(checked: Checked, options: argparse.Namespace) -> str:
    from hidiff_runtime.pipeline.request_summary import request_lines

    plan = checked.plan
    would_make = len(plan.todo) - len(checked.refused)
    letters = [*plan.failed, *checked.refused]
    if options.json:
        facts: dict[str, Any] = {
            "would_make": would_make,
            "finished": plan.finished,
            "first": list(checked.first),
            "failed": [{"id": letter.id, "where": letter.where, "reason": letter.reason} for letter in letters],
            "again": dict(plan.again),
        }
        return json.dumps(facts, indent=2) + "\n"
    lines: list[str] = []
    for row in checked.first:
        lines += [f"{row['where']}, id {printable(row['id'])}:", *request_lines(row)]
    if would_make > len(checked.first):
        lines.append(f"and {would_make - len(checked.first)} more rows")
    lines += [f"would make again: {count} rows, since {reason}" for reason, count in plan.again.items()]
    counts = f"would make {would_make} rows, {plan.finished} are finished, {len(letters)} would fail; nothing was run"
    return "\n".join([*lines, counts]) + "\n"


def _tell_dead(letters: list[DeadLetter]) -> None:
    for letter in letters[:SHOWN]:
        given = f" ({letter.given})" if letter.given else ""
        write(printable(f"{letter.where}, id {letter.id}: {letter.reason}{given} {letter.advice}") + "\n", sys.stderr)
    if len(letters) > SHOWN:
        write(f"and {len(letters) - SHOWN} more\n", sys.stderr)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount")
    return amount
