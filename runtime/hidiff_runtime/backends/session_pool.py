"""Which engines are open: those of the phase whose turn it is, and the others closed first unless all may stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.errors import InputError
from hidiff_runtime.phases import Phase

RESIDENT = ("current", "all")

Network = Literal["text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"]
"""What computes before the first step or after the last, by its engine's name."""

EngineKey = Phase | Literal["controlnet", "step"] | Network
"""What an engine is asked for by."""

CONTROLNET: Literal["controlnet"] = "controlnet"
STEP: Literal["step"] = "step"


class SessionPool:
    """The sessions of a bundle's phases, of its ControlNet and of its step graph.

    Args:
        open_session: gives an engine's session; entered here, and left when it is closed.
        resident: ``current`` keeps at most one phase's engine open, and the ControlNet's beside it from when it is
            asked for until a phase without residuals is; ``all`` keeps every engine it has opened.
        prefetch: whether `SessionPool.prefetch` opens engines in a thread.

    Raises:
        InputError: ``resident`` is neither.
    """

    def __init__(
        self,
        open_session: Callable[[EngineKey], Session],
        resident: str = "current",
        *,
        prefetch: bool = False,
    ) -> None:
        if resident not in RESIDENT:
            raise InputError(
                "resident must be 'current' or 'all'.", given=repr(resident), advice="'current' needs the least memory."
            )
        self._open_session = open_session
        self._resident = resident
        self._prefetch = prefetch
        self._sessions: dict[EngineKey, Session] = {}
        self._expected: dict[Phase, Future[Session]] = {}
        self._thread: ThreadPoolExecutor | None = None

    @property
    def open_phases(self) -> tuple[Phase, ...]:
        """The phases whose engines are open."""
        return tuple(key for key in self._sessions if isinstance(key, Phase))

    def get(self, key: Phase | Literal["controlnet", "step"]) -> Session:
        """Returns the session of a phase, of the ControlNet or of the step graph, opened if need be.

        Raises:
            EngineError: the engine does not load; the next `get` tries again.
        """
        if self._resident == "all" or not isinstance(key, Phase):
            return self._get(key)
        if key not in self._sessions:
            for other in [other for other in self._expected if other != key]:
                self._discard(other)
        kept = (key, STEP, CONTROLNET) if key.control else (key, STEP)
        # One that was opened ahead is in memory beside the others already: nothing is won by closing them first.
        if key not in self._expected:
            self._evict(kept)
        session = self._get(key)
        self._evict(kept)
        return session

    @contextmanager
    def borrow(self, network: Network, first: Phase) -> Iterator[Session]:
        """Yields a network's session, closed at the end unless all may stay. Raises as `get` does.

        Networks run before a run's first step or after its last. So engines that the next run does not begin with are
        closed before it opens, which they would be anyway: a VAE takes as much memory as a UNet.

        Args:
            first: the phase that runs begin with.
        """
        if self._resident != "all":
            self._evict((first, STEP))
        try:
            yield self._get(network)
        finally:
            if self._resident != "all" and network in self._sessions:
                self._close(network)

    def prefetch(self, phase: Phase) -> None:
        """Opens the phase's engine in a thread, if the pool does that; `get` waits for it, and raises what it met."""
        if not self._prefetch or phase in self._sessions or phase in self._expected:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="hidiff-prefetch")
        self._expected[phase] = self._thread.submit(self._opened, phase)

    def close(self) -> None:
        """Closes every engine, one that is being opened too; the next `get` opens its own again.

        Raises:
            EngineError: what the last of those said that did not close as they should; all are closed.
        """
        with ExitStack() as closing:  # from the last line to the first
            for key in reversed(tuple(self._sessions)):
                closing.callback(self._close, key)
            if self._thread is not None:
                closing.callback(self._thread.shutdown)
                self._thread = None
            for phase in reversed(tuple(self._expected)):
                closing.callback(self._discard, phase)

    def _evict(self, kept: tuple[EngineKey, ...]) -> None:
        """Closes all others, but for networks: who borrowed such a session gives it back."""
        for key in [key for key in self._sessions if key not in kept and key not in get_args(Network)]:
            self._close(key)

    def _get(self, key: EngineKey) -> Session:
        if isinstance(key, Phase) and key in self._expected:
            self._expected[key].exception()  # waits; an interrupt here leaves the engine for `close`
            self._sessions[key] = self._expected.pop(key).result()
        elif key not in self._sessions:
            self._sessions[key] = self._opened(key)
        return self._sessions[key]

    def _opened(self, key: EngineKey) -> Session:
        session = self._open_session(key)
        session.__enter__()
        return session

    def _discard(self, phase: Phase) -> None:
        """Closes an engine that nobody came for; what went wrong with it concerns nobody either."""
        opening = self._expected[phase]
        if not opening.cancel() and opening.exception() is None:
            opening.result().__exit__(None, None, None)
        del self._expected[phase]

    def _close(self, key: EngineKey) -> None:
        self._sessions.pop(key).__exit__(None, None, None)
