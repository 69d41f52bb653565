"""Sizes that come to a finished bundle, and sizes that go: all else in it stays as it is, to the byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from hidiff_export.compiler.compile import BuildProgress, BuildResult, build
from hidiff_export.errors import InputError
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.bundle_folder import BundleFolder, LinksOption
from hidiff_runtime.format.manifest import Contents, FileDigest, Manifest

if TYPE_CHECKING:
    from hidiff_export.compiler.stages.stage import StageContext

Shape = tuple[int, int, int]
"""Width, height and batch."""

_ORIGIN = "the recipe in the bundle's manifest"


def add_bucket(
    folder: Path, size: tuple[int, int], batch: int | None, display: BuildProgress, *, allow_links: LinksOption = ()
) -> BuildResult:
    """Adds a size to a finished bundle: its graphs, its engines, and a recorded evaluation of each phase.

    Weights, configurations and tables are the bundle's own. The checkpoint is not read: it may be gone, and one that
    was changed since changes nothing. The new bundle takes the old one's place at the end, whole; its other files are
    the old one's own. An interrupted call goes on when it is made again.

    Args:
        folder: of the bundle.
        size: width and height in pixels.
        batch: pictures of a run; that of the bundle's first size if left out.
        display: shows the stages.
        allow_links: as for :func:`hidiff_runtime.open`.

    Raises:
        InputError: the bundle has the size already.
        RecipeError: it is no size that such a bundle can have.
        HidiffError: of the class that says what failed; the old bundle is then as it was.
    """
    from hidiff_export.compiler.stages.kept import KeptBundle
    from hidiff_export.compiler.stages.order import added_stages

    place = BundleFolder(folder.absolute(), allow_links)
    manifest = place.manifest()
    contents = manifest.whole
    shape = (*size, manifest.batch if batch is None else batch)
    shapes = [_shape(one) for one in contents.manifests]
    if shape in shapes:
        raise InputError("The bundle has this size already.", given=_name(shape), advice=f"It has {_names(shapes)}.")
    recipe = _checked(manifest, [*shapes, shape])
    kept = KeptBundle(place, contents.digest, contents.sharing(files=_unjudged(contents)))
    return build(
        recipe,
        folder,
        display,
        force=True,
        resume=True,
        stages=added_stages(recipe, len(shapes), kept, force_zeros=manifest.force_zeros_for_empty_prompt),
        assemble=partial(_with_bucket, contents, recipe),
    )


def remove_bucket(
    folder: Path, size: tuple[int, int], batch: int | None, display: BuildProgress, *, allow_links: LinksOption = ()
) -> BuildResult:
    """Takes a size out of a finished bundle, with the files that no other size needs. Arguments as `add_bucket` has.

    Raises:
        InputError: the bundle has no such size, or it is the first one, with which what all share was recorded.
        HidiffError: of the class that says what failed; the old bundle is then as it was.
    """
    from hidiff_export.compiler.stages.kept import KeptBundle

    place = BundleFolder(folder.absolute(), allow_links)
    contents = place.manifest().whole
    going = [one for one in contents.manifests if (one.width, one.height) == size and batch in (None, one.batch)]
    shapes = [_shape(one) for one in contents.manifests]
    wanted = _name((*size, batch)) if batch else f"{size[0]}x{size[1]}"
    if not going:
        raise InputError("The bundle has no such size.", given=wanted, advice=f"It has {_names(shapes)}.")
    if contents.manifests[0] in going:
        raise InputError(
            "The first size of a bundle stays: what all sizes share was recorded with it.",
            given=wanted,
            advice="Build a bundle of the other sizes, or give --batch to take another batch of this size.",
        )
    staying = [one for one in contents.manifests if one not in going]
    recipe = _checked(staying[0], [_shape(one) for one in staying])
    needed = {path for one in staying for _, path in one.paths()}
    stems = {_stem(path) for one in going for _, path in one.own_paths() if path not in needed}
    stems |= {_stem(path) for path in _declined(contents, going)}
    recorded = {PurePosixPath(one.reference).parent for one in going if one.reference}
    files = {
        name: record
        for name, record in _unjudged(contents).items()
        if name in needed or not (_stem(name) in stems or PurePosixPath(name).parent in recorded)
    }
    left = Contents.of(staying).sharing(files=files, recipe=recipe.to_dict(), report=None)
    return build(
        recipe,
        folder,
        display,
        force=True,
        stages=(KeptBundle(place, contents.digest, left),),
        assemble=lambda _context, found: left.sharing(files=found),
    )


def _with_bucket(before: Contents, recipe: Recipe, context: StageContext, files: Mapping[str, FileDigest]) -> Contents:
    """Returns the old manifest with the new bucket's record behind its own."""
    from hidiff_export.compiler.stages.order import bucket_manifest

    zeros = before.manifests[0].force_zeros_for_empty_prompt
    new = bucket_manifest(context.buckets[-1], files, force_zeros=zeros)
    every = Contents.of([*before.manifests, new])
    return every.sharing(files=files, recipe=recipe.to_dict(), report=None)


def _unjudged(contents: Contents) -> dict[str, FileDigest]:
    """Returns the files but for a parity report and what lies beside it, which are of the bundle as it was."""
    report = contents.shared.report
    judged = None if report is None else PurePosixPath(report).parent
    return {name: record for name, record in contents.files.items() if PurePosixPath(name).parent != judged}


def _checked(manifest: Manifest, shapes: Sequence[Shape]) -> Recipe:
    """Returns the recipe of these shapes. Raises RecipeError for one that no such bundle can have."""
    recipe = Recipe.from_dict(manifest.recipe, _ORIGIN).of_shapes(shapes)
    return Recipe.from_dict(recipe.to_dict(), _ORIGIN)


def _declined(contents: Contents, going: Sequence[Manifest]) -> Iterator[str]:
    """Yields the files in which the stages of these buckets say what passes declined."""
    from hidiff_export.compiler.stages.order import QUANTIZED_STAGES
    from hidiff_export.compiler.stages.stage import StageContext

    recipe = Recipe.from_dict(contents.shared.recipe, _ORIGIN)
    for bucket in StageContext.of(recipe, Path()).buckets:
        if (bucket.recipe.width, bucket.recipe.height, bucket.recipe.batch) in map(_shape, going):
            yield from (bucket.inside(bucket.declined(stage.name)) for stage in QUANTIZED_STAGES)


def _stem(name: str) -> str:
    """Returns a file's path up to the first dot, which a graph has in common with its engines and all beside them."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _shape(manifest: Manifest) -> Shape:
    return manifest.width, manifest.height, manifest.batch


def _name(shape: Shape) -> str:
    width, height, batch = shape
    return f"{width}x{height}" + (f", batch {batch}" if batch > 1 else "")


def _names(shapes: Sequence[Shape]) -> str:
    return "; ".join(map(_name, shapes))
