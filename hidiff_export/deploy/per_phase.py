"""A Triton model repository where every engine is a model of its own, which Triton itself opens and places.

``NAME_stream`` then holds no engine: it has the manifest, tokenizers, sampler tables and reference samples alone (a
*thin* bundle) and asks ``NAME_strided``, ``NAME_vae_decoder`` and the others for each evaluation. ``NAME_start`` loads
it after them. The models cannot share a file: each has all weights that it points to, without taking room on disks
that have hard links, but in memory as a copy of its own.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hidiff_export.deploy.engine_config import PLATFORMS, SingleConfig, engine_config, start_config
from hidiff_export.deploy.engine_files import EngineFiles, take_onnx, take_plan
from hidiff_export.errors import InputError
from hidiff_export.triton.model_config import InstancePlacement
from hidiff_export.triton.repository import (
    BUNDLE,
    BUNDLES,
    RepositoryPlan,
    WrittenRepository,
    check,
    environment,
    own_bytes,
    replacing,
    take_bundle,
    write_config,
    write_model,
    write_pipeline,
)
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import CheckedFiles, state_of, verify_files
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.serving.triton.layout import ENGINES, PREFIX, engine_models

_OPTIONS = ("backend", "resident", "prefetch")
"""Of opening a bundle; the last two mean nothing where Triton keeps all engines open."""


_RESTRICTIONS = ("http-restricted-api", "grpc-restricted-protocol")


@dataclass(frozen=True)
class PerPhase:
    """A finished repository.

    Args:
        written: what any repository is.
        backend: whose engines the models are.
        engines: what each engine's model takes, by the model's name.
        weights: bytes of the bundle's weights, each once.
        start: the model that loads the pipeline.
    """

    written: WrittenRepository
    backend: str
    engines: Mapping[str, EngineFiles]
    weights: int
    start: str

    @property
    def copies(self) -> int:
        """Bytes of weights that the server holds on each device, all models together."""
        return sum(files.weights for files in self.engines.values())

    @property
    def needs(self) -> tuple[str, ...]:
        """What runs the engines, for people."""
        return tuple(dict.fromkeys(files.needs for files in self.engines.values() if files.needs))

    def options(self, secret: str) -> tuple[str, ...]:
        """The options of ``tritonserver`` that serve it.

        Pipeline and front are left to the start model, which takes that models may be loaded by name. Whoever may do
        that over the network could load a model of his own making, so it takes a secret there.

        Args:
            secret: what the header ``hidiff`` must be (over gRPC ``triton-grpc-protocol-hidiff``) to load models.
        """
        loaded = (f"--load-model={name}" for name in (*self.engines, self.start))
        closed = (f"--{what}=model-repository:hidiff={secret}" for what in _RESTRICTIONS)
        return ("--model-control-mode=explicit", *loaded, *closed)


def write_per_phase(bundle: Path, output: Path, plan: RepositoryPlan, *, force: bool = False) -> PerPhase:
    """Writes the model repository of a bundle with a model for each engine.

    Args:
        bundle: its folder.
        output: becomes the repository, all at once.
        plan: ``bundle`` says how files come into the repository; of ``options`` only ``backend`` has a meaning here.
        force: replace a repository that is there.

    Raises:
        BundleError: it is no bundle, is broken, or cannot make pictures, or has no reference samples to be proven by.
        InputError: Triton has no platform for its engines, one engine holds all phases, or the plan asks for something
            else that cannot be.
        StorageError: the disk refuses.
    """
    source = BundleFolder(bundle, plan.allow_links)
    manifest = source.manifest()
    check(manifest, bundle, plan)
    _check(plan)
    models = engine_models(manifest, plan.name)
    backend = _backend(models, plan.options.get("backend"))
    states = {name: state for name in manifest.files if (state := state_of(source.file(name))) is not None}
    verify_files(source, manifest.files)  # the server cannot: the pipeline's hashes are not those of what Triton opens
    start, link = f"{plan.name}_start", plan.bundle == "link"
    with replacing(output, force=force) as folder:
        found = {ENGINES: backend, PREFIX: plan.name}
        stream = write_pipeline(folder, manifest, _pipeline_plan(plan), "per_phase", found)
        linked = take_bundle(source, manifest.thin_files(), stream / BUNDLE, link=link)
        write_model(folder, start_config(start, (plan.stream, plan.name), environment(plan)), "start")
        files = {source.file(path) for path in manifest.files}
        engines = {}
        for name, record in models.items():
            engine, config = source.file(record.engines[backend]), engine_config(name, record, backend, plan.places)
            engines[name] = _write_engine(folder, config, engine, files, link)
        written = WrittenRepository(output, (plan.name, plan.stream), manifest.digest, linked, own_bytes(folder))
        checked = CheckedFiles(source, manifest.files, states)
        for name in manifest.files:
            checked.file(
                name
            )  # again where it is another than the one that was hashed, before the folder gets its name
    stores = sum(manifest.files[path].size for path in manifest.weights.values())
    return PerPhase(written, backend, engines, stores, start)


def _check(plan: RepositoryPlan) -> None:
    """Refuses what the other layout can do alone."""
    if plan.bundle not in BUNDLES:
        raise InputError(
            "Triton's own models have their files in the repository, so that the bundle cannot stay elsewhere.",
            given=f"--bundle {plan.bundle}",
            advice=f"Use --bundle {' or '.join(BUNDLES)}.",
        )
    strange = [name for name in plan.options if name not in _OPTIONS]
    if strange:
        raise InputError(
            "Where every engine is a model of its own, Triton opens it, and options of a backend mean nothing.",
            given=", ".join(strange),
            advice="Leave them out, and change the models' config.pbtxt.",
        )


def _backend(models: Mapping[str, GraphRecord], wanted: object) -> str:
    """The backend whose engines become models: every graph has one, and Triton can open it."""
    offered = [
        name for name in next(iter(models.values())).engines if all(name in one.engines for one in models.values())
    ]
    if wanted is not None and wanted not in offered:
        raise InputError(
            "The bundle has no engines of this backend.", given=wanted, advice=f"It has {', '.join(offered)}."
        )
    candidates = offered if wanted is None else [wanted]
    chosen = next((name for name in PLATFORMS if name in candidates), None)
    if chosen is None:
        raise InputError(
            "Triton has no platform for these engines.",
            given=", ".join(map(str, candidates)),
            advice=f"Use --layout pipeline, which opens them itself, or build the bundle for {' or '.join(PLATFORMS)}.",
        )
    return chosen


def _pipeline_plan(plan: RepositoryPlan) -> RepositoryPlan:
    """The pipeline holds no engine: it is on the CPU, as often as there are engines, and opens with no options."""
    return replace(plan, places=InstancePlacement(count=plan.places.instances), options={})


def _write_engine(folder: Path, config: SingleConfig, engine: Path, files: Container[Path], link: bool) -> EngineFiles:
    """The model of one engine, whose parts are among the bundle's files."""
    take = take_plan if config.kind[1] == PLATFORMS["tensorrt"] else take_onnx
    return take(engine, write_config(folder, config), link=link, files=files)
