"""Methods are wrapped for a while and then exactly as before."""

from __future__ import annotations

import copy
import inspect

import pytest

from hidiff_export.diffusers_api.method_patches import MethodPatches


class Counter:
    def __init__(self) -> None:
        self.total = 0

    def add(self, amount: int, twice: bool = False) -> int:
        self.total += amount * (2 if twice else 1)
        return self.total


def test_the_wrapper_sees_the_call_and_the_method_as_it_was() -> None:
    counter, overrides = Counter(), MethodPatches()
    overrides.wrap(counter, "add", lambda add, amount, **more: -add(amount + 1, **more))
    assert counter.add(1, twice=True) == -4
    assert list(inspect.signature(counter.add).parameters) == ["amount", "twice"]
    overrides.undo()
    assert vars(counter) == {"total": 4}
    assert counter.add(1) == 5


def test_wrappers_nest_and_a_shadow_from_before_comes_back() -> None:
    counter, overrides = Counter(), MethodPatches()
    counter.add = own = lambda amount: 100 + amount  # type: ignore[method-assign,assignment,misc]
    overrides.wrap(counter, "add", lambda add, amount: add(amount) + 1)
    overrides.wrap(counter, "add", lambda add, amount: add(amount) * 2)
    assert counter.add(1) == 204
    overrides.undo()
    assert counter.add is own


def test_what_others_put_over_it_stays() -> None:
    counter, overrides = Counter(), MethodPatches()
    overrides.wrap(counter, "add", lambda add, amount: 2 * add(amount))
    ours = counter.add
    theirs = counter.add = lambda amount: 10 + ours(amount)  # type: ignore[method-assign,assignment,misc]
    assert counter.add(1) == 12
    overrides.undo()
    assert counter.add is theirs
    assert counter.add(1) == 12  # two in all now, no longer doubled


def test_a_deep_copy_works_on_its_own_state() -> None:
    counter, overrides = Counter(), MethodPatches()
    overrides.wrap(counter, "add", lambda add, amount: add(amount))
    other = copy.deepcopy(counter)
    other.add(5)
    assert (counter.total, other.total) == (0, 5)


def test_a_method_that_raises_still_raises() -> None:
    overrides = MethodPatches()
    overrides.wrap(counter := Counter(), "add", lambda add, *args: add(*args))
    with pytest.raises(TypeError, match="amount"):
        counter.add()  # type: ignore[call-arg]
