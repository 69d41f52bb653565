"""The stages of a build, in the order data flows: weights, sampler tables, graphs, engines, reference, self-check.

A recipe is data and a stage is work: a stage says which stages it needs, from which inputs its key is made, and
returns the files it wrote. `hidiff_export.compiler.compile` runs them and keeps what is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from hidiff_export.engines.protocol import Report
from hidiff_export.graph.declined import ENDING
from hidiff_export.recipe import Recipe
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.phases import Phase, PhaseRule

__all__ = ["Report", "Stage", "StageContext", "traced_graph"]


@dataclass(frozen=True)
class StageContext:
    """What every stage of one build sees: one bucket, a size and a batch, of those that the bundle is built for.

    Args:
        recipe: the validated recipe, of this bucket alone.
        folder: the folder the build works in; every path in it is final except for this prefix.
        notice: told in a line what a person should know who builds, though nothing failed.
        every: the recipes of all buckets, the default's first; none where this is the only one.
    """

    recipe: Recipe
    folder: Path
    notice: Callable[[str], None] = field(default=lambda _text: None)
    every: tuple[Recipe, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, notice: Callable[[str], None] = lambda _text: None) -> StageContext:
        """Returns the first bucket of a recipe."""
        buckets = recipe.buckets
        return cls(buckets[0], folder, notice, buckets if len(buckets) > 1 else ())

    @property
    def buckets(self) -> tuple[StageContext, ...]:
        """The build's buckets, the first one first."""
        return tuple(replace(self, recipe=recipe) for recipe in self.every) or (self,)

    @property
    def first(self) -> bool:
        """Whether this is the first bucket, which has what no size changes."""
        return not self.every or self.recipe == self.every[0]

    @property
    def suffix(self) -> str:
        """What ends the names of the bucket's own files; nothing for the first."""
        return "" if self.first else _named(self.recipe, self.every[0])

    @property
    def rule(self) -> PhaseRule:
        """When each phase runs."""
        return self.recipe.phase_rule()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The distinct phases the recipe's rule can reach, in running order."""
        return self.rule.phases()

    @property
    def graphs(self) -> tuple[Path, ...]:
        """Every portable graph that is the bucket's own: the phases', the step graph, and those of the other networks
        that there are and that no bucket before has.
        """
        control = (self.controlnet_graph(unguided=unguided) for unguided in self.controlled)
        text = map(self.text_encoder_graph, self.recipe.text_encoders if self.first else ())
        vae = (self.vae_graph("decoder"), self.vae_graph("encoder")) if self.has_vae else ()
        return (*map(self.graph, self.phases), *control, *self.step_graphs, *text, *vae)

    @property
    def step_graphs(self) -> tuple[Path, ...]:
        """The portable step graphs: after guided phases, and after the others where there are any."""
        return tuple(self.step_graph(unguided=each) for each in sorted({phase.unguided for phase in self.phases}))

    @property
    def controlled(self) -> tuple[bool, ...]:
        """Which phases the ControlNet has a graph for, if there is one: with guidance, and without where it runs."""
        if self.recipe.controlnet is None:
            return ()
        return tuple(sorted({phase.unguided for phase in self.phases if phase.control}))

    @property
    def has_vae(self) -> bool:
        """Whether the bucket has a VAE's graphs of its own: the first one whose tiles are of their size has."""
        alike = (one for one in self.every if _tile(one) == _tile(self.recipe))
        return self.recipe.vae and next(alike, self.recipe) == self.recipe

    def inside(self, path: Path) -> str:
        """Returns a file's path inside the bundle, as manifests have it."""
        return path.relative_to(self.folder).as_posix()

    @property
    def unet(self) -> Path:
        """The folder of the UNet's configuration, weights, graphs and engines."""
        return self.folder / "unet"

    def graph(self, phase: Phase) -> Path:
        """Returns the portable graph of a phase."""
        return self.unet / f"{phase.name}{self.suffix}.onnx"

    @property
    def timing_graph(self) -> Path:
        """The portable graph that backends are timed by; all buckets have one."""
        return self.unet / "timing.onnx"

    def declined(self, stage: str) -> Path:
        """Returns where a stage keeps what its passes declined."""
        return self.unet / f"{stage}{self.suffix}{ENDING}"

    def traced(self, phase: Phase) -> Path:
        """Returns a phase's graph as traced: the portable one, or the float16 one that it is quantized from."""
        return traced_graph(self.graph(phase), self.recipe.precision)

    def controlnet_graph(self, *, unguided: bool = False) -> Path:
        """Returns the portable graph of the ControlNet, for phases with or without guidance."""
        return self.folder / "controlnet" / f"controlnet{'-unguided' * unguided}{self.suffix}.onnx"

    def text_encoder_graph(self, name: str) -> Path:
        """Returns the portable graph of a text encoder, in a folder of its name."""
        return self.folder / name / f"{name}.onnx"

    def tokenizer(self, name: str) -> Path:
        """Returns what makes the tokens of a text encoder."""
        return self.folder / name / "tokenizer.json"

    def vae_graph(self, half: Literal["decoder", "encoder"]) -> Path:
        """Returns the portable graph of one half of the VAE."""
        width, height = _tile(self.recipe)
        usual = not self.every or _tile(self.every[0]) == (width, height)
        return self.folder / "vae" / (f"{half}.onnx" if usual else f"{half}-{width}x{height}.onnx")

    @property
    def preview(self) -> Path:
        """The factors that make a preview of latents."""
        return self.folder / "vae" / "preview.json"

    def step_graph(self, *, unguided: bool = False) -> Path:
        """Returns the portable step graph after phases with or without guidance: that, the sampler's step and the next
        input.
        """
        return self.folder / "step" / f"step{'-unguided' * unguided}{self.suffix}.onnx"

    @property
    def reference(self) -> Path:
        """The folder of the bucket's reference samples."""
        return self.folder / "reference" / self.suffix.removeprefix("-")


def _tile(recipe: Recipe) -> tuple[int, int]:
    return recipe.tiles.width, recipe.tiles.height


def _named(recipe: Recipe, first: Recipe) -> str:
    batch = f"-b{recipe.batch}" if recipe.batch != first.batch else ""
    return f"-{recipe.width}x{recipe.height}{batch}"


def traced_graph(graph: Path, precision: Precision) -> Path:
    """Finds the graph as it is traced: ``strided.float16.onnx`` for a quantized ``strided.onnx``, else that itself."""
    return graph.with_suffix(f".{precision.stored.value}.onnx") if precision.quantized else graph


class Stage(Protocol):
    """One step of a build.

    Attributes:
        name: in keys and records.
        title: for people.
        needs: names of the stages whose results it reads.
    """

    name: str
    title: str
    needs: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module whose code decides the stage's result."""
        return type(self).__module__

    def inputs(self, context: StageContext) -> Any:
        """Returns what the stage's result depends on beside the stages it needs: JSON, part of the cache key."""

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Does the work; returns the files it wrote, all below ``context.folder``."""
