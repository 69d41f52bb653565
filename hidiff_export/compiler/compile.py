"""Builds a bundle from a recipe: runs the stages in order, skips what is whole, and publishes the result at the end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hidiff_export.compiler.code_fingerprint import own_sources
from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.compiler.workspace import FilesChanged, Workspace
from hidiff_export.errors import BundleError, Cancelled, CheckpointError
from hidiff_export.files import storage_errors
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.costly_settings import costly_settings
from hidiff_export.tool_versions import EXPORTERS, tool_versions
from hidiff_runtime.format.manifest import Contents, FileDigest

T = TypeVar("T")


Assemble = Callable[[StageContext, Mapping[str, FileDigest]], Contents]
"""Makes the manifest of a build's files."""


class BuildProgress(Protocol):
    """What shows a build to whoever waits for it."""

    def stage(self, title: str, *, reused: bool) -> AbstractContextManager[Report]:
        """Opens the line of a stage; the report it yields moves the bar."""

    def notice(self, text: str) -> None:
        """Shows a line that a person should read, though nothing failed."""


@dataclass(frozen=True)
class StageTime:
    """How long a stage took, in seconds; 0 where an earlier build's result was reused."""

    title: str
    seconds: float
    reused: bool


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle, what its stages cost, and what was told of the checkpoint on the way."""

    folder: Path
    stages: tuple[StageTime, ...]
    notices: tuple[str, ...] = ()


def stage_key(stage: Stage, context: StageContext, done: dict[str, str]) -> str:
    """Returns the fingerprint of everything a stage's result depends on; of the code, what the stage itself runs.

    Args:
        stage: the stage.
        context: the build it belongs to.
        done: keys of the stages that ran before.
    """
    made_from: dict[str, Any] = {
        "stage": stage.name,
        "inputs": stage.inputs(context),
        "needs": {name: done[name] for name in stage.needs},
        "code": own_sources().fingerprint(stage.module),
        "tools": tool_versions(EXPORTERS),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def build(
    recipe: Recipe,
    output: Path,
    display: BuildProgress,
    *,
    force: bool = False,
    resume: bool = False,
    stages: Sequence[Stage] | None = None,
    assemble: Assemble | None = None,
) -> BuildResult:
    """Builds ``recipe`` into the folder ``output``, or resumes an interrupted build of it.

    Args:
        recipe: what to build.
        output: the bundle's folder.
        display: shows the stages.
        force: start over, and replace a finished bundle.
        resume: with ``force``, go on with an interrupted build all the same.
        stages: in place of those that the recipe takes.
        assemble: makes the manifest of the files, in place of what the recipe comes to.

    Raises:
        ExportError: ``stages`` are not in an order that they can run in; nothing was written.
        HidiffError: of the class that says what failed; finished stages stay in ``<output>.partial``.
    """
    workspace = Workspace(output, force=force, resume=resume)
    workspace.check()
    # Here, because the stages bring in torch and onnx, which a refused recipe or folder must not wait for.
    from hidiff_export.compiler.stages.engines import builders_for
    from hidiff_export.compiler.stages.order import assemble_contents, check_order, stages_of
    from hidiff_export.quantization.quantize import check_quantizer

    stages = stages or stages_of(recipe)
    check_order(stages)
    if recipe.precision.quantized:
        check_quantizer()
    for builder in builders_for(recipe):
        builder.check()
    notices: list[str] = []

    def notice(text: str) -> None:
        if text not in notices:
            notices.append(text)
            display.notice(text)

    with workspace:
        context = StageContext.of(recipe, workspace.folder, notice)
        for told in costly_settings(recipe):
            notice(told)
        whole = assemble or partial(assemble_contents, recipe)
        times = _run_and_commit(whole, stages, workspace, context, display)
    return BuildResult(output.absolute(), times, tuple(notices))


def _run_and_commit(
    assemble: Assemble, stages: Sequence[Stage], workspace: Workspace, context: StageContext, display: BuildProgress
) -> tuple[StageTime, ...]:
    """Runs the stages and publishes the bundle; a second time where files of finished stages were changed meanwhile."""
    times = _Times()
    try:
        keys = _run_stages(stages, workspace, context, display, times)
        _commit(assemble, stages, keys, workspace, context, display)
    except FilesChanged as changed:
        context.notice(f"{changed.summary} {changed.given}. The stages that need them run again.")
        keys = _run_stages(stages, workspace, context, display, times)
        _commit(assemble, stages, keys, workspace, context, display)
    return tuple(times.values())


def _commit(
    assemble: Assemble,
    stages: Sequence[Stage],
    keys: dict[str, str],
    workspace: Workspace,
    context: StageContext,
    display: BuildProgress,
) -> None:
    def contents(files: Mapping[str, FileDigest]) -> Contents:
        for stage in stages:  # the manifest says what the bundle was built from, by what is there now
            _check_inputs_stayed(stage, keys[stage.name] == stage_key(stage, context, keys), workspace)
        return assemble(context, files)

    title = "comparing files"
    with _interruptible(title), display.stage(title, reused=False) as report:
        removed = workspace.commit(contents, report)
    if removed:
        more = f" and {len(removed) - 3} more" if len(removed) > 3 else ""
        context.notice(f"Deleted what no stage of this build wrote: {', '.join(removed[:3])}{more}.")


@contextmanager
def _interruptible(title: str) -> Iterator[None]:
    """Ends the build with advice when Ctrl-C comes; what is half written is not recorded, so it is never read."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Cancelled(
            f"Interrupted while at: {title}.",
            advice="Run the same command again to go on from the last finished stage.",
        ) from interrupt


class _Times(dict[str, StageTime]):
    """What each stage cost, by its name; a stage that ran is not said to be reused where it is later in the build."""

    def add(self, stage: Stage, seconds: float | None) -> None:
        """Notes that a stage ran, or (None) was reused."""
        before = self.get(stage.name)
        if seconds is not None:
            spent = seconds + (0.0 if before is None else before.seconds)
            self[stage.name] = StageTime(stage.title, spent, reused=False)
        elif before is None:
            self[stage.name] = StageTime(stage.title, 0.0, reused=True)


def _run_stages(
    stages: Sequence[Stage], workspace: Workspace, context: StageContext, display: BuildProgress, times: _Times
) -> dict[str, str]:
    """Runs the stages that are not whole, and those that need one that was not; the keys of all."""
    workspace.forget_all_but({stage.name for stage in stages})
    keys: dict[str, str] = {}
    run: set[str] = set()
    for stage in stages:
        key = keys[stage.name] = _or_changed(workspace, partial(stage_key, stage, context, keys))
        reused = run.isdisjoint(stage.needs) and workspace.is_complete(stage.name, key)
        started = time.monotonic()
        with (
            _interruptible(stage.title),
            display.stage(stage.title, reused=reused) as report,
            storage_errors(workspace.folder),
        ):
            if reused:
                for notice in workspace.notices(stage.name):
                    context.notice(notice)
            else:
                run.add(stage.name)
                workspace.begin(stage.name)
                told: list[str] = []
                telling = replace(context, notice=partial(_tell, context, told))
                written = _or_changed(workspace, partial(stage.run, telling, report))
                _check_inputs_stayed(stage, key == stage_key(stage, context, keys), workspace)
                workspace.finish(stage.name, key, written, told)
        times.add(stage, None if reused else time.monotonic() - started)
    return keys


def _tell(context: StageContext, told: list[str], notice: str) -> None:
    """Tells a notice, and keeps it with its stage."""
    told.append(notice)
    context.notice(notice)


def _or_changed(workspace: Workspace, work: Callable[[], T]) -> T:
    """Does what reads files of finished stages. Raises FilesChanged where it fails and they are gone or others."""
    try:
        return work()
    except (OSError, BundleError):
        workspace.compare()
        raise


def _check_inputs_stayed(stage: Stage, same: bool, workspace: Workspace) -> None:
    """Refuses a result of which nobody can say what it was made from.

    Raises:
        CheckpointError: a file that the stage reads was changed since it began.
        FilesChanged: it is a file of another stage.
    """
    if not same:
        workspace.compare()
        raise CheckpointError(
            "What the bundle is built from was changed while it was read.",
            given=f"while at: {stage.title}",
            advice="Wait until the checkpoint is whole, then run the same command again.",
        )
