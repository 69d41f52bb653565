"""Methods of one object wrapped for a while, and put back exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any


class MethodPatches:
    """Wraps methods of instances by shadowing them in the instances' own attributes; the classes are not touched."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._in_force = True

    def wrap(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        """Shadows ``owner.name``, until :meth:`undo`.

        Args:
            around: called as ``around(method, *args, **kwargs)``, where ``method`` is what ``owner.name`` was.
        """
        own = vars(owner)
        previous, absent = own.get(name), name not in own
        shadow = MethodType(self._shadow(getattr(owner, name), around), owner)
        own[name] = shadow

        def put_back() -> None:
            # Whoever wrapped the method after us, as offloading does, keeps what is theirs.
            if own.get(name) is not shadow:
                return
            if absent:
                del own[name]
            else:
                own[name] = previous

        self._undo.append(put_back)

    def undo(self) -> None:
        """Puts everything back, in reverse order; a shadow that others hold on to does as the method did."""
        self._in_force = False
        while self._undo:
            self._undo.pop()()

    def _shadow(self, method: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function to bind to the owner; its signature is the method's, since diffusers looks at those.

        It binds the class's function anew for each call, so that a deep copy of the owner works on its own state.
        """
        function = getattr(method, "__func__", None)

        @functools.wraps(method if function is None else function)
        def shadow(owner: object, *args: Any, **kwargs: Any) -> Any:
            bound = method if function is None else MethodType(function, owner)
            return around(bound, *args, **kwargs) if self._in_force else bound(*args, **kwargs)

        return shadow
