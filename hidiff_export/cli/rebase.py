"""`hidiff-export rebase`: another checkpoint under a bundle's graphs."""

from __future__ import annotations

from pathlib import Path

import click

from hidiff_export.cli.options import allow_links_option, lora_option, lora_values, set_option
from hidiff_export.errors import InputError, ParityError


@click.command(
    short_help="Point a bundle at another checkpoint, without exporting again.",
    epilog="""\b
Examples:
  hidiff-export rebase bundle --source ./my-finetune -o finetune-bundle
  hidiff-export rebase bundle --lora style.safetensors:0.8 -o style-bundle
  hidiff-export rebase bundle --source ./newer --no-lora -o bundle --force
  hidiff-export rebase bundle --set timestep_spacing=trailing --set steps=4-8 -o few-step-bundle
""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--source", help="The new checkpoint: hub id, diffusers folder, .safetensors file, or random:SEED.")
@click.option("--controlnet", metavar="SOURCE", help="The new ControlNet's checkpoint, of a bundle that has one.")
@lora_option
@set_option
@click.option("--no-lora", is_flag=True, help="Leave out the LoRA files that the bundle was built with.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder the new bundle becomes.")
@click.option("--force", is_flag=True, help="Start over, and replace a finished bundle at the output.")
@allow_links_option
@click.option("--no-verify", is_flag=True, help="Do not compare the new bundle with PyTorch at the end.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON and show no progress.")
@click.pass_context
def rebase(
    context: click.Context,
    directory: Path,
    source: str | None,
    controlnet: str | None,
    loras: tuple[str, ...],
    assignments: tuple[str, ...],
    no_lora: bool,
    output: Path,
    force: bool,
    allow_links: tuple[Path, ...],
    no_verify: bool,
    as_json: bool,
) -> None:
    """Make a bundle of another checkpoint of the same family with the graphs of the bundle in DIRECTORY.

    Weights, tokenizers and noise schedule are the new checkpoint's; graphs stay; engines, ranges and reference are made
    anew; then the bundle is verified. What is not named stays as the bundle's recipe has it, but for a noise schedule
    where the new checkpoint has its own. --set takes what graphs are not traced with: samplers, steps,
    noise schedule, forecast, parity bounds, backends.
    """
    from hidiff_export.cli.build import print_result
    from hidiff_export.cli.console import progress_display
    from hidiff_export.cli.verify import keep_report
    from hidiff_export.compiler.rebase import rebase as rebase_bundle
    from hidiff_runtime.format.manifest import Manifest

    if loras and no_lora:
        raise InputError("--lora and --no-lora contradict each other.", advice="Give one of the two.")
    changes: dict[str, object] = {"source": source, "controlnet": controlnet}
    changes = {key: value for key, value in changes.items() if value is not None}
    if loras or no_lora:
        changes["lora"] = lora_values(loras)
    if not changes and not assignments:
        raise InputError("Nothing is to be changed.", advice="Give --source, --controlnet, --lora, --no-lora or --set.")
    with progress_display(quiet=as_json) as display:
        result = rebase_bundle(
            directory,
            output,
            display,
            changes=changes,
            overrides=assignments,
            force=force,
            allow_links=allow_links,
        )
        report, manifest = None, Manifest.read(result.folder)
        if not no_verify:
            from hidiff_export.verification.verify import verify  # brings in torch, for which a refusal must not wait

            checkpoint = str(manifest.recipe["source"])
            with display.stage("verify", reused=False) as progress:
                report = verify(result.folder, against=checkpoint, progress=progress)
    if report is not None:
        keep_report(report, result.folder, manifest.digest)
    print_result(result, as_json=as_json)
    if report is not None and not report.ok:
        context.exit(ParityError.exit_code)
