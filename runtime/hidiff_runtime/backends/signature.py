"""How what an engine takes and gives differs from what it should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hidiff_runtime.format.specs import TensorSpec


def signature_faults(kind: str, due: Sequence[TensorSpec], found: Mapping[str, str], says: str) -> list[str]:
    """Returns each difference as words; none where there is none.

    Args:
        kind: ``input`` or ``output``.
        due: the tensors that there should be.
        found: type and shape of those that there are, by name: ``float32[2, 4, 64, 64]``.
        says: who says what is due: ``the manifest``.
    """
    told = {spec.name: f"{spec.dtype}{list(spec.shape)}" for spec in due}
    faults = [
        f"{kind} {name} is {found[name]}, {says} says {text}"
        for name, text in told.items()
        if found.get(name, text) != text
    ]
    faults += [f"no {kind} {name} {text}" for name, text in told.items() if name not in found]
    return faults + [f"another {kind} {name} {text}" for name, text in found.items() if name not in told]
