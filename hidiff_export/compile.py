"""Builds a bundle from a recipe: runs the stages in order, skips what is whole, and publishes the result at the end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from hidiff_export.bundle import Workspace, storage_errors
from hidiff_export.errors import Cancelled
from hidiff_export.recipe import Recipe
from hidiff_export.stages import Report, Stage, StageContext
from hidiff_export.versions import EXPORTERS, tool_versions
from hidiff_runtime import phases


class Display(Protocol):
    """What shows a build to whoever waits for it."""

    def stage(self, title: str, *, reused: bool) -> AbstractContextManager[Report]:
        """Opens the line of a stage; the report it yields moves the bar."""
        ...

    def notice(self, text: str) -> None:
        """Shows a line that a person should read, though nothing failed."""
        ...


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


@cache
def code_fingerprint() -> str:
    """SHA-256 over the sources of both packages: a stage's result is reused only by the code that made it."""
    sha = hashlib.sha256()
    for module in (__file__, phases.__file__):
        root = Path(module).parent
        for path in sorted(root.rglob("*.py")):
            sha.update(path.relative_to(root).as_posix().encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()


def stage_key(stage: Stage, context: StageContext, done: dict[str, str]) -> str:
    """The fingerprint of everything a stage's result depends on.

    Args:
        stage: the stage.
        context: the build it belongs to.
        done: keys of the stages that ran before.
    """
    made_from: dict[str, Any] = {
        "stage": stage.name,
        "inputs": stage.inputs(context),
        "needs": {name: done[name] for name in stage.needs},
        "code": code_fingerprint(),
        "tools": tool_versions(EXPORTERS),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def build(
    recipe: Recipe, output: Path, display: Display, *, force: bool = False, stages: Sequence[Stage] | None = None
) -> BuildResult:
    """Builds ``recipe`` into the folder ``output``, or resumes an interrupted build of it.

    Args:
        recipe: what to build.
        output: the bundle's folder.
        display: shows the stages.
        force: start over, and replace a finished bundle.
        stages: in place of those that the recipe takes.

    Raises:
        HidiffError: of the class that says what failed; finished stages stay in ``<output>.partial``.
    """
    # Here, because the stages bring in torch and onnx, which a refused recipe or folder must not wait for.
    from hidiff_export.quantise.quantise import check_quantiser
    from hidiff_export.stages.engines import builders_for
    from hidiff_export.stages.order import assemble_manifest, stages_of

    if recipe.precision.quantised:
        check_quantiser()
    for builder in builders_for(recipe):
        builder.check()
    with Workspace(output, force=force) as workspace:
        notices: list[str] = []

        def notice(text: str) -> None:
            if text not in notices:
                notices.append(text)
                display.notice(text)

        context = StageContext(recipe, workspace.folder, notice)
        times = _run_stages(stages or stages_of(recipe), workspace, context, display)
        workspace.commit(assemble_manifest(context, workspace.files()))
    return BuildResult(workspace.output, times, tuple(notices))


@contextmanager
def _interruptible(stage: Stage) -> Iterator[None]:
    """Ends the build with advice when Ctrl-C comes; what is half written is not recorded, so it is never read."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Cancelled(
            f"Interrupted while at: {stage.title}.",
            advice="Run the same command again to go on from the last finished stage.",
        ) from interrupt


def _run_stages(
    stages: Sequence[Stage], workspace: Workspace, context: StageContext, display: Display
) -> tuple[StageTime, ...]:
    keys: dict[str, str] = {}
    times: list[StageTime] = []
    for stage in stages:
        key = keys[stage.name] = stage_key(stage, context, keys)
        reused = workspace.whole(stage.name, key)
        started = time.monotonic()
        with (
            _interruptible(stage),
            display.stage(stage.title, reused=reused) as report,
            storage_errors(workspace.folder),
        ):
            if not reused:
                workspace.begin(stage.name)
                workspace.finish(stage.name, key, stage.run(context, report))
        times.append(StageTime(stage.title, 0.0 if reused else time.monotonic() - started, reused))
    return tuple(times)
