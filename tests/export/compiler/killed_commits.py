"""A bundle of two stages that is published in child processes, one killed before each thing that it does to the disk.

``python -m tests.export.compiler.killed_commits FOLDER`` prints what was found after each, a JSON object on a
line. It is a process of its own because it forks, which a process with threads should not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from hidiff_export.compiler.workspace import Workspace
from hidiff_export.errors import BundleError
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import verify_files
from hidiff_runtime.format.manifest import MANIFEST, FileDigest, Manifest, PhaseRecord, TensorSpec
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule
from tests.export.compiler.killing import killed

STAGES = {"first": "unet/a.bin", "second": "samplers/b.bin"}


def manifest(files: Mapping[str, FileDigest]) -> Manifest:
    """Of a bundle that has no engine."""
    shapes = {"latents": (1, 4, 8, 8), "timestep": (1,), "prompt_embeds": (1, 77, 32)}
    inputs = tuple(TensorSpec(name, shape, "float32") for name, shape in shapes.items())
    noise = TensorSpec("noise_pred", (1, 4, 8, 8), "float32")
    path = next(iter(files))
    return Manifest(
        tools={"hidiff-runtime": "0.1.0"},
        recipe={"name": "test"},
        family="sd15",
        task="text-to-image",
        width=64,
        height=64,
        batch=1,
        guidance=False,
        precision="float32",
        rule=PhaseRule(),
        latent=(4, 8, 8),
        windowed_blocks=(),
        phases=(PhaseRecord(path, {}, inputs, (noise,), Phase(PhaseKind.WINDOWED)),),
        samplers={"ddim": path},
        default_sampler="ddim",
        steps=(1,),
        weights={"unet": path},
        files=files,
    )


def publish(output: Path, content: str, *, force: bool = False) -> list[str]:
    """Builds the bundle, or goes on with it; the stages that ran."""
    ran = []
    with Workspace(output, force=force) as workspace:
        for name, path in STAGES.items():
            if not workspace.is_complete(name, content):
                workspace.begin(name)
                (workspace.folder / path).parent.mkdir(exist_ok=True)
                (workspace.folder / path).write_text(content)
                workspace.finish(name, content, (workspace.folder / path,))
                ran.append(name)
        workspace.commit(manifest)
    return ran


def content_of(output: Path) -> str | None:
    """What a bundle was built from; None where there is none. Raises where it is not whole."""
    if not (output / MANIFEST).exists():
        return None
    verify_files(BundleFolder(output), Manifest.read(output).files)
    (content,) = {(output / path).read_text() for path in STAGES.values()}
    return content


def _after_a_kill(folder: Path, event: int, *, replacing: bool) -> dict[str, Any]:
    output = folder / "bundle"
    folder.mkdir()
    if replacing:
        publish(output, "old")
    was_killed = killed(lambda: _ignore(publish(output, "new", force=replacing)), event=event)
    finished = [name for name, path in STAGES.items() if (folder / "bundle.partial" / path).exists()]
    found = {"replacing": replacing, "killed": was_killed, "seen": content_of(output), "left": finished}
    # Without --force, so that what is half done goes on, and a bundle that is there stays.
    with suppress(BundleError):
        found["ran"] = publish(output, "new")
    found["then"] = content_of(output)
    if replacing:
        publish(output, "newer", force=True)
    return {**found, "last": content_of(output), "beside": sorted(path.name for path in folder.iterdir())}


def _ignore(_ran: list[str]) -> None:
    """Takes what a child process cannot hand over."""


def main() -> None:
    """Kills one after another, until there is nothing left to be killed at."""
    for replacing in (False, True):
        for event in count():
            found = _after_a_kill(Path(sys.argv[1]) / f"{replacing}-{event}", event, replacing=replacing)
            sys.stdout.write(json.dumps(found) + "\n")
            if not found["killed"]:
                break


if __name__ == "__main__":
    main()
