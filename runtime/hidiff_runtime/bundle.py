"""An open bundle: its manifest, its sampler tables, and its engines on the backend of this machine."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hidiff_runtime import backends
from hidiff_runtime.backends.protocol import Backend, Device, Session
from hidiff_runtime.denoiser import Denoiser
from hidiff_runtime.engines import CONTROLNET, ControlNetKey, EnginePool
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.files import fault_of, verify_files
from hidiff_runtime.manifest import GraphRecord, Manifest
from hidiff_runtime.paths import inside
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampler import SamplerTable


class Bundle:
    """A bundle that :func:`open` opened. A context manager: leaving it closes every engine.

    Attributes:
        root: the folder.
        manifest: what it holds.
        lock: held by a run, since engines are shared by all runs on the bundle.
    """

    def __init__(
        self, root: Path, manifest: Manifest, backend: Backend, resident: str, options: Mapping[str, Any]
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.lock = threading.RLock()
        self._backend = backend
        self._options = options
        self._device = backend.device(options)
        self._entered: Device | None = None
        self._engines = EnginePool(self._open_engine, resident)
        self._samplers: dict[str, SamplerTable] = {}

    @property
    def backend(self) -> str:
        """The name of the backend whose engines run."""
        return self._backend.name

    @property
    def open_phases(self) -> tuple[Phase, ...]:
        """The phases whose engines are open."""
        return self._engines.open_phases

    def denoiser(self) -> Denoiser:
        """What runs the bundle."""
        return Denoiser(self)

    def sampler(self, name: str | None = None) -> SamplerTable:
        """A sampler's table, read once; the bundle's default sampler without a name.

        Raises:
            InputError: the bundle has no such sampler.
        """
        chosen = self.manifest.default_sampler if name is None else name
        path = self.manifest.samplers.get(chosen)
        if path is None:
            raise InputError(
                "This bundle has no such sampler.",
                given=chosen,
                advice=f"Use one of {', '.join(sorted(self.manifest.samplers))}, or build the bundle with it.",
            )
        if chosen not in self._samplers:
            self._samplers[chosen] = SamplerTable.read(inside(self.root, path))
        return self._samplers[chosen]

    def engine(self, phase: Phase) -> Session:
        """The phase's session, opened if need be; valid until another phase's is asked for.

        Raises:
            EngineError: the engine does not load.
        """
        with self.lock:
            return self._engines.get(phase)

    def controlnet_engine(self) -> Session:
        """The ControlNet's session, opened if need be; valid until a phase without residuals is asked for.

        Raises:
            BundleError: the bundle has no ControlNet.
            EngineError: the engine does not load.
        """
        with self.lock:
            return self._engines.controlnet()

    def preload(self) -> None:
        """Opens engines ahead: the first phase's and its ControlNet's, or all of them where all may stay resident."""
        with self.lock:
            phases = tuple(record.phase for record in self.manifest.phases)
            self._engines.preload(phases, controlnet=self.manifest.controlnet is not None)

    def close(self) -> None:
        """Closes every engine and the device; waits for a run in progress. Using the bundle again opens them again."""
        with self.lock:
            self._engines.close()
            if self._entered is not None:
                self._entered.__exit__(None, None, None)
                self._entered, self._device = None, self._backend.device(self._options)

    def device(self) -> Device:
        """The backend's device, entered when it is first asked for, left when the bundle is closed.

        Raises:
            EngineError: the backend or the device is missing here.
        """
        with self.lock:
            if self._entered is None:
                self._entered = self._device.__enter__()
            return self._entered

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, key: Phase | ControlNetKey) -> GraphRecord:
        if key != CONTROLNET:
            return self.manifest.phase(key)
        if self.manifest.controlnet is None:
            raise BundleError(
                "The bundle has no ControlNet.", given=self.root, advice="Build it with controlnet in the recipe."
            )
        return self.manifest.controlnet

    def _open_engine(self, key: Phase | ControlNetKey) -> Session:
        """Opens an engine, whose content must be the manifest's even where only sizes were checked."""
        record = self._record(key)
        relative = record.engines[self._backend.name]
        path = inside(self.root, relative)
        fault = fault_of(path, self.manifest.files[relative])
        if fault:
            raise BundleError(f"The engine {relative} {fault}.", advice="Fetch the bundle again, or build it again.")
        weights = {name: inside(self.root, store) for name, store in self.manifest.weights.items()}
        return self.device().open(path, weights, record)


def open(
    folder: str | Path,
    *,
    verify: str = "hash",
    backend: str | Backend | None = None,
    resident: str = "current",
    preload: bool = False,
    **options: Any,
) -> Bundle:
    """Opens the bundle in ``folder``.

    Args:
        verify: ``hash`` reads every file and compares SHA-256; ``size`` compares sizes, for fast starts, and hashes
            an engine when it is opened.
        backend: whose engines to run; the first that this machine has, if left out.
        resident: ``current`` keeps one phase's engine open, ``all`` keeps every one that was used.
        preload: opens engines now instead of at their first step.
        options: of the backend.

    Raises:
        BundleError: the folder is no bundle, or is broken, incomplete or of a newer format.
        EngineError: the backend is not installed.
        InputError: an option is not one there is.
    """
    root = Path(folder)
    manifest = Manifest.read(root)
    verify_files(root, manifest.files, verify)
    bundle = Bundle(root, manifest, _choose(manifest, backend), resident, options)
    if preload:
        bundle.preload()
    return bundle


def _choose(manifest: Manifest, wanted: str | Backend | None) -> Backend:
    """The backend to use: it has an engine for every graph, and it can run here."""
    graphs = [*manifest.phases, *((manifest.controlnet,) if manifest.controlnet is not None else ())]
    offered = [name for name in graphs[0].engines if all(name in graph.engines for graph in graphs)]
    if wanted is None:
        known = [backends.get(name) for name in backends.NAMES if name in offered]
        if not known:
            raise BundleError(
                "The bundle has no engines that this hidiff-runtime knows.",
                given=", ".join(offered) or "no backend with an engine for every graph",
                advice=f"Build it for one of {', '.join(backends.NAMES)}, or upgrade hidiff-runtime.",
            )
        chosen = next((backend for backend in known if backend.available().usable), known[0])
    else:
        chosen = backends.get(wanted) if isinstance(wanted, str) else wanted
        if chosen.name not in offered:
            raise InputError(
                "The bundle has no engines of this backend.", given=chosen.name, advice=f"It has {', '.join(offered)}."
            )
    availability = chosen.available()
    if not availability.usable:
        raise EngineError(
            f"The backend {chosen.name} cannot run here.", given=availability.detail, advice=availability.advice
        )
    return chosen
