"""Which engines are open: those of the phase whose turn it is, and others as far as they may stay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from hidiff_runtime.backends.memory_limit import MemoryLimit
from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.errors import InputError
from hidiff_runtime.heap_trim import trim_heap

RESIDENT = ("current", "all")


class SessionPool:
    """The sessions of a bundle's engines, by names that are the caller's.

    Args:
        open_session: gives an engine's session; entered here, and left when it is closed.
        resident: ``current`` keeps at most one phase's engine open, and beside it those that it is asked for with;
            ``all`` keeps every engine it has opened.
        prefetch: whether `SessionPool.prefetch` opens engines in a thread.
        limit: with ``current``, how much engines may take together that stay open beyond the phase's: those leave first
            that were used longest ago. One that is smaller than what a run needs at a time is as none.

    Raises:
        InputError: ``resident`` is neither, or there is a limit where all stay.
    """

    def __init__(
        self,
        open_session: Callable[[str], Session],
        resident: str = "current",
        *,
        prefetch: bool = False,
        limit: MemoryLimit | None = None,
    ) -> None:
        if resident not in RESIDENT:
            raise InputError(
                "resident must be 'current' or 'all'.", given=repr(resident), advice="'current' needs the least memory."
            )
        if limit is not None and resident == "all":
            raise InputError(
                "memory_limit does not go with resident='all', which closes no engine.",
                given="both",
                advice="Leave one of them out (--memory-limit, --resident).",
            )
        self._open_session = open_session
        self._all_stay = resident == "all"
        self._limit = limit
        self._prefetch = prefetch
        self._sessions: dict[str, Session] = {}
        self._kept: frozenset[str] = frozenset()
        self._borrowed: set[str] = set()
        self._expected: dict[str, Future[Session]] = {}
        self._thread: ThreadPoolExecutor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The engines that are open."""
        return tuple(self._sessions)

    def get(self, name: str, beside: Collection[str] = ()) -> Session:
        """Returns the session of a phase's engine, opened if need be.

        Args:
            name: of the engine.
            beside: those that stay open beside it; any others are closed, unless all or the limit lets them stay.

        Raises:
            EngineError: the engine does not load; the next `get` tries again.
        """
        if self._all_stay:
            return self._get(name)
        kept = (name, *beside)
        if self._limit is None and name not in self._sessions:
            for other in [other for other in self._expected if other != name]:
                self._discard(other)
        # One that was opened ahead is in memory beside the others already: nothing is won by closing them first.
        if name not in self._expected:
            self._make_room(kept, name)
        session = self._get(name)
        self._make_room(kept)
        return session

    def add(self, name: str) -> Session:
        """Returns the session of an engine that runs beside a phase's, opened if need be. Raises as `get` does."""
        if self._limit is not None:
            self._make_room({*self._kept, name}, name)
        return self._get(name)

    @contextmanager
    def borrow(self, name: str, beside: Collection[str] = ()) -> Iterator[Session]:
        """Yields the session of a network, closed at the end unless it may stay. Raises as `get` does.

        Networks run before a run's first step or after its last. So engines that the next run does not begin with are
        closed before it opens, which they would be anyway: a VAE takes as much memory as a UNet.

        Args:
            name: of the engine.
            beside: what runs begin with.
        """
        if not self._all_stay:
            self._make_room(beside, name)
        self._borrowed.add(name)
        try:
            yield self._get(name)
        finally:
            self._borrowed.discard(name)
            if self._limit is not None:
                self._make_room(self._kept)
            elif not self._all_stay and name in self._sessions:
                self._close(name)

    def preload(self, groups: Sequence[Sequence[str]]) -> None:
        """Opens engines ahead: those of the first group, and of the next ones as far as they stay open beside it.

        Args:
            groups: a phase's engine each, and those that run beside it.

        Raises:
            EngineError: an engine does not load.
        """
        staying = list(groups if self._all_stay else groups[:1])
        if self._limit is not None:
            for end in range(2, len(groups) + 1):
                if not self._limit.allows([name for group in groups[:end] for name in group]):
                    break
                staying.insert(0, groups[end - 1])  # what runs begin with opens last, and so leaves last
        for name, *beside in staying:
            self.get(name, beside)
            for other in beside:
                self.add(other)

    def prefetch(self, name: str) -> None:
        """Opens an engine in a thread, if the pool does that and the limit has room for it beside what a run needs now.

        `get` waits for it, and raises what it met.
        """
        if not self._prefetch or name in self._sessions or name in self._expected:
            return
        if self._limit is not None:
            if not self._limit.allows({*self._kept, *self._borrowed, name}):
                return
            self._make_room(self._kept, name, *self._kept)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="hidiff-prefetch")
        self._expected[name] = self._thread.submit(self._opened, name)

    def close(self) -> None:
        """Closes every engine, one that is being opened too; the next `get` opens its own again.

        Raises:
            EngineError: what the last of those said that did not close as they should; all are closed.
        """
        with ExitStack() as closing:  # from the last line to the first
            for name in reversed(tuple(self._sessions)):
                closing.callback(self._close, name)
            if self._thread is not None:
                closing.callback(self._thread.shutdown)
                self._thread = None
            for name in reversed(tuple(self._expected)):
                closing.callback(self._discard, name)

    def _make_room(self, kept: Collection[str], *coming: str) -> None:
        """Closes engines before others open: all but those that are kept, or as many as the limit wants.

        Those that are lent stay too: who borrowed a session gives it back.
        """
        self._kept = frozenset(kept)
        leaving = [name for name in self._sessions if name not in kept and name not in self._borrowed]
        if self._limit is None:
            for name in leaving:
                self._close(name)
            return
        unclaimed = [name for name in self._expected if name not in kept]
        while not self._limit.allows({*self._sessions, *self._expected, *coming}):
            if unclaimed:
                self._discard(unclaimed.pop(0))
            elif leaving:
                self._close(leaving.pop(0))
            else:
                return

    def _get(self, name: str) -> Session:
        if name in self._expected:
            self._expected[name].exception()  # waits; an interrupt here leaves the engine for `close`
            self._sessions[name] = self._expected.pop(name).result()
        elif name not in self._sessions:
            self._sessions[name] = self._opened(name)
        elif self._limit is not None:
            self._sessions[name] = self._sessions.pop(name)  # from the one used longest ago to the one used last
        return self._sessions[name]

    def _opened(self, name: str) -> Session:
        session = self._open_session(name)
        session.__enter__()
        return session

    def _discard(self, name: str) -> None:
        """Closes an engine that nobody came for; what went wrong with it concerns nobody either."""
        opening = self._expected[name]
        if not opening.cancel() and opening.exception() is None:
            opening.result().__exit__(None, None, None)
        del self._expected[name]

    def _close(self, name: str) -> None:
        try:
            self._sessions.pop(name).__exit__(None, None, None)
        finally:
            trim_heap()  # else what a VAE computed in stays beside the next UNet
