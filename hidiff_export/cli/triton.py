"""`hidiff-export triton`: a model repository of a bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hidiff_export.cli.options import allow_links_option
from hidiff_export.errors import InputError

if TYPE_CHECKING:
    from hidiff_export.triton.repository import WrittenRepository


@click.command(
    short_help="Write a Triton model repository of a bundle.",
    epilog="""\b
Examples:
  hidiff-export triton bundle -o model_repository
  hidiff-export triton bundle -o model_repository --gpus 0,1 --queue-size 32
  hidiff-export triton bundle -o model_repository --bundle /mnt/bundles/sdxl
  tritonserver --model-repository model_repository --model-control-mode none
""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the repository.")
@click.option("--name", default="hidiff", show_default=True, help="The model that clients ask; NAME_stream streams.")
@click.option(
    "--bundle",
    default="link",
    show_default=True,
    metavar="link|copy|PATH",
    help="How the bundle gets into the repository: by hard links, which take no room, or copied. "
    "PATH, absolute, leaves it out: where the server will find it.",
)
@click.option(
    "--layout",
    type=click.Choice(["pipeline", "per-phase"]),
    default="pipeline",
    hidden=True,
    help="Kept for older commands.",
)
@click.option("--gpus", metavar="N,N", default="", help="A set of engines on each of these GPUs. [default: one set]")
@click.option("--backend", metavar="NAME", help="Whose engines to run. [default: the first that the server has]")
@click.option("--resident", type=click.Choice(["current", "all"]), default="current", help="Engines kept open.")
@click.option("--prefetch", is_flag=True, help="Open the next phase's engine while the current one runs.")
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Keep engines open, of all sizes, up to so much memory, such as 6GiB; not with --resident all. "
    "[default: one phase's]",
)
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the backend. Repeatable.")
@allow_links_option
@click.option("--queue-size", default=64, show_default=True, type=click.IntRange(1), help="Requests that may wait.")
@click.option(
    "--queue-timeout", default=60.0, show_default=True, type=click.FloatRange(0.001), help="Seconds one may wait."
)
@click.option(
    "--dynamic-batching",
    is_flag=True,
    help="Draw requests together that wait and are alike, where the bundle has a batch for them.",
)
@click.option("--max-prompt", type=click.IntRange(1), help="Characters of a prompt at most. [default: 2000]")
@click.option("--max-image-bytes", type=click.IntRange(1), help="Bytes of a picture at most. [default: 16 MiB]")
@click.option("--max-steps", type=click.IntRange(1), help="Steps at most. [default: 150]")
@click.option(
    "--environment", metavar="PATH", default="", help="Python environment on the server, if not Triton's own."
)
@click.option("--force", is_flag=True, help="Replace a repository that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def triton(
    directory: Path,
    output: Path,
    name: str,
    bundle: str,
    layout: str,
    gpus: str,
    backend: str | None,
    resident: str,
    prefetch: bool,
    memory_limit: str | None,
    options: tuple[str, ...],
    allow_links: tuple[Path, ...],
    queue_size: int,
    queue_timeout: float,
    dynamic_batching: bool,
    max_prompt: int | None,
    max_image_bytes: int | None,
    max_steps: int | None,
    environment: str,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model repository that serves the bundle in DIRECTORY. The server needs hidiff-runtime, and no PyTorch.

    Clients ask the model NAME over HTTP or gRPC, and NAME_stream where they want progress and previews (gRPC streaming,
    or HTTP generate_stream). Both share one set of engines. The server gets ready when the bundle's hashes, its
    reference samples and a warm-up picture are right, and ends with exit code 1 and the reason in its log otherwise.
    """
    from hidiff_export.triton.model_config import InstancePlacement, Queue
    from hidiff_export.triton.repository import RepositoryPlan, write
    from hidiff_runtime.pipeline.request_values import Limits

    _check_layout(layout)
    limits = {"prompt_characters": max_prompt, "image_bytes": max_image_bytes, "steps": max_steps}
    opening: dict[str, str | int | bool] = {"resident": resident, "prefetch": prefetch}
    opening |= _memory_limit(memory_limit, resident)
    plan = RepositoryPlan(
        name=name,
        bundle=bundle,
        places=InstancePlacement(_gpus(gpus)),
        queue=Queue(queue_size, queue_timeout),
        limits=Limits(**{key: value for key, value in limits.items() if value is not None}),
        options={**opening, **({} if backend is None else {"backend": backend}), **_options(options)},
        environment=environment,
        allow_links=tuple(str(folder.absolute()) for folder in allow_links),
        dynamic_batching=dynamic_batching,
    )
    print_written(write(directory, output, plan, force=force), as_json=as_json)


def _check_layout(layout: str) -> None:
    """Raises InputError for the layout that there was once: each engine a model of Triton's own."""
    if layout != "pipeline":
        raise InputError(
            "The layout that made each engine a Triton model of its own is no longer written: it took 2.15 times the "
            "weights in memory, and with a ControlNet passed 430 MB between models at each step.",
            given=f"--layout {layout}",
            advice="Leave --layout out: one model then holds all engines. Add --resident all to keep them open.",
        )


def _memory_limit(text: str | None, resident: str) -> dict[str, int]:
    """Returns the option in bytes, if it is given. Raises InputError for no size, and where all engines stay."""
    from hidiff_runtime.cli.shared_options import byte_count

    if text is None:
        return {}
    if resident == "all":
        raise InputError(
            "--memory-limit does not go with --resident all, which closes no engine.",
            given=text,
            advice="Leave one of them out.",
        )
    try:
        return {"memory_limit": byte_count(text)}
    except argparse.ArgumentTypeError as error:
        raise InputError("--memory-limit must be a size.", given=error, advice="Write --memory-limit 6GiB.") from error


def _gpus(text: str) -> tuple[int, ...]:
    """Returns the numbers in ``0,1``. Raises InputError for anything else."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise InputError(
            "--gpus must be different numbers with commas between.", given=text, advice="Write --gpus 0,1."
        )
    return tuple(int(part) for part in parts)


def _options(texts: Sequence[str]) -> dict[str, str | int | bool]:
    """Returns options of the backend. Raises InputError for what is no NAME=VALUE, or no option of a backend."""
    from hidiff_runtime.cli.shared_options import NAMES, named_value, not_of_a_backend

    try:
        found = dict(named_value(text) for text in texts)
    except argparse.ArgumentTypeError as error:
        raise InputError("--option must be NAME=VALUE.", given=error, advice="Write --option threads=8.") from error
    if taken := [name for name in found if name in (*NAMES, "folder", "preload")]:
        raise not_of_a_backend(taken[0])
    return found


def print_written(written: WrittenRepository, *, as_json: bool) -> None:
    """Says what was written and how to start it."""
    if as_json:
        facts = {
            "repository": str(written.folder),
            "models": written.models,
            "bundle": written.bundle,
            "linked": written.linked,
            "bytes": written.bytes,
        }
        click.echo(json.dumps(facts, indent=2))
        return
    how = {True: "linked, so it takes no room", False: "copied", None: "left where the server finds it"}[written.linked]
    click.echo(f"{written.folder}: {', '.join(written.models)} ({written.bytes / 1e6:,.1f} MB)")
    click.echo(f"bundle {written.bundle[:12]}: {how}")
    click.echo(f"next: tritonserver --model-repository {written.folder} --model-control-mode none")
