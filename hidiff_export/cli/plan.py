"""`hidiff-export plan`: what a recipe comes to, before anything is built."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from hidiff_export.cli.console import console
from hidiff_export.cli.options import recipe_argument, set_option
from hidiff_runtime.phases import PhaseKind

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from hidiff_export.recipe.run_plan import PlannedPhase, RunPlan


_KINDS = {
    PhaseKind.STRIDED: ("cyan", "one downsampler takes stride 4 instead of 2, so everything below it is half the size"),
    PhaseKind.POOLED: ("magenta", "the middle feature maps are average-pooled by 2, and brought back bicubic"),
    PhaseKind.STRIDED_POOLED: ("blue", "both: a downsampler of stride 4, and pooled middle feature maps"),
    PhaseKind.WINDOWED: ("green", "the UNet's own sizes"),
}
"""The color and the meaning of each kind of phase."""


@click.command(
    short_help="Show a recipe's phases, steps, sizes and cost.",
    epilog="""\b
Examples:
  hidiff-export plan sdxl-2048
  hidiff-export plan my-recipe.yaml --steps 30 --set width=2560 --set height=1440
  hidiff-export plan sd15-1024 --json
""",
)
@recipe_argument
@click.option("--steps", type=int, help="Denoising steps of the run. [default: 50, or the most the recipe tabulates]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@set_option
def plan(recipe: str, steps: int | None, as_json: bool, assignments: tuple[str, ...]) -> None:
    """Show the phases of RECIPE (a file, or the name of a shipped one), their steps, sizes and cost.

    Operations are counted, not measured: two for each multiply-add of a convolution, a linear layer or an attention
    product.
    """
    from hidiff_export.recipe import Recipe
    from hidiff_export.recipe.run_plan import RunPlan, default_steps

    loaded = Recipe.load(recipe, assignments)
    count = default_steps(loaded) if steps is None else steps
    runs = [RunPlan(bucket, count) for bucket in loaded.buckets]
    if as_json:
        buckets = {"buckets": [run.to_json() for run in runs]} if len(runs) > 1 else {}
        click.echo(json.dumps({**runs[0].to_json(), **buckets}, indent=1))
        return
    console().print(*_shown(runs), sep="\n")


def _shown(runs: Sequence[RunPlan]) -> Iterator[RenderableType]:
    """Yields each size with its phases, then what all have in common by the first."""
    run, recipe = runs[0], runs[0].recipe
    guidance = "with guidance" if recipe.guidance else "without guidance"
    yield (
        f"[bold]{recipe.name}[/bold]: {recipe.family.value}, {recipe.task.value}, {recipe.width}x{recipe.height} px, "
        f"batch {recipe.batch} {guidance}, {recipe.precision.value}, {run.steps} steps\n"
    )
    yield _phase_table(run)
    for other in runs[1:]:
        size = f"{other.recipe.width}x{other.recipe.height} px"
        yield f"\n[bold]{size}[/bold], batch {other.recipe.batch}; beside the stock UNet {_saving(other)}\n"
        yield _phase_table(other)
    yield ""
    yield _summary(run)
    if run.steps not in recipe.steps:
        yield f"\n[yellow]A bundle of this recipe cannot run {run.steps} steps: its tables do not hold them.[/yellow]"


def _phase_table(run: RunPlan) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    unit = Unit.of(run)
    batch = run.recipe.model_batch
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, show_footer=True, footer_style="bold")
    table.add_column("phase", "run", overflow="fold")
    table.add_column("steps", str(run.steps), justify="right", no_wrap=True)
    table.add_column("which", no_wrap=True)
    table.add_column("feature maps", min_width=9)
    table.add_column("windows\n2x2 of", no_wrap=True)
    for header, footer in (
        (f"{unit.name}\na latent", ""),
        (f"a step\nof {batch}" if batch > 1 else "a step", ""),
        ("all its\nsteps", unit.show(run.run_flops)),
        ("share", "100%"),
    ):
        table.add_column(header, footer, justify="right", no_wrap=True)
    for phase in run.phases:
        table.add_row(*_row(run, phase, unit), style=_KINDS[phase.span.phase.kind][0])
    return table


def _row(run: RunPlan, phase: PlannedPhase, unit: Unit) -> tuple[str, ...]:
    span = phase.span
    more = [name for name in ("control", "unguided", "shallow") if getattr(phase.phase, name)]
    return (
        " + ".join((span.phase.kind.value, *more)),
        str(span.steps) if phase.computed == span.steps else f"{phase.computed} of {span.steps}",
        f"{span.first}-{span.last}" if span.steps > 1 else f"{span.first}",
        " ".join(_area(*size) for size in phase.feature_sizes),
        _windows(phase),
        unit.show(phase.flops),
        unit.show(phase.batched_flops),
        unit.show(phase.run_flops),
        f"{phase.run_flops / run.run_flops:.0%}",
    )


def _area(height: int, width: int) -> str:
    return f"{width}²" if width == height else f"{width}x{height}"


def _windows(phase: PlannedPhase) -> str:
    """Returns each window shape once; a star where the feature map is odd and is resized first."""
    shapes = (_area(*window.window) + ("*" if window.resized else "") for window in phase.geometry.windows)
    return " ".join(dict.fromkeys(shapes)) or "none"


def _summary(run: RunPlan) -> Table:
    from rich.table import Table

    recipe, unit = run.recipe, Unit.of(run)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for kind in dict.fromkeys(phase.span.phase.kind for phase in run.phases):
        table.add_row(kind.value, _KINDS[kind][1])
    if recipe.unet_layout.windowed_blocks:
        table.add_row("windows", "four shifted ones, in every phase: the top blocks' attention stays inside them")
    if any(window.resized for phase in run.phases for window in phase.geometry.windows):
        table.add_row("*", "the feature map is odd: resized (bicubic) to even before it is cut, and back afterwards")
    if recipe.guidance_until is not None:
        table.add_row("unguided", "the prompts alone, half the batch: what follows is not guided")
    if (reuse := recipe.phase_rule().reuse) is not None:
        old = f"over features of at most {reuse.every - 1} steps before"
        table.add_row("shallow", f"the last {reuse.depth} layers alone, {old}")
    if recipe.forecast is not None:
        computed = f"{sum(run.computed)} of {run.steps} steps: {recipe.forecast_record}; the others are forecast"
        table.add_row("computed", computed)
    table.add_row("stock UNet", f"{unit.show(run.stock.flops)} {unit.name} a latent; this run takes {_saving(run)}")
    if run.controlnet.parameters:
        control = f"{unit.show(run.controlnet.flops)} {unit.name} a latent, counted in the phases it joins"
        table.add_row("ControlNet", control)
    table.add_row("weights", _weights(run))
    channels, height, width = recipe.latent_shape
    table.add_row("latents", f"{_size(run.latent_bytes)}, {recipe.batch}x{channels}x{height}x{width} float32")
    return table


def _saving(run: RunPlan) -> str:
    return "as many operations" if run.saving == 1 else f"{run.saving:.2f}x fewer operations"


def _weights(run: RunPlan) -> str:
    graphs = len(run.recipe.phase_rule().phases())
    shared = "of one graph" if graphs == 1 else f"once for {graphs} graphs"
    parameters = f"{run.stock.parameters / 1e6:.2f} M parameters"
    if run.controlnet.parameters:
        parameters += f", the ControlNet's {run.controlnet.parameters / 1e6:.2f} M"
    return f"{_size(run.weight_bytes)} {run.recipe.precision.value} {shared}: {parameters}"


@dataclass(frozen=True)
class Unit:
    """The unit that operations are shown in: ``name`` is ``scale`` of them."""

    name: str
    scale: float

    @classmethod
    def of(cls, run: RunPlan) -> Unit:
        """Returns TFLOPs, or GFLOPs where an evaluation is a small part of one TFLOP."""
        return cls("TFLOPs", 1e12) if run.stock.flops > 1e11 else cls("GFLOPs", 1e9)

    def show(self, flops: int) -> str:
        """Returns the number with three digits or more."""
        number = flops / self.scale
        digits = 0 if number >= 1000 else 1 if number >= 100 else 2
        return f"{number:,.{digits}f}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
