"""Whether a bundle's sampler tables are those that its manifest names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.step_graph import STATE
from hidiff_runtime.sampling.scheduler_table import SamplerTable


def check_tables(manifest: Manifest, read: Callable[[str], SamplerTable]) -> None:
    """Reads each table once, by a function that compares it as `check_table` does, and keeps none.

    Raises:
        BundleError: a table is broken or another sampler's, or the step counts are not those that every table holds.
    """
    counts = [{*read(name).steps.tolist()} for name in manifest.samplers]
    held = sorted(set.intersection(*counts))
    if held != list(manifest.steps):
        raise BundleError(
            "The manifest's steps are not the step counts that every sampler table holds.",
            given=f"{_short(manifest.steps)}, expected {_short(held)}",
            advice=REBUILD,
        )


def check_table(manifest: Manifest, name: str, table: SamplerTable) -> None:
    """Refuses a table that is not the one that the manifest names.

    Raises:
        BundleError: it is another sampler's, or keeps more from step to step than the step graph has room for.
    """
    if table.sampler != name:
        raise BundleError(
            f"The bundle's table of the sampler {name} is another sampler's.",
            given=f"{manifest.samplers[name]}: expected {name}, got {table.sampler}",
            advice=REBUILD,
        )
    state = None if manifest.step is None else manifest.step.input(STATE)
    if state is not None and table.rows.states > state.shape[0]:
        raise BundleError(
            "The step graph has fewer states than the sampler.",
            given=f"{state.shape[0]}, where {name} keeps {table.rows.states}",
            advice=REBUILD,
        )


def _short(steps: Sequence[int]) -> str:
    text = ", ".join(map(str, steps))
    return (text if len(text) <= 60 else f"{text[:57]}...") or "none"
