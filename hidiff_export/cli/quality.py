"""`hidiff-export quality`: pictures of several bundles, or of a bundle and diffusers, compared."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hidiff_export.cli.options import SHARED_SETTINGS, allow_links_option, drawing_options
from hidiff_export.errors import InputError

if TYPE_CHECKING:
    from hidiff_export.quality.contenders import Contender

_COUNT = 24


@click.command(
    short_help="Compare the pictures of bundles, and of PyTorch.",
    epilog="""\b
Examples:
  hidiff-export quality demo-bundle demo-int8
  hidiff-export quality float32-bundle int8-bundle --prompts prompts.txt --features ./clip-vision
  hidiff-export quality bundle --diffusers ./my-sdxl --stock --prompts prompts.txt --features ./clip-vision
  hidiff-export quality bundle --other-seeds --steps 20 --prompts prompts.txt --features resnet.onnx --json
""",
)
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--diffusers", metavar="SOURCE", help="Also draw with diffusers, with HiDiffusion; it is the reference.")
@click.option("--stock", is_flag=True, help="Also draw with diffusers without HiDiffusion. Needs --diffusers.")
@click.option("--other-seeds", is_flag=True, help="Also draw the reference with other seeds: how far chance is.")
@click.option("--across-models", is_flag=True, help="Compare bundles of different checkpoints or LoRA files too.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of prompts, as hidiff-run generate takes it; not needed for the demo model.",
)
@drawing_options(_COUNT)
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    help="What to see with: a folder of a CLIP vision model, an .onnx file, or a folder of a classifier; "
    "not needed for the demo model.",
)
@allow_links_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("quality"),
    show_default=True,
    help="Folder for the report, the sheet and all pictures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and show no progress.")
def quality(
    bundles: tuple[Path, ...],
    diffusers: str | None,
    stock: bool,
    other_seeds: bool,
    across_models: bool,
    prompts: Path | None,
    count: int,
    seed: int,
    features: Path | None,
    allow_links: tuple[Path, ...],
    output: Path,
    as_json: bool,
    **shared: Any,
) -> None:
    """Draw the same prompts and seeds with every BUNDLE and compare the pictures with those of the first.

    Tells PSNR, SSIM and the distance of what a network sees, picture by picture, the distance of the two sets with its
    95 % interval (KID with that network's features, in thousandths), and, where a classifier sees, how many pictures
    show what was asked for. Writes quality.json, quality.md, a sheet quality.png, and every picture.
    """
    from hidiff_export.cli.console import console, progress_display
    from hidiff_export.cli.shots import features_for, read_prompts, shots_of
    from hidiff_export.quality.contenders import check_comparable, check_settings_of_diffusers, resolve
    from hidiff_export.quality.features import ADVICE
    from hidiff_export.quality.quality_report import FILES, REPORT, SHEET, QualityReport
    from hidiff_export.quality.report_folder import report_folder
    from hidiff_export.quality.scoring import compare
    from hidiff_runtime.format.bundle_folder import BundleFolder

    if stock and diffusers is None:
        raise InputError(
            "Without a checkpoint diffusers cannot draw.", given="--stock", advice="Add --diffusers SOURCE."
        )
    manifests = {folder: BundleFolder(folder, allow_links).manifest() for folder in bundles}
    check_comparable(manifests, across_models=across_models)
    first = manifests[bundles[0]]
    settings = {name: shared[name] for name in SHARED_SETTINGS if shared[name] is not None}
    shots = shots_of(read_prompts(prompts, first), count, seed, settings)
    requests = resolve(bundles[0], shots, allow_links)
    shots = [shot.with_settings_of(request) for shot, request in zip(shots, requests, strict=True)]
    for folder in bundles[1:]:
        resolve(folder, shots, allow_links)
    if diffusers is not None:
        check_settings_of_diffusers(shots)
    contenders = _contenders(bundles, diffusers, allow_links, stock=stock, other_seeds=other_seeds)
    model = features_for(features, first)
    if model is None:
        raise InputError("There is nothing to see pictures with.", given="no --features", advice=ADVICE)
    steps = [request.settings.steps or 1 for request in requests]
    with (
        report_folder(output, FILES) as folder,
        progress_display(quiet=as_json) as display,
        display.stage("pictures", reused=False) as progress,
    ):
        scores = compare(contenders, shots, steps, model, folder, progress)
        used = requests[0].settings
        told = {
            "size": f"{first.width}x{first.height}",
            "steps": used.steps,
            "sampler": used.sampler,
            "guidance scale": used.guidance_scale,
            "seeds from": shots[0].seed,
        }
        report = QualityReport(model.name, told, scores)
        report.save(folder)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
        return
    console().print(report.table())
    click.echo(f"look at {output / SHEET}; every figure is in {output / REPORT}")


def _contenders(
    bundles: tuple[Path, ...], source: str | None, allow_links: tuple[Path, ...], *, stock: bool, other_seeds: bool
) -> list[Contender]:
    from hidiff_export.quality.contenders import BundleContender, DiffusersContender, OtherSeeds

    found: list[Contender] = []
    taken = {"diffusers", "stock"}
    if source is not None:
        found.append(DiffusersContender("diffusers", source, bundles[0], True, allow_links))
    for folder in bundles:
        found.append(BundleContender(_untaken(folder.resolve().name, taken), folder, allow_links))
        taken.add(found[-1].name)
    if stock and source is not None:
        found.append(DiffusersContender("stock", source, bundles[0], False, allow_links))
    if other_seeds:
        found.append(OtherSeeds(_untaken(f"{found[0].name}-other-seeds", taken), found[0]))
    return found


def _untaken(name: str, taken: set[str]) -> str:
    """Returns the name, with the first number from 2 on that makes it another than those taken."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)
