"""How much memory the engines that are open may take together, by the sizes of their files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from hidiff_runtime.errors import InputError


@dataclass(frozen=True)
class EngineSize:
    """What an engine takes while it is open, as far as its files tell.

    Args:
        own: bytes that no other engine has a part in.
        mapped: bytes of each file that all sessions map, by its name: in memory once, however many do.
    """

    own: int
    mapped: Mapping[str, int] = field(default_factory=dict)


class MemoryLimit:
    """The bytes that open engines may take together.

    Args:
        limit: so many.
        size_of: an engine's size by its name; asked once for each.

    Raises:
        InputError: the limit is no number of bytes.
    """

    def __init__(self, limit: int, size_of: Callable[[str], EngineSize]) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InputError(
                "memory_limit must be a whole number of bytes, 1 or more.",
                given=repr(limit),
                advice="Give bytes, 6 * 2**30 for 6 GiB (--memory-limit 6GiB), or leave it out to keep one phase's "
                "engine.",
            )
        self._limit = limit
        self._size_of = size_of
        self._sizes: dict[str, EngineSize] = {}

    def allows(self, names: Collection[str]) -> bool:
        """Returns whether these engines may be open together.

        Raises:
            BundleError: a file of one of them is not the bundle's.
            EngineError: the device is missing.
        """
        for name in names:
            if name not in self._sizes:
                self._sizes[name] = self._size_of(name)
        sizes = [self._sizes[name] for name in {*names}]
        mapped = {file: count for size in sizes for file, count in size.mapped.items()}
        return sum(size.own for size in sizes) + sum(mapped.values()) <= self._limit
