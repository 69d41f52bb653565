"""PyTorch's own results are recorded, so that every machine can check its engines against them without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.stored_configs import SCHEDULER_CONFIG, read_config
from hidiff_export.compiler.graph_specs import bare_manifest
from hidiff_export.compiler.stages.scheduler_tables import sampler_tables
from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.compiler.stages.weights import model_index
from hidiff_export.reference.magnitudes import FILE, Magnitudes
from hidiff_export.reference.reference import record_reference
from hidiff_export.reference.reference_weights import networks_of_store
from hidiff_runtime.verification.manifest_facts import facts_of


class ReferenceStage(Stage):
    """The reference samples, in ``reference/``: float32 PyTorch on the stored weights, and diffusers' schedulers.

    Args:
        force_zeros: the manifest's ``force_zeros_for_empty_prompt``; None asks the recipe's checkpoint.
    """

    name = "reference"
    title = "PyTorch reference"
    needs = ("weights", "samplers")

    def __init__(self, force_zeros: bool | None = None) -> None:
        self.force_zeros = force_zeros

    def inputs(self, context: StageContext) -> Any:
        """Returns what decides which evaluations are recorded: everything in the bucket's recipe."""
        return context.recipe.fingerprint() if context.first else [context.recipe.fingerprint(), "calls"]

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Runs the reference and records its evaluations; tells what comes near the end of float16's range."""
        config = read_config(context.folder / SCHEDULER_CONFIG)
        networks = networks_of_store(context.folder, context.recipe)
        folder = context.reference
        tables = sampler_tables(context)
        zeros = self.force_zeros
        if zeros is None:
            zeros = model_index(context.recipe).force_zeros_for_empty_prompt
        facts = facts_of(bare_manifest(context, tables, zeros))
        shared = not context.first
        written = record_reference(
            networks,
            context.recipe,
            config,
            folder,
            report,
            tables={} if shared else tables,
            facts=facts,
            shared=shared,
        )
        if folder / FILE in written:
            for notice in Magnitudes.read(folder / FILE).notices:
                context.notice(notice)
        return written
