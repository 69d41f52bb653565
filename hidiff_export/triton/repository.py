"""A Triton model repository of a bundle: two models that share one set of engines.

``NAME_stream`` holds the bundle and is decoupled; ``NAME`` asks it and answers once, since Triton answers plain HTTP
requests for models that are not decoupled only. A second set of engines for it would take the GPU's memory twice.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from hidiff_export.compiler.output_folder import make_parents, output_folder, try_renaming
from hidiff_export.errors import BundleError, InputError
from hidiff_export.files import storage_errors
from hidiff_export.triton.model_config import WARM_UP, InstancePlacement, ModelConfig, Queue
from hidiff_export.triton.warm_up import warm_up
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import verify_files
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from hidiff_runtime.pipeline.pipeline import require_text_and_vae
from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.serving.triton.model_parameters import AT_ONCE, STREAM, Parameters
from hidiff_runtime.serving.triton.schema import INPUTS, MOST_ROWS, PROGRESS, results

BUNDLES = ("link", "copy")
"""Ways in which the bundle's files come into the repository; anything else is where the server finds the bundle."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_PARTIAL, _REPLACED = ".partial", ".replaced"
_LONGEST = f".{'x' * 8}{_REPLACED}"
"""As long as what follows the output's name in the names beside it."""

VERSION = "1"
BUNDLE = "bundle"
"""The bundle's folder inside a version's."""

_MODEL = '''"""Written by hidiff-export."""

from hidiff_runtime.serving.triton.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class RepositoryPlan:
    """What a repository is to be.

    Args:
        name: of the model that clients ask; the engines' is ``NAME_stream``.
        bundle: ``link`` shares the files with the bundle by hard links and copies where that cannot be, ``copy``
            copies; an absolute path stays where it is, and is where the server finds the bundle.
        places: of the engines' instances.
        queue: of requests.
        limits: of each request.
        options: of opening the bundle.
        environment: folder of the Python environment that has hidiff-runtime, where the server runs; empty for the
            one that the server itself uses.
        allow_links: folders that symbolic links in the bundle may lead into: here, and on the server where the bundle
            stays there. A repository that holds the bundle has the files themselves.
        dynamic_batching: draw requests together that wait and are alike in all that a run has once, where the bundle
            has a batch for them.

    Raises:
        InputError: a value is not one it can be.
    """

    name: str = "hidiff"
    bundle: str = BUNDLES[0]
    places: InstancePlacement = field(default_factory=InstancePlacement)
    queue: Queue = field(default_factory=Queue)
    limits: Limits = field(default_factory=Limits)
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    environment: str = ""
    allow_links: tuple[str, ...] = ()
    dynamic_batching: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError("This is no name of a model.", given=self.name, advice="Use letters, digits, - and _.")
        if self.bundle not in BUNDLES and not PurePosixPath(self.bundle).is_absolute():
            raise InputError(
                "The bundle's place on the server must be an absolute path.",
                given=self.bundle,
                advice=f"Or use {' or '.join(BUNDLES)}, which put it into the repository.",
            )

    @property
    def stream(self) -> str:
        """Name of the model that holds the engines."""
        return f"{self.name}_stream"


@dataclass(frozen=True)
class WrittenRepository:
    """A finished repository.

    Args:
        folder: that Triton is to be given.
        models: the one that clients ask first.
        bundle: hash of the bundle.
        linked: whether its files are shared with the bundle that was given; None where they are not in the repository.
        bytes: of files that take room of their own.
    """

    folder: Path
    models: tuple[str, ...]
    bundle: str
    linked: bool | None
    bytes: int


def write(bundle: Path, output: Path, plan: RepositoryPlan, *, force: bool = False) -> WrittenRepository:
    """Writes the model repository of a bundle.

    Args:
        bundle: its folder.
        output: becomes the repository, all at once.
        force: replace a repository that is there.

    Raises:
        BundleError: it is no bundle, not whole, cannot make pictures, or has no reference samples to be proven by.
        InputError: the output is something else, or is there and not to be replaced, or no run is within the limits.
        StorageError: the disk refuses.
    """
    source = BundleFolder(bundle, plan.allow_links)
    manifest = source.manifest()
    _check(manifest, bundle, plan)
    verify_files(source, manifest.files, "size")  # the server compares hashes, each time it starts
    with replacing(output, force=force) as folder:
        version = _write_models(folder, manifest, plan)
        linked = None
        if plan.bundle in BUNDLES:
            linked = _take_bundle(source, manifest.files, version / BUNDLE, link=plan.bundle == "link")
        size = _own_bytes(folder)
    return WrittenRepository(output, (plan.name, plan.stream), manifest.digest, linked, size)


def _write_models(folder: Path, manifest: Manifest, plan: RepositoryPlan) -> Path:
    """Writes both models, but for the bundle, into the repository ``folder``; the version folder that it goes into."""
    _write_model(folder, _front(manifest, plan), "unary_model")
    values = warm_up(manifest)
    version = _write_model(folder, _stream(manifest, plan, values), "decoupled_model")
    beside = version.parent / WARM_UP
    beside.mkdir()
    for name, value in values.items():
        (beside / name).write_bytes(value)
    return version


def _write_model(folder: Path, config: ModelConfig, module: str) -> Path:
    """Writes a model of a ``module`` of `hidiff_runtime.serving.triton` into ``folder``; its version's folder."""
    version = folder / config.name / VERSION
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(config.text(), encoding="utf-8")
    (version / "model.py").write_text(_MODEL.format(module=module), encoding="utf-8")
    return version


def _own_bytes(folder: Path) -> int:
    """Returns bytes of the files that take room of their own, as hard links do not."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum(status.st_size for status in found if status.st_nlink == 1)


def _take_bundle(bundle: BundleFolder, files: Iterable[str], target: Path, *, link: bool) -> bool:
    """Puts a bundle's files and its manifest into ``target``; whether all of them are hard links."""
    linked = []
    for path in (MANIFEST, *files):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        linked.append(link and _linked(bundle.file(path), target / path))
        if not linked[-1]:
            shutil.copyfile(bundle.file(path), target / path)
    return all(linked)


def _linked(source: Path, target: Path) -> bool:
    """Makes a hard link, which takes no room and is as safe as a copy, for nothing changes a bundle's files in place.

    Returns whether it could: not where the disk is another one, or has no hard links.
    """
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        return False
    return True


@contextmanager
def replacing(output: Path, *, force: bool) -> Iterator[Path]:
    """Yields an empty folder that becomes ``output`` when all went well, and goes away otherwise.

    Raises:
        InputError: ``output`` is there and is not a model repository, or is one and not to be replaced; or it can never
            become one, see `hidiff_export.compiler.output_folder`.
        StorageError: the disk refuses.
    """
    output = output_folder(output, (_LONGEST,))
    with storage_errors(output):
        _refuse(output, force=force)
        make_parents(output)
        folder = Path(tempfile.mkdtemp(prefix=f"{output.name}.", suffix=_PARTIAL, dir=output.parent))
        old = folder.with_suffix(_REPLACED)
        try:
            folder.chmod(0o755)
            if output.exists():
                try_renaming(output, old)
            yield folder
            _refuse(output, force=force)  # again: it may have been put there meanwhile
            if output.exists():
                output.rename(old)
            folder.rename(output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if old.exists() and not output.exists():
                old.rename(output)
        if old.exists():
            shutil.rmtree(old)


def _refuse(output: Path, *, force: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not all((entry / "config.pbtxt").is_file() for entry in output.iterdir()):
        raise InputError(
            "The output is there and is no model repository.", given=output, advice="Give a folder that is not there."
        )
    if not force:
        raise InputError(
            "The output is a model repository already.", given=output, advice="Use --force to replace it, or another."
        )


def _check(manifest: Manifest, bundle: Path, plan: RepositoryPlan) -> None:
    """Refuses a bundle that no server would get ready with."""
    require_text_and_vae(manifest, bundle)
    if manifest.reference is None:
        raise BundleError(
            "The bundle has no reference samples, by which the server proves its engines.",
            given=bundle,
            advice="Build it again; 'hidiff-export build' records them.",
        )
    if manifest.steps[0] > plan.limits.steps:
        raise InputError(
            "No run of this bundle is within the limit of steps.",
            given=f"at least {manifest.steps[0]} steps, at most {plan.limits.steps}",
        )


def _stream(manifest: Manifest, plan: RepositoryPlan, values: Mapping[str, bytes]) -> ModelConfig:
    """Returns the model that holds the engines."""
    place = BUNDLE if plan.bundle in BUNDLES else plan.bundle
    links = () if plan.bundle in BUNDLES else plan.allow_links
    parameters = Parameters(place, manifest.digest, plan.limits, plan.options, links, plan.dynamic_batching)
    return ModelConfig(
        name=plan.stream,
        inputs=INPUTS,
        outputs=(*PROGRESS, *results(manifest)),
        places=plan.places,
        queue=replace(plan.queue, together=plan.dynamic_batching),
        parameters={**parameters.to_config(), **_environment(plan)},
        decoupled=True,
        warm_up=tuple(tensor for tensor in INPUTS if tensor.name in values),
    )


def _front(manifest: Manifest, plan: RepositoryPlan) -> ModelConfig:
    """Returns the model that clients ask, with as many instances as the engines, so that none of these is idle."""
    return ModelConfig(
        name=plan.name,
        inputs=INPUTS,
        outputs=results(manifest),
        places=InstancePlacement(count=plan.places.instances),
        queue=plan.queue,
        parameters={
            STREAM: plan.stream,
            "bundle_hash": manifest.digest,
            **_at_once(manifest, plan),
            **_environment(plan),
        },
    )


def _at_once(manifest: Manifest, plan: RepositoryPlan) -> dict[str, str]:
    """Returns the parameter by which the front asks for so many that a batch waits while another one is drawn.

    All fronts together ask for no more than wait in the queue of the model that they ask, which would refuse them.
    """
    if not plan.dynamic_batching:
        return {}
    largest = max(one.batch for one in manifest.whole.manifests)
    return {AT_ONCE: str(min(2 * min(largest, MOST_ROWS), max(1, plan.queue.size // plan.places.instances)))}


def _environment(plan: RepositoryPlan) -> dict[str, str]:
    """Returns the parameter by which Triton's Python backend finds a model's environment, if it has one of its own."""
    return {"EXECUTION_ENV_PATH": plan.environment} if plan.environment else {}
