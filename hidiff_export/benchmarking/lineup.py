"""Who is measured against whom, at which sizes: bundles with their engines, and peers over the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.peers import WantedPeer, competitor
from hidiff_export.benchmarking.workload import Workload
from hidiff_export.errors import EngineError, InputError
from hidiff_export.recipe import Recipe
from hidiff_runtime import backends
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.manifest import Manifest

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class BenchedBundle:
    """A bundle that is measured.

    Args:
        name: of its rows, the only one of this name.
        folder: where it is.
        manifests: of its sizes, the first batch of each.
        backends: whose engines are measured.
        allow_links: folders, as `hidiff_runtime.open` takes them.
    """

    name: str
    folder: Path
    manifests: Mapping[Size, Manifest]
    backends: tuple[str, ...]
    allow_links: Sequence[Path] = ()

    def competitor(self, backend: str, manifest: Manifest, threads: int, *, profile: bool) -> Competitor:
        """Returns the bundle's contender of a backend at a size."""
        on_cpu = backend in ("onnxruntime", "openvino")
        options: dict[str, Any] = {"threads": threads, "profile": profile} if on_cpu else {}
        settings = {
            "folder": str(self.folder),
            "backend": backend,
            "size": [manifest.width, manifest.height, manifest.batch],
            "allow_links": [str(folder) for folder in self.allow_links],
            "options": options,
        }
        origin = f"{self.folder}, {backend}"
        name = f"{self.name} {backend}"
        return Competitor(
            name, "bundle", origin, manifest.precision, True, settings, bundle=True, forecast=manifest.forecast
        )


@dataclass(frozen=True)
class Lineup:
    """What is measured.

    Args:
        bundles: in the order given; none where a recipe was given.
        recipes: of each size, by the first bundle that has it, or the recipe's own.
        store: the weights that peers compute with.
        peers: that were asked for.
        pythons: interpreters of peers that have one of their own.
        steps: of a run.
        threads: of an evaluation.
    """

    bundles: tuple[BenchedBundle, ...]
    recipes: Mapping[Size, Recipe]
    store: Path
    peers: tuple[WantedPeer, ...]
    pythons: Mapping[str, str] = field(default_factory=dict)
    steps: int = 50
    threads: int = 1

    @property
    def sizes(self) -> tuple[Size, ...]:
        """In the order of their pixels."""
        return tuple(sorted(self.recipes, key=lambda size: size[0] * size[1]))

    def work(self, size: Size) -> Workload:
        """Returns what is computed at a size."""
        return Workload(self.recipes[size], self.steps)

    def competitors(self, size: Size, *, profile: bool = False) -> tuple[list[Competitor], dict[str, str]]:
        """Returns the contenders of a size, peers first, and why peers are left out by their rows' names."""
        found: list[Competitor] = []
        left_out: dict[str, str] = {}
        for wanted in self.peers:
            made = competitor(wanted, self.work(size), self.store, self.pythons, self.threads, profile=profile)
            if isinstance(made, Competitor):
                found.append(made)
            else:
                left_out[wanted.row] = made
        found += self._bundles(size, profile=profile)
        return found, left_out

    def _bundles(self, size: Size, *, profile: bool) -> Iterator[Competitor]:
        for bundle in self.bundles:
            if size in bundle.manifests:
                for backend in bundle.backends:
                    yield bundle.competitor(backend, bundle.manifests[size], self.threads, profile=profile)


def benched_bundles(
    folders: Sequence[Path], backend: str | None, sizes: Sequence[Size], allow_links: Sequence[Path]
) -> tuple[BenchedBundle, ...]:
    """Reads what is said of bundles, and looks whether their engines run here.

    Args:
        folders: of the bundles.
        backend: the one to measure; all that run here, if left out.
        sizes: to measure; all if there are none.
        allow_links: as `hidiff_runtime.open` takes it.

    Raises:
        BundleError: one is no bundle.
        EngineError: no engine of one runs here.
        InputError: a bundle lacks the backend, none has one of the sizes, or they cannot be compared.
    """
    taken: set[str] = set()
    found = []
    for folder in folders:
        manifest = BundleFolder(folder, allow_links).manifest()
        each: dict[Size, Manifest] = {}
        for one in manifest.whole.manifests:
            if not sizes or (one.width, one.height) in sizes:
                each.setdefault((one.width, one.height), one)
        name = _untaken(folder.absolute().name, taken)
        taken.add(name)
        found.append(BenchedBundle(name, folder, each, _usable(folder, manifest, backend), tuple(allow_links)))
    for size in sizes:
        if not any(size in one.manifests for one in found):
            raise InputError(
                "No bundle has this size.",
                given=f"{size[0]}x{size[1]}",
                advice="Leave --size out for all that there are; 'hidiff-export add' adds one.",
            )
    _check_comparable(found)
    return tuple(found)


def recipes_of(bundles: Sequence[BenchedBundle]) -> dict[Size, Recipe]:
    """Returns the recipe of each size, of the first bundle that has it."""
    found: dict[Size, Recipe] = {}
    for one in bundles:
        for size, manifest in one.manifests.items():
            found.setdefault(size, _recipe(manifest))
    return found


def _recipe(manifest: Manifest) -> Recipe:
    recipe = Recipe.from_dict(manifest.recipe, "the recipe in the bundle's manifest")
    return recipe.of_shapes([(manifest.width, manifest.height, manifest.batch)])


def _usable(folder: Path, manifest: Manifest, wanted: str | None) -> tuple[str, ...]:
    if wanted is not None:
        return (backends.named(manifest.whole, wanted).name,)
    offered = [name for name in backends.NAMES if name in manifest.phases[0].engines]
    usable = tuple(name for name in offered if backends.get(name).available().usable)
    if not usable:
        raise EngineError(
            "No engine of this bundle runs here.",
            given=f"{folder}: {', '.join(offered)}",
            advice="'hidiff-export doctor' says how to get them.",
        )
    return usable


def _check_comparable(bundles: Sequence[BenchedBundle]) -> None:
    """Refuses bundles that do not compute the same thing at a size that they share, or of another network at all."""
    first = next(iter(bundles[0].manifests.values()), None)
    seen: dict[Size, tuple[BenchedBundle, Manifest]] = {}
    for one in bundles:
        for size, manifest in one.manifests.items():
            other, known = seen.setdefault(size, (one, manifest))
            at = f"at {size[0]}x{size[1]}"
            _same(f"of another batch {at}", other, known.batch, one, manifest.batch)
            _same(f"of other phases {at}", other, known.rule, one, manifest.rule)
            if first is not None:
                for what, value in _NETWORK.items():
                    _same(f"of another {what}", bundles[0], value(first), one, value(manifest))


_NETWORK: Mapping[str, Callable[[Manifest], object]] = {
    "family": lambda manifest: manifest.family,
    "task": lambda manifest: manifest.task,
    "guidance": lambda manifest: manifest.guidance,
    "checkpoint": lambda manifest: (manifest.recipe.get("source"), str(manifest.recipe.get("lora", ""))),
    "width of the UNet": lambda manifest: manifest.recipe.get("unet_width"),
    "length of prompts": lambda manifest: manifest.recipe.get("prompt_chunks", 1),
}
"""What bundles have to have in common, whatever their sizes."""


def _same(what: str, first: BenchedBundle, wanted: object, other: BenchedBundle, found: object) -> None:
    if wanted != found:
        raise InputError(
            f"Bundles {what} cannot be compared.",
            given=f"{first.folder}: {wanted}; {other.folder}: {found}",
            advice="Run the command once for each.",
        )


def _untaken(name: str, taken: set[str]) -> str:
    numbered = (f"{name}-{number}" for number in count(2))
    return next(one for one in chain([name], numbered) if one not in taken)
