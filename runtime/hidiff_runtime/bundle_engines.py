"""What all buckets of an open bundle share: the device, the engines that are open on it, and files that were read."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hidiff_runtime.backend_choice import BackendChoice
from hidiff_runtime.backends.device_tensors import DeviceTensors
from hidiff_runtime.backends.fork_safety import left_behind, on_fork
from hidiff_runtime.backends.memory_limit import EngineSize, MemoryLimit
from hidiff_runtime.backends.protocol import Device, DeviceMemory, Session
from hidiff_runtime.backends.session_pool import SessionPool
from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import CheckedFiles, State
from hidiff_runtime.format.manifest import Contents
from hidiff_runtime.format.specs import GraphRecord, TextEncoderRecord
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.sampling.scheduler_table import SamplerTable


class BundleEngines:
    """The device of an open bundle and what is open on it. Engines go by the paths of their graphs.

    Args:
        folder: the bundle's.
        contents: of its manifest.
        choice: of the backend whose engines run.
        known: the files that need no look at their hash while they are in the states they were in before they were
            verified: all of them, or weight stores alone where only sizes were compared.
        options: of the backend.
        resident: see `SessionPool`.
        prefetch: see `SessionPool`.
        memory_limit: bytes that open engines may take together, see `MemoryLimit`; None to keep none beyond a phase's.

    Attributes:
        lock: held by a run, since engines are shared by all runs on the bundle.
    """

    def __init__(
        self,
        folder: BundleFolder,
        contents: Contents,
        choice: BackendChoice,
        known: Mapping[str, State],
        options: Mapping[str, Any],
        *,
        resident: str,
        prefetch: bool,
        memory_limit: int | None = None,
    ) -> None:
        self.root = folder.root
        self.contents = contents
        self.choice = choice
        self.backend = backend = choice.backend
        self.all_stay = resident == "all"
        self.lock = threading.RLock()
        self.samplers: dict[str, SamplerTable] = {}
        self.files = CheckedFiles(folder, contents.shared.files, known)
        self._folder = folder
        self._records = _graphs(contents)
        self._new_device = partial(backend.device, options)
        self._device = self._new_device()
        self._entered: Device | None = None
        self._tensors: dict[str, DeviceTensors] = {}
        limit = None if memory_limit is None else MemoryLimit(memory_limit, self._size_of)
        self._new_pool = partial(SessionPool, self._open_engine, resident, prefetch=prefetch, limit=limit)
        self._pool = self._new_pool()
        self._tokenizers: dict[str, Tokenizer] = {}
        on_fork(self)

    @property
    def open_graphs(self) -> tuple[str, ...]:
        """The graphs whose engines are open."""
        return self._pool.names

    @property
    def memory(self) -> DeviceMemory | None:
        """The device's memory; None where it keeps no arrays. Raises EngineError where the device is missing."""
        with self.lock:
            return self._enter().memory

    def tokenizer(self, record: TextEncoderRecord) -> Tokenizer:
        """Returns a text encoder's tokenizer; one that was read stays where every engine does.

        Raises:
            BundleError: the file is missing, has changed, or is no tokenizer.
            EngineError: the `tokenizers` library is missing.
        """
        known = self._tokenizers.get(record.name)
        if known is None:
            known = Tokenizer.kept(self.files.file(record.tokenizer), record.places)
            if self.all_stay:
                self._tokenizers[record.name] = known
        return known

    def lost_files(self) -> tuple[str, ...]:
        """Returns the files that the next run reads anew and that are not there, or not of their size; reads none of
        them.

        None where every engine stays open: those files are read no more.
        """
        if self.all_stay:
            return ()
        name = self.backend.name
        engines = [record.engines[name] for record in self._records.values() if name in record.engines]
        shared = self.contents.shared
        tokenizers = [record.tokenizer for record in shared.text_encoders]
        return self.files.lost((*engines, *shared.weights.values(), *tokenizers))

    def get(self, record: GraphRecord, beside: Collection[GraphRecord | None] = ()) -> Session:
        """Returns the session of a phase's engine; see `SessionPool.get`."""
        with self.lock:
            return self._pool.get(record.graph, self._names(beside))

    def add(self, record: GraphRecord) -> Session:
        """Returns the session of an engine that runs beside a phase's; see `SessionPool.add`."""
        with self.lock:
            return self._pool.add(record.graph)

    @contextmanager
    def borrow(self, record: GraphRecord, beside: Collection[GraphRecord | None]) -> Iterator[Session]:
        """Yields the session of a network, closed at the end unless it may stay; see `SessionPool.borrow`."""
        with self.lock, self._pool.borrow(record.graph, self._names(beside)) as session:
            yield session

    def preload(self, groups: Iterable[Collection[GraphRecord | None]]) -> None:
        """Opens engines ahead: a phase's with those beside it, and others as far as they stay; see
        `SessionPool.preload`.
        """
        with self.lock:
            self._pool.preload([self._names(group) for group in groups])

    def prefetch(self, record: GraphRecord) -> None:
        """Opens an engine ahead; see `SessionPool.prefetch`."""
        with self.lock:
            self._pool.prefetch(record.graph)

    def tensors(self, record: GraphRecord, memory: DeviceMemory) -> DeviceTensors:
        """Returns what runs of a bucket keep on the device from step to step, by the bucket's step graph."""
        with self.lock:
            if record.graph not in self._tensors:
                self._tensors[record.graph] = DeviceTensors(memory)
            return self._tensors[record.graph]

    def close(self) -> None:
        """Closes every engine and the device; waits for a run in progress. Using the bundle again opens them again.

        Raises:
            EngineError: something that was asked of the device failed; all is closed.
        """
        with self.lock, ExitStack() as closing:
            self._tensors = {}
            self._tokenizers = {}
            if self._entered is not None:
                closing.push(self._entered)
                self._entered, self._device = None, self._new_device()
            closing.callback(self._pool.close)

    def forked(self) -> None:
        """Makes the bundle this process's own, where the parent was in the middle of a run: nobody here ends that.

        Engines that were open are left as they are: closing them may wait for threads that stayed behind.
        """
        if self.lock.acquire(blocking=False):
            self.lock.release()
            return
        left_behind.append((self._pool, self._entered, self._tensors))
        self.lock = threading.RLock()
        self._entered, self._device, self._tensors = None, self._new_device(), {}
        self._pool = self._new_pool()

    def _enter(self) -> Device:
        """Returns the device, entered when it is first needed. A thread that opens an engine ahead finds it entered."""
        if self._entered is None:
            self._entered = self._device.__enter__()
        return self._entered

    def _open_engine(self, graph: str) -> Session:
        """Returns a session of an engine, all of whose files are the manifest's even where only sizes were checked.

        Weight stores, whose hashes take long, are then compared only where they changed since the bundle was opened.
        """
        record, stores = self._records[graph], self.contents.shared.weights
        engine = self._engine_files(graph)[0]
        if store := stores.get(Path(graph).parent.as_posix()):
            self.files.file(store)
        weights = {name: self._folder.file(store) for name, store in stores.items()}
        return self._enter().open(self._folder.file(engine), weights, record)

    def _size_of(self, graph: str) -> EngineSize:
        """Returns what an engine takes in memory: the bytes of its files, of which sessions may share weight stores."""
        files = self.contents.shared.files
        stores = self.contents.shared.weights.values() if self._enter().maps_weights else ()
        sizes = {name: files[name].size for name in self._engine_files(graph)}
        mapped = {name: size for name, size in sizes.items() if name in stores}
        return EngineSize(sum(sizes.values()) - sum(mapped.values()), mapped)

    def _engine_files(self, graph: str) -> tuple[str, ...]:
        """Returns the files of a graph's engine by their paths in the manifest, the one that the backend opens first.

        Raises:
            BundleError: one of them is not the manifest's.
        """
        relative = self._records[graph].engines[self.backend.name]
        path = self.files.file(relative)
        root = path.parents[relative.count("/")]
        found = []
        for part in self.backend.files(path):
            if not part.is_relative_to(root):
                raise BundleError(f"The engine {relative} names a file outside the bundle.", given=part)
            found.append(part.relative_to(root).as_posix())
            self.files.file(found[-1])
        return tuple(found)

    def _names(self, records: Collection[GraphRecord | None]) -> tuple[str, ...]:
        """Returns the graphs of those records that there are, and that have an engine of this backend."""
        return tuple(record.graph for record in records if record is not None and self.backend.name in record.engines)


def _graphs(contents: Contents) -> dict[str, GraphRecord]:
    """Returns every graph of the bundle by its path."""
    every = [(*manifest.phases, *(other for _, other in manifest.others())) for manifest in contents.manifests]
    timing = () if contents.shared.timing is None else (contents.shared.timing,)
    return {record.graph: record for records in (*every, timing) for record in records}
