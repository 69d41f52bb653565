"""`hidiff-export showcase`: what HiDiffusion does for a checkpoint, on one sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hidiff_export.cli.options import SHARED_SETTINGS, allow_links_option, drawing_options
from hidiff_export.errors import InputError
from hidiff_runtime.format.manifest import Manifest

if TYPE_CHECKING:
    from hidiff_export.cli.shots import Prompts
    from hidiff_export.recipe import Recipe

_COUNT = 6
_HEADINGS = ("pictures of", "size", "right subject", "set distance x 1000", "PSNR dB")
_LEAST, _MULTIPLE = 64, 8


@click.command(
    short_help="Show what HiDiffusion does, on one sheet.",
    epilog="""\b
Examples:
  hidiff-export showcase demo-bundle
  hidiff-export showcase bundle --prompts prompts.txt --steps 30 -o sheets
  hidiff-export showcase bundle --source ./my-finetune --features ./clip-vision --count 50 --prompts prompts.txt
""",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", help="The checkpoint for diffusers; by default the one that the bundle was built of.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of prompts; by default the recipe's example_prompts.",
)
@drawing_options(_COUNT)
@click.option(
    "--training-size",
    type=click.IntRange(_LEAST),
    help="Side in pixels that the checkpoint was trained at; by default its family's.",
)
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    help="What to see with, as `quality` takes it; without one, sets are looked at and not measured.",
)
@allow_links_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("showcase"),
    show_default=True,
    help="Folder for the sheet, the report and all pictures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and show no progress.")
def showcase(
    bundle: Path,
    source: str | None,
    prompts: Path | None,
    count: int,
    seed: int,
    training_size: int | None,
    features: Path | None,
    allow_links: tuple[Path, ...],
    output: Path,
    as_json: bool,
    **shared: Any,
) -> None:
    """Draw the same prompts at the training size, at BUNDLE's size without and with HiDiffusion, and with BUNDLE.

    PyTorch draws the first three. Writes a sheet showcase.png, showcase.json and every picture, and tells how far the
    larger sets are from the one at the training size (KID, in thousandths, with its 95 % interval), how many pictures
    show what was asked for where a classifier sees, and the PSNR of BUNDLE's pictures beside PyTorch's.
    """
    from hidiff_export.cli.console import console, progress_display
    from hidiff_export.cli.shots import features_for, shots_of
    from hidiff_export.quality.contenders import check_comparable, check_settings_of_diffusers, resolve
    from hidiff_export.quality.report_folder import report_folder
    from hidiff_export.quality.showcase_report import FILES, SHEET, Showcase, contenders_of, draw_showcase, table_rows
    from hidiff_export.recipe import Recipe
    from hidiff_runtime.format.bundle_folder import BundleFolder

    manifest = BundleFolder(bundle, allow_links).manifest()
    check_comparable({bundle: manifest})
    recipe = Recipe.from_dict(manifest.recipe, "the recipe in the bundle's manifest")
    source = _checkpoint(source, recipe)
    settings = {name: shared[name] for name in SHARED_SETTINGS if shared[name] is not None}
    shots = shots_of(_prompts(prompts, manifest, recipe), count, seed, settings)
    requests = resolve(bundle, shots, allow_links)
    shots = [shot.with_settings_of(request) for shot, request in zip(shots, requests, strict=True)]
    check_settings_of_diffusers(shots)
    model = features_for(features, manifest)
    contenders = contenders_of(bundle, manifest, source, _size(training_size, recipe), allow_links)
    steps = [request.settings.steps or 1 for request in requests]
    used = requests[0].settings
    told = {"steps": used.steps, "sampler": used.sampler, "guidance scale": used.guidance_scale}
    with (
        report_folder(output, FILES) as folder,
        progress_display(quiet=as_json) as display,
        display.stage("pictures", reused=False) as progress,
    ):
        rows = draw_showcase(contenders, shots, steps, model, folder, progress)
        report = Showcase(folder, tuple(shots), told, rows)
        report.save()
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
        return
    from rich.table import Table

    table = Table(*_HEADINGS)
    for row in table_rows(report):
        table.add_row(*row)
    console().print(table)
    click.echo(f"look at {output / SHEET}")


def _checkpoint(source: str | None, recipe: Recipe) -> str:
    """Returns what diffusers loads.

    Raises:
        InputError: the bundle's weights are fabricated, and no other source is given.
    """
    source = recipe.source if source is None else source
    if recipe.random_seed is not None and source == recipe.source:
        raise InputError(
            "A fabricated checkpoint has nothing to show, and diffusers cannot load it.",
            given=f"a bundle of {source}",
            advice="Give a bundle of a trained checkpoint, for example of `hidiff-export build demo`.",
        )
    return source


def _prompts(file: Path | None, manifest: Manifest, recipe: Recipe) -> Prompts:
    from hidiff_export.cli.shots import read_prompts

    if file is None and recipe.example_prompts:
        return [(prompt, {}) for prompt in recipe.example_prompts]
    return read_prompts(file, manifest)


def _size(side: int | None, recipe: Recipe) -> tuple[int, int]:
    from hidiff_export.quality.showcase_report import training_size

    if side is None:
        return training_size(recipe)
    if side % _MULTIPLE:
        raise InputError(
            "The training size should be a multiple of 8 pixels.",
            given=f"--training-size {side}",
            advice=f"Give {side // _MULTIPLE * _MULTIPLE}.",
        )
    return side, side
