"""`hidiff-export build`: recipe in, bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hidiff_export.cli.options import lora_option, lora_setting, recipe_argument, set_option

if TYPE_CHECKING:
    from hidiff_export.compiler.compile import BuildResult


@click.command(
    short_help="Compile a recipe into a bundle.",
    epilog="""\b
Examples:
  hidiff-export build demo -o demo-bundle
  hidiff-export build recipes/sdxl-2048.yaml -o bundle --source ./my-sdxl
  hidiff-export build sd15-1024 -o bundle --source random:0 --set batch=2
  hidiff-export build sd15-1024 -o bundle --lora style.safetensors:0.8 --lora pose.safetensors
  hidiff-export build sdxl-2048 -o bundle --set backend=tensorrt-rtx --set 'targets=[sm89, sm120]'
""",
)
@recipe_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder the bundle becomes.")
@click.option("--source", help="Checkpoint: hub id, diffusers folder, .safetensors file, or random:SEED.")
@lora_option
@set_option
@click.option("--force", is_flag=True, help="Start over, and replace a finished bundle at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON and show no progress.")
def build(
    recipe: str,
    output: Path,
    source: str | None,
    loras: tuple[str, ...],
    assignments: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Compile RECIPE (a file, or the name of a shipped one) into a bundle.

    An interrupted build goes on from its last finished stage when the same command is run again.
    """
    from hidiff_export.cli.console import progress_display
    from hidiff_export.compiler.compile import build as build_bundle
    from hidiff_export.recipe import Recipe

    changes = (*assignments, *((f"source={source}",) if source is not None else ()), *lora_setting(loras))
    loaded = Recipe.load(recipe, changes)
    with progress_display(quiet=as_json) as display:
        result = build_bundle(loaded, output, display, force=force)
    print_result(result, as_json=as_json)


def print_result(result: BuildResult, *, as_json: bool) -> None:
    """Prints a finished bundle and what its stages cost."""
    from hidiff_export.cli.inspect import bundle_summary, print_bundle

    summary = bundle_summary(result.folder)
    summary["stages"] = {
        stage.title: {"seconds": round(stage.seconds, 2), "reused": stage.reused} for stage in result.stages
    }
    summary["notices"] = list(result.notices)
    print_bundle(summary, as_json=as_json)
