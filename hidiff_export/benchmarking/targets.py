"""What a command names: bundles, or a recipe whose peers alone are measured, over a store that goes away again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from hidiff_export.benchmarking.lineup import Lineup, Size, benched_bundles, recipes_of
from hidiff_export.benchmarking.peers import WantedPeer
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.stored_configs import CONFIG, WEIGHTS
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.compiler.compile import BuildProgress
from hidiff_export.errors import InputError
from hidiff_export.files import write_json
from hidiff_export.graph.float32_ops import precision_of
from hidiff_export.recipe import Recipe
from hidiff_export.reference.reference_weights import weights_of_source
from hidiff_runtime.format.manifest import MANIFEST


@dataclass(frozen=True)
class BenchScope:
    """What of the targets is measured, and with what.

    Args:
        peers: beside them.
        pythons: interpreters of peers, by name.
        backend: of the bundles; all that run here, if left out.
        sizes: all, if there are none.
        steps: of a run.
        threads: of an evaluation.
        allow_links: folders, as `hidiff_runtime.open` takes them.
    """

    peers: tuple[WantedPeer, ...]
    pythons: dict[str, str] = field(default_factory=dict)
    backend: str | None = None
    sizes: tuple[Size, ...] = ()
    steps: int = 50
    threads: int = 1
    allow_links: Sequence[Path] = ()


@contextmanager
def lineup_of(targets: Sequence[str], scope: BenchScope, display: BuildProgress) -> Iterator[Lineup]:
    """Yields what is measured. A recipe's weight store lies in the system's folder for temporary files until the end.

    Args:
        targets: folders of bundles, or one recipe, by its name or path.
        scope: what of them is measured.
        display: shows how far writing the store of a recipe is.

    Raises:
        HidiffError: a target is neither, they cannot be measured together, or what a checkpoint's reading raises.
    """
    shared = (scope.peers, scope.pythons, scope.steps, scope.threads)
    if all(_is_folder(target) for target in targets):
        folders = [Path(target) for target in targets]
        bundles = benched_bundles(folders, scope.backend, scope.sizes, scope.allow_links)
        first = next(iter(bundles[0].manifests.values()), None) or next(iter(bundles[-1].manifests.values()))
        yield Lineup(bundles, recipes_of(bundles), folders[0] / first.weights[Component.UNET.value], *shared)
        return
    recipes = _recipes(targets, scope)
    with TemporaryDirectory(prefix="hidiff-bench-") as folder:
        store = _written(next(iter(recipes.values())), Path(folder), display)
        yield Lineup((), recipes, store, *shared)


def _is_folder(target: str) -> bool:
    """Returns whether a target is meant as a bundle: a folder, a path, or what would be one's manifest."""
    return Path(target).is_dir() or (Path(target) / MANIFEST).exists()


def _recipes(targets: Sequence[str], scope: BenchScope) -> dict[Size, Recipe]:
    if len(targets) > 1:
        raise InputError(
            "Expected folders of bundles, or one recipe.",
            given=", ".join(target for target in targets if not _is_folder(target)),
            advice="A recipe is measured by itself, and nothing of it is built.",
        )
    if scope.backend is not None:
        raise InputError("A recipe has no engines.", given=f"--backend {scope.backend}", advice="Build it first.")
    found: dict[Size, Recipe] = {}
    for recipe in Recipe.load(targets[0]).buckets:
        found.setdefault((recipe.width, recipe.height), recipe)
    if lacking := [size for size in scope.sizes if size not in found]:
        raise InputError(
            "The recipe has no such size.",
            given=", ".join(f"{width}x{height}" for width, height in lacking),
            advice="Leave --size out for all that it has.",
        )
    return {size: recipe for size, recipe in found.items() if not scope.sizes or size in scope.sizes}


def _written(recipe: Recipe, folder: Path, display: BuildProgress) -> Path:
    """Returns the weight store of a recipe's checkpoint, as a build would write it."""
    config, tensors, _ = weights_of_source(Component.UNET, recipe.source, recipe)
    write_json(folder / CONFIG, {**Component.UNET.written_as, **config})
    precision = precision_of(Component.UNET.value, recipe.precision)
    with display.stage("weights", reused=False) as report:
        store = WeightStore.write(
            tensors, folder / WEIGHTS, precision, lambda done, total: report(done, total, recipe.source)
        )
    return store.path
