"""An open bundle, as what draws pictures of one of its sizes: what it holds for it, tables, and engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hidiff_runtime.backend_choice import choose
from hidiff_runtime.backends.device_tensors import DeviceTensors
from hidiff_runtime.backends.protocol import Backend, Session
from hidiff_runtime.bundle_engines import BundleEngines
from hidiff_runtime.denoising.denoiser import Denoiser
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.format.bundle_folder import BundleFolder, LinksOption
from hidiff_runtime.format.integrity import state_of, verify_files
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.specs import (
    CONTROLNET,
    STEP,
    UNGUIDED_CONTROLNET,
    UNGUIDED_STEP,
    GraphRecord,
    Network,
    PhaseRecord,
    TextEncoderRecord,
)
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.table_validation import check_table, check_tables
from hidiff_runtime.timing_process import measure_in_process

LOOPS = ("auto", "host", "device")

_NO_TEXT = ("text encoder", "Give embeddings, or build it with text: true in the recipe.")
_NO_VAE = ("VAE", "Take latents, or build it with vae: true in the recipe.")
_MISSING = {
    CONTROLNET: ("ControlNet", "Build it with controlnet in the recipe."),
    UNGUIDED_CONTROLNET: ("ControlNet for phases without guidance", "Build it again."),
    STEP: ("step graph", "Build the bundle again."),
    UNGUIDED_STEP: ("step graph for phases without guidance", "Build the bundle again."),
    "text_encoder": _NO_TEXT,
    "text_encoder_2": _NO_TEXT,
    "vae_decoder": _NO_VAE,
    "vae_encoder": _NO_VAE,
}
"""What a graph is called that is not there, and what to do about it."""


class Bundle:
    """One bucket of a bundle that :func:`open` opened. A context manager: leaving it closes every engine.

    Args:
        engines: of the bundle, which all its buckets share.
        manifest: what the bundle holds for the bucket.
        loop: where a run keeps latents, see :func:`open`.

    Attributes:
        manifest: what the bundle holds for the bucket.
    """

    def __init__(self, engines: BundleEngines, manifest: Manifest, loop: str = "auto") -> None:
        if loop not in LOOPS:
            raise InputError(
                f"loop must be one of {', '.join(LOOPS)}.", given=repr(loop), advice="'auto' is right on any device."
            )
        self.manifest = manifest
        self._engines = engines
        self._loop = loop
        if loop == "device" and not self._has_step_engine():
            raise BundleError(
                "The bundle has no step engine of this backend, which loop='device' needs.",
                given=self.backend,
                advice="Use loop='auto', or build the bundle again.",
            )

    @property
    def root(self) -> Path:
        """The bundle's folder."""
        return self._engines.root

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held by a run, since engines are shared by all runs on the bundle."""
        return self._engines.lock

    @property
    def backend(self) -> str:
        """The name of the backend whose engines run."""
        return self._engines.backend.name

    @property
    def backend_reason(self) -> str:
        """Why it is that one."""
        return self._engines.choice.reason

    @property
    def on_host(self) -> bool:
        """Whether the engines run on the CPU, by a device that keeps arrays there.

        Raises:
            EngineError: the device is missing here.
        """
        memory = self._engines.memory
        return memory is not None and memory.on_host

    @property
    def widens_halves(self) -> bool:
        """Whether engines of half precision keep float32 between operations here: on the CPU all but OpenVINO's do.

        Raises:
            EngineError: the device is missing here.
        """
        return self.backend != "openvino" and self.on_host

    @property
    def open_phases(self) -> tuple[Phase, ...]:
        """The bucket's phases whose engines are open."""
        phases = {record.graph: record.phase for record in self.manifest.phases}
        return tuple(phases[graph] for graph in self._engines.open_graphs if graph in phases)

    @property
    def buckets(self) -> tuple[Bundle, ...]:
        """The bundle once for each bucket, this one too; engines are shared, and closed with any of them."""
        contents = self.manifest.whole
        return tuple(Bundle(self._engines, manifest, self._loop) for manifest in contents.manifests)

    def sized(self, width: int | None = None, height: int | None = None, batch: int | None = None) -> Bundle:
        """Returns the bundle for pictures of a size; this one where it is its own.

        Args:
            width: in pixels; this one's if left out.
            height: the same.
            batch: pictures of a run; where it is left out or the bundle has no such batch of this size, this one's,
                or the first of the size.

        Raises:
            InputError: the bundle has none of that size; those that it has are told.
        """
        own = self.manifest
        size = (own.width if width is None else width, own.height if height is None else height)
        every = own.whole.manifests
        alike = {one.batch: one for one in reversed(every) if size == (one.width, one.height)}
        if alike:
            fitting = next((alike[each] for each in (batch, own.batch) if each in alike), [*alike.values()][-1])
            return self if fitting == own else Bundle(self._engines, fitting, self._loop)
        sizes = dict.fromkeys(f"{manifest.width}x{manifest.height}" for manifest in every)
        raise InputError(
            "The bundle has no such width and height.",
            given=f"{size[0]}x{size[1]}",
            advice=f"Use one that it has: {', '.join(sizes)}. 'hidiff-export add' adds one.",
        )

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
        known = self._engines.samplers
        if chosen not in known:
            known[chosen] = self._table(chosen)
        return known[chosen]

    def tokenizer(self, record: TextEncoderRecord) -> Tokenizer:
        """Returns a text encoder's tokenizer; one that was read stays where every engine does.

        Raises:
            BundleError: the file is missing, has changed, or is no tokenizer.
            EngineError: the `tokenizers` library is missing.
        """
        return self._engines.tokenizer(record)

    def lost_files(self) -> tuple[str, ...]:
        """Returns the files that the next run reads anew and that are not there, or not of their size; reads none of
        them.

        None where every engine stays open: those files are read no more.
        """
        return self._engines.lost_files()

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
        return self._engines.files.file(name)

    def engine(self, phase: Phase, *, upcoming: Phase | None = None) -> Session:
        """Returns the phase's session, opened if need be; valid until another phase's is asked for.

        Args:
            phase: whose.
            upcoming: the phase that will be asked for next, whose engine opens meanwhile where ``prefetch`` is on.

        Raises:
            EngineError: the engine does not load.
        """
        manifest = self.manifest
        with self.lock:
            record = manifest.phase(phase)
            session = self._engines.get(record, self._beside(record))
            if upcoming is not None:
                self._engines.prefetch(manifest.phase(upcoming))
            return session

    def controlnet_engine(self, *, unguided: bool = False) -> Session:
        """Returns the ControlNet's session, opened if need be; valid until a phase without residuals is asked for.

        Args:
            unguided: whether for phases without guidance.

        Raises:
            BundleError: the bundle has no ControlNet.
            EngineError: the engine does not load.
        """
        return self._engines.add(self._graph(UNGUIDED_CONTROLNET if unguided else CONTROLNET))

    def step_engine(self, *, unguided: bool = False) -> Session:
        """Returns the step graph's session, opened if need be; valid until the bundle is closed.

        Args:
            unguided: whether for what follows phases without guidance.

        Raises:
            BundleError: the bundle has no step graph.
            EngineError: the engine does not load.
        """
        return self._engines.add(self._graph(UNGUIDED_STEP if unguided else STEP))

    def timing_engine(self) -> tuple[Session, GraphRecord]:
        """Returns the session of the timing graph, opened if need be, with the graph's record.

        Raises:
            BundleError: the bundle has no timing graph.
            EngineError: the engine does not load.
        """
        record = self.manifest.timing
        if record is None:
            raise BundleError("The bundle has no timing graph.", given=self.root, advice="Build the bundle again.")
        return self._engines.add(record), record

    @contextmanager
    def network(self, name: Network) -> Iterator[Session]:
        """Yields the session of a text encoder, of the VAE's decoder or its encoder, closed at the end unless it may
        stay.

        Raises:
            BundleError: the bundle has none.
            EngineError: the engine does not load.
        """
        beside = (self.manifest.phases[0], self.manifest.step)
        with self._engines.borrow(self._graph(name), beside) as session:
            yield session

    def tensors(self) -> DeviceTensors | None:
        """Returns what runs keep on the device from step to step; None where the host keeps it.

        Raises:
            EngineError: the device is missing here, or has no memory though ``loop`` is ``device``.
        """
        with self.lock:
            step = self.manifest.step
            if self._loop == "host" or step is None or not self._has_step_engine():
                return None
            memory = self._engines.memory
            if memory is None and self._loop == "device":
                raise EngineError(
                    "This backend's device keeps no arrays, which loop='device' needs.",
                    given=self.backend,
                    advice="Use loop='auto'.",
                )
            if memory is None or (memory.on_host and self._loop == "auto"):
                return None
            return self._engines.tensors(step, memory)

    def preload(self) -> None:
        """Opens engines ahead: the first phase's and those beside it.

        Where all may stay resident, those of every phase and bucket; with a memory limit the first of them that it
        holds, the bucket's own before the others'.

        Raises:
            EngineError: an engine does not load.
        """
        with self.lock:
            others = [bucket for bucket in self.buckets if bucket.manifest != self.manifest]
            self._engines.preload([group for bucket in (self, *others) for group in bucket._together()])

    def close(self) -> None:
        """Closes every engine and the device; waits for a run in progress. Using the bundle again opens them again.

        Raises:
            EngineError: something that was asked of the device failed; all is closed.
        """
        self._engines.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except EngineError:
            if kind is None:  # else it was told already: after a failure a GPU refuses everything
                raise

    def _together(self) -> Iterator[tuple[GraphRecord | None, ...]]:
        """Yields the graphs that run together: a phase's and those beside it, but steps where they are the host's."""
        on_host = self.tensors() is None
        steps = (self.manifest.step, self.manifest.unguided_step) if on_host else ()
        for record in self.manifest.phases:
            if not record.phase.shallow:
                yield record, *(each for each in self._beside(record) if each not in steps)

    def _beside(self, record: PhaseRecord) -> tuple[GraphRecord | None, ...]:
        """Returns the graphs that run beside a phase's: the step graphs, the ControlNet, and where features are reused
        that of the same phase which gives or takes them.
        """
        manifest, phase = self.manifest, record.phase
        other = replace(phase, shallow=not phase.shallow)
        partner = next((each for each in manifest.phases if each.phase == other), None)
        return manifest.step, manifest.unguided_step, manifest.controlnet_of(phase), partner

    def _table(self, name: str) -> SamplerTable:
        table = SamplerTable.read(self.file(self.manifest.samplers[name]))
        check_table(self.manifest, name, table)
        return table

    def _has_step_engine(self) -> bool:
        return self.manifest.step is not None and self.backend in self.manifest.step.engines

    def _graph(self, name: str) -> GraphRecord:
        record = dict(self.manifest.others()).get(name)
        if record is None:
            named, advice = _MISSING[name]
            raise BundleError(f"The bundle has no {named}.", given=self.root, advice=advice)
        return record


def open(
    folder: str | Path,
    *,
    verify: str = "hash",
    backend: str | Backend | None = None,
    resident: str = "current",
    prefetch: bool = False,
    memory_limit: int | None = None,
    loop: str = "auto",
    preload: bool = False,
    allow_links: LinksOption = (),
    **options: Any,
) -> Bundle:
    """Opens the bundle in ``folder``.

    Args:
        verify: ``hash`` reads every file and compares SHA-256; ``size`` compares sizes, for fast starts, and hashes
            what is not a weight store when it is first used.
        backend: whose engines to run. If left out, the fastest that this machine has and that takes the options: where
            there are several, they are timed the first time that a bundle is opened on a machine, in a process of its
            own, and the times are kept in a folder beside the bundle or else in the user's cache.
        resident: ``current`` keeps one phase's engine open, ``all`` keeps every one that was used.
        prefetch: opens the next phase's engine in a thread while the current one runs: a phase change then takes no
            time, and twice the memory.
        memory_limit: bytes up to which ``current`` keeps engines open beyond the phase's: of other phases, sizes, text
            encoders and the VAE, those used longest ago leaving first. An engine counts as the bytes of its files. The
            phase's own is open even where it takes more, and then alone; none opens ahead that does not fit.
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
    contents = manifest.whole
    measure = partial(measure_in_process, place.root, allow_links, options)
    choice = choose(place.root, contents, backend, options, measure)
    engines = BundleEngines(
        place, contents, choice, known, options, resident=resident, prefetch=prefetch, memory_limit=memory_limit
    )
    bundle = Bundle(engines, manifest, loop)
    for bucket in bundle.buckets:
        bucket.check_samplers()
    if preload:
        with ExitStack() as closing:  # where one engine does not open, those before it are closed
            closing.push(bundle)
            bundle.preload()
            closing.pop_all()
    return bundle
