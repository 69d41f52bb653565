"""`hidiff-export inspect`: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from hidiff_runtime.manifest import Manifest


@click.command(
    short_help="Show what is in a bundle.",
    epilog="""\b
Examples:
  hidiff-export inspect bundle
  hidiff-export inspect bundle --json
""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(directory: Path, as_json: bool) -> None:
    """Show the phases, files, sizes and parity figures of the bundle in DIRECTORY. Reads the manifest alone."""
    print_bundle(bundle_summary(directory), as_json=as_json)


def bundle_summary(directory: Path) -> dict[str, Any]:
    """What people and machines want to know of a bundle: phases with steps and sizes, weights, samplers, parity."""
    from hidiff_runtime.manifest import Manifest

    manifest = Manifest.read(directory)
    return {
        "folder": str(directory),
        "recipe": manifest.recipe.get("name", ""),
        "family": manifest.family,
        "task": manifest.task,
        "width": manifest.width,
        "height": manifest.height,
        "batch": manifest.batch,
        "guidance": manifest.guidance,
        "precision": manifest.precision,
        "phases": [_phase(manifest, index) for index in range(len(manifest.phases))],
        "weights": {name: manifest.files[path].size for name, path in manifest.weights.items()},
        "samplers": sorted(manifest.samplers),
        "default_sampler": manifest.default_sampler,
        "steps": [manifest.steps[0], manifest.steps[-1]],
        "steps_left_out": _left_out(manifest),
        "bytes": sum(record.size for record in manifest.files.values()),
        "parity": _parity(directory, manifest),
        "tools": dict(manifest.tools),
    }


def _phase(manifest: Manifest, index: int) -> dict[str, Any]:
    from hidiff_runtime.phases import PhasePlan

    record = manifest.phases[index]
    steps = manifest.steps[-1] if 50 not in manifest.steps else 50
    spans = [span for span in PhasePlan(manifest.rule, steps).spans if span.phase == record.phase]
    return {
        "phase": record.phase.name,
        "steps": {"of": steps, "ranges": [[span.first, span.last] for span in spans]},
        "graph_bytes": manifest.files[record.graph].size,
        "engines": {name: manifest.files[path].size for name, path in record.engines.items()},
        "inputs": [str(spec) for spec in record.inputs],
        "outputs": [str(spec) for spec in record.outputs],
    }


def _left_out(manifest: Manifest) -> list[int | str]:
    """What the recipe asked for and no table holds, as recipes write step counts."""
    from hidiff_export.recipe import Recipe
    from hidiff_export.recipe.values import ranges

    recipe = Recipe.from_dict(manifest.recipe, "the recipe in the bundle's manifest")
    return ranges(steps for steps in recipe.steps if steps not in manifest.steps)


def _parity(directory: Path, manifest: Manifest) -> list[dict[str, Any]]:
    if manifest.report is None:
        return []
    verdicts = json.loads((directory / manifest.report).read_text(encoding="utf-8"))["verdicts"]
    assert isinstance(verdicts, list)
    return verdicts


def _print_parity(summary: dict[str, Any], console: Console) -> None:
    from hidiff_runtime.verdict import Verdict, render

    if not summary["parity"]:
        console.print(f"parity: not measured yet; run [bold]hidiff-export verify {summary['folder']}[/bold]")
        return
    console.print(render(Verdict.from_dict(verdict) for verdict in summary["parity"]), highlight=False)


def megabytes(size: int) -> str:
    """A file size for people, in units of a million bytes."""
    return f"{size / 1e6:,.1f} MB"


def print_bundle(summary: dict[str, Any], *, as_json: bool) -> None:
    """Prints what `bundle_summary` gave, as JSON or as tables."""
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    guidance = "with guidance" if summary["guidance"] else "without guidance"
    console.print(
        f"[bold]{summary['folder']}[/bold]: {summary['family']} {summary['task']}, "
        f"{summary['width']}x{summary['height']}, batch {summary['batch']} {guidance}, {summary['precision']}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("phase", "left"), ("steps", "left"), ("graph", "right"), ("engines", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]  # a literal in rich's own types
    for phase in summary["phases"]:
        ranges = ", ".join(f"{first}-{last}" for first, last in phase["steps"]["ranges"]) or "none"
        engines = ", ".join(f"{name} ({megabytes(size)})" for name, size in phase["engines"].items())
        table.add_row(phase["phase"], f"{ranges} of {phase['steps']['of']}", megabytes(phase["graph_bytes"]), engines)
    console.print(table)
    for name, size in summary["weights"].items():
        console.print(f"weights of the {name}: {megabytes(size)}; the whole bundle: {megabytes(summary['bytes'])}")
    first, last = summary["steps"]
    steps = f"{first} to {last}" if first != last else str(first)
    console.print(f"samplers: {', '.join(summary['samplers'])} (default {summary['default_sampler']}), {steps} steps")
    if summary["steps_left_out"]:
        left_out = ", ".join(map(str, summary["steps_left_out"]))
        console.print(f"left out: {left_out} steps, which a sampler of diffusers refuses", style="yellow")
    _print_parity(summary, console)
    for title, stage in summary.get("stages", {}).items():
        console.print(f"[dim]{title}: {'reused' if stage['reused'] else format(stage['seconds'], '.1f') + ' s'}[/dim]")
