"""An open bundle: its manifest, its sampler tables, and its engines on the backend of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hidiff_runtime.backends import choose
from hidiff_runtime.backends.device_tensors import DeviceTensors
from hidiff_runtime.backends.fork_safety import left_behind, on_fork
from hidiff_runtime.backends.protocol import Backend, Device, Session
from hidiff_runtime.backends.session_pool import CONTROLNET, STEP, EngineKey, Network, SessionPool
from hidiff_runtime.denoising.denoiser import Denoiser
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.format.bundle_folder import BundleFolder, LinksOption
from hidiff_runtime.format.integrity import CheckedFiles, State, state_of, verify_files
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.specs import GraphRecord, TextEncoderRecord
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.table_validation import check_table, check_tables

LOOPS = ("auto", "host", "device")

_NO_TEXT = ("text encoder", "Give embeddings, or build it with text: true in the recipe.")
_NO_VAE = ("VAE", "Take latents, or build it with vae: true in the recipe.")
_MISSING = {
    CONTROLNET: ("ControlNet", "Build it with controlnet in the recipe."),
    STEP: ("step graph", "Build the bundle again."),
    "text_encoder": _NO_TEXT,
    "text_encoder_2": _NO_TEXT,
    "vae_decoder": _NO_VAE,
    "vae_encoder": _NO_VAE,
}
"""What a graph is called that is not there, and what to do about it."""


class Bundle:
    """A bundle that :func:`open` opened. A context manager: leaving it closes every engine.

    Args:
        known: the files that need no look at their hash while they are in the states they were in before they were
            verified: all of them, or weight stores alone where only sizes were compared.

    Attributes:
        root: the folder.
        manifest: what it holds.
        lock: held by a run, since engines are shared by all runs on the bundle.
    """

    def __init__(
        self,
        folder: BundleFolder,
        manifest: Manifest,
        backend: Backend,
        known: Mapping[str, State],
        options: Mapping[str, Any],
        *,
        resident: str,
        prefetch: bool,
        loop: str,
    ) -> None:
        if loop not in LOOPS:
            raise InputError(
                f"loop must be one of {', '.join(LOOPS)}.", given=repr(loop), advice="'auto' is right on any device."
            )
        self.root = folder.root
        self._folder = folder
        self.manifest = manifest
        self.lock = threading.RLock()
        self._backend = backend
        self._resident = resident
        self._loop = loop
        self._new_device = partial(backend.device, options)
        self._device = self._new_device()
        self._entered: Device | None = None
        self._tensors: DeviceTensors | None = None
        self._files = CheckedFiles(folder, manifest.files, known)
        self._new_pool = partial(SessionPool, self._open_engine, resident, prefetch=prefetch)
        self._engines = self._new_pool()
        on_fork(self)
        self._samplers: dict[str, SamplerTable] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        if loop == "device" and not self._has_step_engine():
            raise BundleError(
                "The bundle has no step engine of this backend, which loop='device' needs.",
                given=backend.name,
                advice="Use loop='auto', or build the bundle again.",
            )

    @property
    def backend(self) -> str:
        """The name of the backend whose engines run."""
        return self._backend.name

    @property
    def on_host(self) -> bool:
        """Whether the engines run on the CPU, by a device that keeps arrays there.

        Raises:
            EngineError: the device is missing here.
        """
        with self.lock:
            memory = self._enter().memory
            return memory is not None and memory.on_host

    @property
    def open_phases(self) -> tuple[Phase, ...]:
        """The phases whose engines are open."""
        return self._engines.open_phases

    def denoiser(self) -> Denoiser:
        """Returns what runs the bundle."""
        return Denoiser(self)

    def sampler(self, name: str | None = None) -> SamplerTable:
        """Returns a sampler's table, read once; the bundle's default sampler without a name.

        Raises:
            InputError: the bundle has no such sampler.
        """
        chosen = self.manifest.default_sampler if name is None else name
        if not isinstance(chosen, str) or chosen not in self.manifest.samplers:
            raise InputError(
                "This bundle has no such sampler.",
                given=chosen,
                advice=f"Use one of {', '.join(sorted(self.manifest.samplers))}, or build the bundle with it.",
            )
        if chosen not in self._samplers:
            self._samplers[chosen] = self._table(chosen)
        return self._samplers[chosen]

    def tokenizer(self, record: TextEncoderRecord) -> Tokenizer:
        """Returns a text encoder's tokenizer; one that was read stays where every engine does.

        Raises:
            BundleError: the file is missing, has changed, or is no tokenizer.
            EngineError: the `tokenizers` library is missing.
        """
        known = self._tokenizers.get(record.name)
        if known is None:
            known = Tokenizer.kept(self.file(record.tokenizer), record.places)
            if self._resident == "all":
                self._tokenizers[record.name] = known
        return known

    def lost_files(self) -> tuple[str, ...]:
        """Returns the files that the next run reads anew and that are not there, or not of their size; reads none of
        them.

        None where every engine stays open: those files are read no more.
        """
        if self._resident == "all":
            return ()
        graphs = [*self.manifest.phases, *(record for _, record in self.manifest.others())]
        engines = [record.engines[self.backend] for record in graphs if self.backend in record.engines]
        tokenizers = [record.tokenizer for record in self.manifest.text_encoders]
        return self._files.lost((*engines, *self.manifest.weights.values(), *tokenizers))

    def check_samplers(self) -> None:
        """Reads each sampler's table and compares it with the manifest.

        Raises:
            BundleError: one is broken, or not the one that the manifest names.
        """
        check_tables(self.manifest, self._table)

    def file(self, name: str) -> Path:
        """Returns a file of the bundle by its path in the manifest, as that says it is; see `CheckedFiles`.

        Raises:
            BundleError: another has taken its place since the bundle was opened, or it is no file of the bundle.
        """
        return self._files.file(name)

    def engine(self, phase: Phase, *, upcoming: Phase | None = None) -> Session:
        """Returns the phase's session, opened if need be; valid until another phase's is asked for.

        Args:
            phase: whose.
            upcoming: the phase that will be asked for next, whose engine opens meanwhile where ``prefetch`` is on.

        Raises:
            EngineError: the engine does not load.
        """
        with self.lock:
            session = self._engines.get(phase)
            if upcoming is not None:
                self._engines.prefetch(upcoming)
            return session

    def controlnet_engine(self) -> Session:
        """Returns the ControlNet's session, opened if need be; valid until a phase without residuals is asked for.

        Raises:
            BundleError: the bundle has no ControlNet.
            EngineError: the engine does not load.
        """
        with self.lock:
            return self._engines.get(CONTROLNET)

    def step_engine(self) -> Session:
        """Returns the step graph's session, opened if need be; valid until the bundle is closed.

        Raises:
            BundleError: the bundle has no step graph.
            EngineError: the engine does not load.
        """
        with self.lock:
            return self._engines.get(STEP)

    @contextmanager
    def network(self, name: Network) -> Iterator[Session]:
        """Yields the session of a text encoder, of the VAE's decoder or its encoder, closed at the end unless all may
        stay.

        Raises:
            BundleError: the bundle has none.
            EngineError: the engine does not load.
        """
        with self.lock, self._engines.borrow(name, self.manifest.phases[0].phase) as session:
            yield session

    def tensors(self) -> DeviceTensors | None:
        """Returns what runs keep on the device from step to step; None where the host keeps it.

        Raises:
            EngineError: the device is missing here, or has no memory though ``loop`` is ``device``.
        """
        with self.lock:
            if self._loop == "host" or not self._has_step_engine():
                return None
            memory = self._enter().memory
            if memory is None and self._loop == "device":
                raise EngineError(
                    "This backend's device keeps no arrays, which loop='device' needs.",
                    given=self.backend,
                    advice="Use loop='auto'.",
                )
            if memory is None or (memory.on_host and self._loop == "auto"):
                return None
            if self._tensors is None:
                self._tensors = DeviceTensors(memory)
            return self._tensors

    def preload(self) -> None:
        """Opens engines ahead: the first phase's and its ControlNet's, or all of them where all may stay resident."""
        with self.lock:
            phases = [record.phase for record in self.manifest.phases]
            wanted = phases if self._resident == "all" else phases[:1]
            step = self.tensors() is not None
            for phase in wanted:
                self._engines.get(phase)
            if self.manifest.controlnet is not None and any(phase.control for phase in wanted):
                self._engines.get(CONTROLNET)
            if step:
                self._engines.get(STEP)

    def close(self) -> None:
        """Closes every engine and the device; waits for a run in progress. Using the bundle again opens them again.

        Raises:
            EngineError: something that was asked of the device failed; all is closed.
        """
        with self.lock, ExitStack() as closing:
            self._tensors = None
            self._tokenizers = {}
            if self._entered is not None:
                closing.push(self._entered)
                self._entered, self._device = None, self._new_device()
            closing.callback(self._engines.close)

    def forked(self) -> None:
        """Makes the bundle this process's own, where the parent was in the middle of a run: nobody here ends that.

        Engines that were open are left as they are: closing them may wait for threads that stayed behind.
        """
        if self.lock.acquire(blocking=False):
            self.lock.release()
            return
        left_behind.append((self._engines, self._entered, self._tensors))
        self.lock = threading.RLock()
        self._entered, self._device, self._tensors = None, self._new_device(), None
        self._engines = self._new_pool()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except EngineError:
            if kind is None:  # else it was told already: after a failure a GPU refuses everything
                raise

    def _table(self, name: str) -> SamplerTable:
        table = SamplerTable.read(self.file(self.manifest.samplers[name]))
        check_table(self.manifest, name, table)
        return table

    def _has_step_engine(self) -> bool:
        return self.manifest.step is not None and self.backend in self.manifest.step.engines

    def _enter(self) -> Device:
        """Returns the device, entered when it is first needed. A thread that opens an engine ahead finds it entered."""
        if self._entered is None:
            self._entered = self._device.__enter__()
        return self._entered

    def _record(self, key: EngineKey) -> GraphRecord:
        if isinstance(key, Phase):
            return self.manifest.phase(key)
        record = dict(self.manifest.others()).get(key)
        if record is None:
            named, advice = _MISSING[key]
            raise BundleError(f"The bundle has no {named}.", given=self.root, advice=advice)
        return record

    def _open_engine(self, key: EngineKey) -> Session:
        """Returns a session of an engine, all of whose files are the manifest's even where only sizes were checked.

        Weight stores, whose hashes take long, are then compared only where they changed since the bundle was opened.
        """
        record = self._record(key)
        relative = record.engines[self.backend]
        path = self._checked_engine(relative)
        if store := self.manifest.weights.get(Path(record.graph).parent.as_posix()):
            self.file(store)
        weights = {name: self._folder.file(store) for name, store in self.manifest.weights.items()}
        return self._enter().open(path, weights, record)

    def _checked_engine(self, relative: str) -> Path:
        """Returns an engine, all of whose files are the manifest's. Raises BundleError for one that is not."""
        path = self.file(relative)
        root = path.parents[relative.count("/")]
        for part in self._backend.files(path):
            if not part.is_relative_to(root):
                raise BundleError(f"The engine {relative} names a file outside the bundle.", given=part)
            self.file(part.relative_to(root).as_posix())
        return path


def open(
    folder: str | Path,
    *,
    verify: str = "hash",
    backend: str | Backend | None = None,
    resident: str = "current",
    prefetch: bool = False,
    loop: str = "auto",
    preload: bool = False,
    allow_links: LinksOption = (),
    **options: Any,
) -> Bundle:
    """Opens the bundle in ``folder``.

    Args:
        verify: ``hash`` reads every file and compares SHA-256; ``size`` compares sizes, for fast starts, and hashes
            what is not a weight store when it is first used.
        backend: whose engines to run; the first that this machine has, if left out.
        resident: ``current`` keeps one phase's engine open, ``all`` keeps every one that was used.
        prefetch: opens the next phase's engine in a thread while the current one runs: a phase change then takes no
            time, and twice the memory.
        loop: where a run keeps latents, embeddings and the sampler's state. ``auto`` leaves them on the device from the
            first step to the last if that is not the host itself; ``device`` does so there too; ``host`` never does.
        preload: opens engines now instead of at their first step.
        allow_links: folders that symbolic links in the bundle may lead into, besides the bundle itself and the cache or
            store that it lies in, where `hidiff_runtime.format.bundle_folder` knows that.
        options: of the backend.

    Raises:
        BundleError: the folder is no bundle, or is broken, incomplete or of a newer format.
        EngineError: the backend is not installed.
        InputError: an option is not one there is.
    """
    place = BundleFolder(folder, allow_links)
    manifest = place.manifest()
    hashed = manifest.files if verify == "hash" else manifest.weights.values()
    states = ((path, state_of(place.file(path))) for path in hashed)
    known = {path: state for path, state in states if state is not None}
    verify_files(place, manifest.files, verify)
    chosen = choose(manifest, backend)
    bundle = Bundle(place, manifest, chosen, known, options, resident=resident, prefetch=prefetch, loop=loop)
    bundle.check_samplers()
    if preload:
        with ExitStack() as closing:  # where one engine does not open, those before it are closed
            closing.push(bundle)
            bundle.preload()
            closing.pop_all()
    return bundle
