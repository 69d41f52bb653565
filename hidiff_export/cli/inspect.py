"""`hidiff-export inspect`: what is in a bundle."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hidiff_export.cli.console import console as terminal
from hidiff_export.cli.options import allow_links_option
from hidiff_export.errors import BundleError, RecipeError
from hidiff_runtime.format.codec import REBUILD, Fields, read_object

if TYPE_CHECKING:
    from rich.console import Console

    from hidiff_runtime.format.bundle_folder import BundleFolder
    from hidiff_runtime.format.manifest import GraphRecord, Manifest
    from hidiff_runtime.format.specs import TextEncoderRecord, VaeRecord


@click.command(
    short_help="Show what is in a bundle.",
    epilog="""\b
Examples:
  hidiff-export inspect bundle
  hidiff-export inspect bundle --json
""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@allow_links_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(directory: Path, allow_links: tuple[Path, ...], as_json: bool) -> None:
    """Show the phases, files, sizes, noise schedule, parity figures and largest magnitudes of the bundle in DIRECTORY,
    and what graph passes left as it was. Reads the manifest, the records of plans, passes, verification and reference,
    and the scheduler's configuration alone.
    """
    print_bundle(bundle_summary(directory, allow_links), as_json=as_json)


def bundle_summary(directory: Path, allow_links: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns what people and machines want to know of a bundle: phases and sizes, weights, samplers, parity."""
    from hidiff_export.graph.declined import read_declined
    from hidiff_runtime.format.bundle_folder import BundleFolder

    folder = BundleFolder(directory, allow_links)
    manifest = folder.manifest()
    report = _report(folder, manifest)
    return {
        "folder": str(directory),
        "recipe": manifest.recipe.get("name", ""),
        "family": manifest.family,
        "task": manifest.task,
        "width": manifest.width,
        "height": manifest.height,
        "batch": manifest.batch,
        "buckets": [_bucket(one) for one in manifest.whole.manifests],
        "guidance": manifest.guidance,
        "guidance_rescale": manifest.guidance_rescale,
        "forecast": None if manifest.forecast is None else vars(manifest.forecast),
        "precision": manifest.precision,
        "phases": [_phase(folder, manifest, index) for index in range(len(manifest.phases))],
        "graphs": {name: _graph(folder, manifest, record) for name, record in manifest.others()},
        "text_encoders": [_text_encoder(record) for record in manifest.text_encoders],
        "vae": None if manifest.vae is None else _vae(manifest.vae),
        "weights": {name: manifest.files[path].size for name, path in manifest.weights.items()},
        "source": manifest.recipe.get("source", ""),
        "lora": _loras(manifest),
        "noise_schedule": _noise_schedule(folder, manifest),
        "samplers": sorted(manifest.samplers),
        "default_sampler": manifest.default_sampler,
        "steps": [manifest.steps[0], manifest.steps[-1]],
        "steps_left_out": _left_out(manifest),
        "bytes": sum(record.size for record in manifest.files.values()),
        "parity": _parity(report, manifest),
        "magnitudes": _magnitudes(folder, manifest, report),
        "declined": read_declined(folder, manifest.files),
        "tools": dict(manifest.tools),
    }


def _bucket(manifest: Manifest) -> dict[str, Any]:
    """Returns a size and a batch of the bundle, and the bytes of the files that it refers to itself."""
    own = {path for _, path in manifest.own_paths()}
    size = sum(manifest.files[path].size for path in own)
    return {"width": manifest.width, "height": manifest.height, "batch": manifest.batch, "bytes": size}


def _phase(folder: BundleFolder, manifest: Manifest, index: int) -> dict[str, Any]:
    from hidiff_runtime.format.left_out import phases_of_steps

    record = manifest.phases[index]
    steps = manifest.steps[-1] if 50 not in manifest.steps else 50
    every = phases_of_steps(manifest.rule, manifest.forecast, steps)
    groups = itertools.groupby(range(steps), lambda step: every[step] == record.phase)
    ranges = [list(those) for own, those in groups if own]
    return {
        "phase": record.phase.name,
        "steps": {"of": steps, "ranges": [[own[0], own[-1]] for own in ranges]},
        **_graph(folder, manifest, record),
    }


def _graph(folder: BundleFolder, manifest: Manifest, record: GraphRecord) -> dict[str, Any]:
    from hidiff_runtime.backends.tensorrt.plan_record import BACKENDS

    return {
        "graph_bytes": manifest.files[record.graph].size,
        "engines": {name: _engine_bytes(folder, manifest, name, path) for name, path in record.engines.items()},
        "plans": {name: _plan(folder.file(path)) for name, path in record.engines.items() if name in BACKENDS},
        "inputs": [str(spec) for spec in record.inputs],
        "outputs": [str(spec) for spec in record.outputs],
    }


def _text_encoder(record: TextEncoderRecord) -> dict[str, Any]:
    outputs = {spec.name: list(spec.shape) for spec in record.outputs}
    return {"name": record.name, "tokenizer": record.tokenizer, "clip_skip": record.clip_skip, "outputs": outputs}


def _vae(record: VaeRecord) -> dict[str, Any]:
    height, width = record.decoder.outputs[0].shape[2:]
    return {"tile": [width, height], "overlap": record.overlap, "scaling_factor": record.scaling_factor}


def _loras(manifest: Manifest) -> list[dict[str, Any]]:
    """Returns the LoRA files in the weights, with the SHA-256 of each; nothing that is not one by its fields."""
    given = _listed(manifest.recipe.get("lora"))
    known = [lora for lora in given if isinstance(lora, dict) and isinstance(lora.get("scale"), (int, float))]
    return [
        {**lora, "sha256": manifest.fingerprints.get(f"lora.{index}", "")}
        for index, lora in enumerate(known)
        if isinstance(lora.get("path"), str)
    ]


def _engine_bytes(folder: BundleFolder, manifest: Manifest, backend: str, path: str) -> int:
    """Returns an engine's size, with the files that it shares with others, but without weight stores."""
    from hidiff_runtime import backends

    if backend not in backends.NAMES:
        return manifest.files[path].size
    engine = folder.file(path)
    root = engine.parents[path.count("/")]
    names = {file.relative_to(root).as_posix() for file in backends.get(backend).files(engine)}
    if foreign := sorted(names - manifest.files.keys()):
        raise BundleError(f"The engine {path} names a file that the manifest does not list.", given=foreign[0])
    return sum(manifest.files[name].size for name in names - set(manifest.weights.values()))


def _plan(path: Path) -> dict[str, Any]:
    """Returns what a plan was built with and for; in bundles of older versions also what building it took."""
    from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord

    record = PlanRecord.read(path)
    costs = {key: record.options.get(key) for key in ("seconds", "peak_bytes")}
    if not all(type(cost) in (int, float) for cost in costs.values()):
        costs = {}
    return {"version": record.version, "targets": list(record.targets), "device": record.device, **costs}


def _noise_schedule(folder: BundleFolder, manifest: Manifest) -> dict[str, Any]:
    """Returns what runs are laid out by, in the words of recipes; empty for a bundle that does not say."""
    from hidiff_export.checkpoints.stored_configs import SCHEDULER_CONFIG, read_config

    if SCHEDULER_CONFIG not in manifest.files:
        return {}
    config = read_config(folder.file(SCHEDULER_CONFIG))
    return {
        "prediction": config.get("prediction_type", "epsilon"),
        "rescale_betas_zero_snr": config.get("rescale_betas_zero_snr", False),
        "timestep_spacing": config.get("timestep_spacing"),
        "timesteps": _listed(manifest.recipe.get("timesteps")) or None,
        "edm": "sigma_data" in config,
    }


def _listed(value: Any) -> list[Any]:
    """Returns a list as it is, and nothing for what a recipe of another version has in its place."""
    return value if isinstance(value, list) else []


def _schedule_line(schedule: dict[str, Any]) -> str:
    words = [f"predicts {schedule['prediction']}"]
    if schedule["edm"]:
        words.append("EDM")
    if schedule["rescale_betas_zero_snr"]:
        words.append("zero terminal SNR")
    if schedule["timesteps"]:
        words.append(f"timesteps {', '.join(map(str, schedule['timesteps']))}")
    elif schedule["timestep_spacing"]:
        words.append(f"{schedule['timestep_spacing']} timesteps")
    return f"noise schedule: {', '.join(words)}"


def _left_out(manifest: Manifest) -> list[int | str]:
    """Returns what the recipe asked for and no table holds, as recipes write step counts."""
    from hidiff_export.recipe import Recipe
    from hidiff_export.recipe.field_types import ranges

    try:
        recipe = Recipe.from_dict(manifest.recipe, "the recipe in the bundle's manifest")
    except RecipeError as error:
        raise BundleError(error.summary, given=error.given, advice=REBUILD) from error
    return ranges(steps for steps in recipe.steps if steps not in manifest.steps)


def _report(folder: BundleFolder, manifest: Manifest) -> dict[str, Any]:
    """Returns the report of the last verification; empty where there was none."""
    if manifest.report is None:
        return {}
    return read_object(folder.file(manifest.report), manifest.report, "The parity report")


def _parity(report: dict[str, Any], manifest: Manifest) -> list[dict[str, Any]]:
    """Returns the verdicts of a report."""
    if manifest.report is None:
        return []
    from hidiff_runtime.verification.comparison import Verdict

    return [Verdict.from_dict(verdict).to_dict() for verdict in Fields(report, manifest.report).items("verdicts")]


_MAGNITUDES = "reference/magnitudes.json"


def _magnitudes(folder: BundleFolder, manifest: Manifest, report: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what was measured beside float16's range, by the last verification or else by the build; or None."""
    fields = Fields(report, manifest.report or "")
    found = fields.optional("magnitudes", fields.mapping) if "magnitudes" in fields else None
    if found is None and _MAGNITUDES in manifest.files:
        found = read_object(folder.file(_MAGNITUDES), _MAGNITUDES, "The record of magnitudes")
    return found


def _print_records(summary: dict[str, Any], console: Console) -> None:
    """Prints the largest magnitudes, and what graph passes left as it was."""
    from hidiff_export.graph.declined import lines
    from hidiff_export.reference.magnitudes import Magnitudes

    found = summary["magnitudes"]
    measured = () if found is None else Magnitudes.from_dict(found, _MAGNITUDES).lines
    for line in (*measured, *lines(summary["declined"])):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_parity(summary: dict[str, Any], console: Console) -> None:
    from hidiff_runtime.verification.comparison import Verdict, render

    if not summary["parity"]:
        console.print(f"parity: not measured yet; run [bold]hidiff-export verify {summary['folder']}[/bold]")
        return
    text = render(Verdict.from_dict(verdict) for verdict in summary["parity"])
    console.print(text, highlight=False, markup=False)


def _print_pictures(summary: dict[str, Any], console: Console) -> None:
    """What becomes of prompts and of latents."""
    encoders = [
        f"{encoder['name']}, {encoder['outputs']['prompt_embeds'][-1]} wide, clip skip up to {encoder['clip_skip']}"
        for encoder in summary["text_encoders"]
    ]
    console.print(f"text encoders: {'; '.join(encoders) or 'none, prompts come as embeddings'}")
    vae = summary["vae"]
    if vae is None:
        console.print("VAE: none, latents come out")
        return
    tiles = f"tiles that share {vae['overlap']} pixels" if vae["overlap"] else "one tile"
    width, height = vae["tile"]
    console.print(f"VAE: {width}x{height} pixels, {tiles}, scaling factor {vae['scaling_factor']:g}")


def megabytes(size: int) -> str:
    """Returns a file size for people, in units of a million bytes."""
    return f"{size / 1e6:,.1f} MB"


def _engine_line(name: str, size: int, plan: dict[str, Any]) -> str:
    """Returns ``tensorrt-rtx (25.0 MB for sm89 sm120, built in 6 s and 0.6 GB)``"""
    words = f"{name} ({megabytes(size)}"
    if plan:
        words += f" for {plan['device'] or ' '.join(plan['targets'])}"
    if "seconds" in plan:
        words += f", built in {plan['seconds']:.0f} s and {plan['peak_bytes'] / 1e9:.1f} GB"
    return f"{words})"


def _sizes(graph: dict[str, Any]) -> tuple[str, str]:
    """Returns the cells of a graph's size and of its engines."""
    from rich.markup import escape

    plans = graph["plans"]
    engines = "\n".join(_engine_line(name, size, plans.get(name, {})) for name, size in graph["engines"].items())
    return megabytes(graph["graph_bytes"]), escape(engines)


def print_bundle(summary: dict[str, Any], *, as_json: bool) -> None:
    """Prints what `bundle_summary` gave, as JSON or as tables."""
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    console = terminal()
    guidance = "with guidance" if summary["guidance"] else "without guidance"
    if summary["guidance_rescale"]:
        guidance += f" rescaled by {summary['guidance_rescale']:g}"
    console.print(
        f"[bold]{escape(summary['folder'])}[/bold]: {escape(summary['family'])} {escape(summary['task'])}, "
        f"{summary['width']}x{summary['height']}, batch {summary['batch']} {guidance}, {escape(summary['precision'])}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("phase", "left"), ("steps", "left"), ("graph", "right"), ("engines", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]  # a literal in rich's own types
    for phase in summary["phases"]:
        ranges = ", ".join(f"{first}-{last}" for first, last in phase["steps"]["ranges"]) or "none"
        table.add_row(phase["phase"], f"{ranges} of {phase['steps']['of']}", *_sizes(phase))
    for name, graph in summary["graphs"].items():
        table.add_row(name, "", *_sizes(graph))
    console.print(table)
    if summary["forecast"] is not None:
        from hidiff_runtime.format.forecast_record import Forecast

        console.print(f"computed: {Forecast(**summary['forecast'])} of a run's evaluations; the others are forecast")
    sizes = ", ".join(f"{name} {megabytes(size)}" for name, size in summary["weights"].items())
    console.print(f"weights: {escape(sizes)}; the whole bundle: {megabytes(summary['bytes'])}")
    if len(summary["buckets"]) > 1:
        drawn = (
            f"{one['width']}x{one['height']}, batch {one['batch']} ({megabytes(one['bytes'])})"
            for one in summary["buckets"]
        )
        console.print(f"sizes: {'; '.join(drawn)}; the phases above are the first one's", highlight=False)
    _print_pictures(summary, console)
    for lora in summary["lora"]:
        console.print(
            f"LoRA in the weights: {escape(lora['path'])} at {lora['scale']:g}, SHA-256 {lora['sha256'][:16]}…"
        )
    if summary["noise_schedule"]:
        console.print(escape(_schedule_line(summary["noise_schedule"])))
    first, last = summary["steps"]
    steps = f"{first} to {last}" if first != last else str(first)
    samplers = f"{', '.join(summary['samplers'])} (default {summary['default_sampler']})"
    console.print(f"samplers: {escape(samplers)}, {steps} steps")
    if summary["steps_left_out"]:
        left_out = ", ".join(map(str, summary["steps_left_out"]))
        console.print(f"left out: {left_out} steps, which a sampler of diffusers refuses", style="yellow")
    _print_parity(summary, console)
    _print_records(summary, console)
    for title, stage in summary.get("stages", {}).items():
        console.print(f"[dim]{title}: {'reused' if stage['reused'] else format(stage['seconds'], '.1f') + ' s'}[/dim]")
