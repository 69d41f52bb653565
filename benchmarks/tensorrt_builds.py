"""Builds every phase of a recipe with TensorRT-RTX at real size, without a GPU, and records what it took.

    python benchmarks/tensorrt_builds.py sd15-2048 --targets sm89 --work /tmp/builds

Each run is one row in ``benchmarks/tensorrt_builds.json``, in place of an earlier row of the same build, and the
tables of ``benchmarks/tensorrt_builds.md`` are written anew from all rows. Weights are random. Times are of a whole
process; peak memory is its largest resident set, the pages of the mapped weight store included. Nothing here is
asserted by tests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hidiff_export.compiler.graph_specs import phase_record
from hidiff_export.compiler.stages.graphs import GraphsStage
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.compiler.stages.weights import WEIGHTS, WeightsStage
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.built_plans import Built
from hidiff_export.engines.tensorrt.capabilities import examine
from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX
from hidiff_export.recipe import Recipe
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord

RESULTS = Path(__file__).with_suffix(".json")
MARK = "<!-- what follows is written by tensorrt_builds.py -->"


@dataclass(frozen=True)
class Plan:
    """One plan and what the library says of it; sizes in bytes."""

    name: str
    seconds: float
    peak: int
    plan: int
    scratch: int
    weights: int


@dataclass(frozen=True)
class Row:
    """One build: how it was asked for, what its graphs and plans took, and what lies on the disk; bytes and seconds."""

    recipe: str
    precision: str
    targets: str
    phases: int
    graph_seconds: float
    graph_peak: int
    graphs: int
    store: int
    plans: tuple[Plan, ...]
    stored: int
    machine: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells builds apart."""
        return self.recipe, self.precision, self.targets


def context_of(given: argparse.Namespace) -> StageContext:
    """The build's context, in a folder of its own for each recipe and precision."""
    recipe = Recipe.load(
        given.recipe,
        (
            "source=random:0",
            "text=false",
            "vae=false",
            "sampler=ddim",
            "steps=[20]",
            f"precision={given.precision}",
            "backend=tensorrt-rtx",
            f"targets=[{given.targets}]",
        ),
    )
    return StageContext(recipe, given.work / f"{given.recipe}-{given.precision}")


def export(context: StageContext) -> None:
    """Weights and graphs, and a sampler's table, which the step graph is made from."""
    context.folder.mkdir(parents=True, exist_ok=True)
    for stage in (WeightsStage(), SchedulerTablesStage(), GraphsStage()):
        stage.run(context, lambda *_: None)


def exported(context: StageContext) -> tuple[float, int]:
    """Seconds and peak memory of exporting, in a process of its own; what was exported before is kept."""
    note = context.folder / "export.json"
    if not note.is_file():
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--export"])
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            sys.exit("The export failed.")
        note.write_text(json.dumps([time.monotonic() - started, usage.ru_maxrss * 1024]))
    seconds, peak = json.loads(note.read_text())
    return seconds, peak


def measure(context: StageContext) -> Row:
    """Exports if need be, and builds."""
    recipe = context.recipe
    seconds, peak = exported(context)
    graphs = [PortableGraph(context.graph(phase), phase_record(context, phase)) for phase in context.phases]
    targets = tuple(target.value for target in recipe.targets)
    builder = TensorRtBuilder(TENSORRT_RTX, targets)
    builder.check()
    written = builder.build(graphs, lambda done, total, note: print(f"\r{done:.2f}/{total:.0f} {note:70}", end=""))
    print()
    records = {path: PlanRecord.read(path) for path in builder.engines(graphs)}
    plans = []
    for path, record in records.items():
        built = Built.read(path)
        assert built is not None
        size = sum(part.stat().st_size for part in record.paths(path))
        plans.append(
            Plan(
                path.name.partition(".")[0],
                built.costs["seconds"],
                int(built.costs["peak_bytes"]),
                size,
                record.options["scratch_bytes"],
                record.options["weights_bytes"],
            )
        )
    parts = {part for path, record in records.items() for part in record.paths(path)}
    row = Row(
        recipe=recipe.name,
        precision=recipe.precision.value,
        targets=", ".join(targets),
        phases=len(graphs),
        graph_seconds=seconds,
        graph_peak=peak,
        graphs=sum(graph.path.stat().st_size for graph in graphs),
        store=(context.unet / WEIGHTS).stat().st_size,
        plans=tuple(plans),
        stored=sum(part.stat().st_size for part in parts),
        machine=machine(),
    )
    for path in written:
        path.unlink()
    return row


def machine() -> str:
    """Processor, memory, system and the tools' versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{name}, {cores} cores, {memory:.0f} GiB, no GPU, {system}, TensorRT-RTX {examine(TENSORRT_RTX).version}"


def read() -> list[Row]:
    """The rows measured so far."""
    if not RESULTS.is_file():
        return []
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    return [Row(**{**row, "plans": tuple(Plan(**plan) for plan in row["plans"])}) for row in rows]


def gb(size: float) -> str:
    """Bytes in GB."""
    return f"{size / 1e9:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, figures to the right; the first column is text."""
    return [
        f"| {' | '.join(head)} |",
        f"| --- |{' ---: |' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def report(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    lines = [MARK, "", *(f"Machine: {name}." for name in sorted({row.machine for row in rows})), ""]
    graphs = {(row.recipe, row.precision): row for row in rows}
    lines += ["## Graphs", ""]
    lines += table(
        ("recipe", "phases", "weights and graphs, s", "peak memory, GB", "weight store, GB", "graphs, MB"),
        [
            (
                f"{row.recipe}, {row.precision}",
                str(row.phases),
                f"{row.graph_seconds:.0f}",
                gb(row.graph_peak),
                gb(row.store),
                f"{row.graphs / 1e6:.1f}",
            )
            for row in graphs.values()
        ],
    )
    lines += ["## Plans", ""]
    lines += table(
        ("plan", "built in, s", "peak memory, GB", "plan, GB", "weights on the GPU, GB", "scratch on the GPU, GB"),
        [
            (
                f"{row.recipe}, {row.precision}, {row.targets}: {plan.name}",
                f"{plan.seconds:.0f}",
                *map(gb, (plan.peak, plan.plan, plan.weights, plan.scratch)),
            )
            for row in rows
            for plan in row.plans
        ],
    )
    lines += ["## On the disk", ""]
    lines += table(
        ("bundle", "all plans built in, s", "plans whole, GB", "plans in parts, GB", "with store and graphs, GB"),
        [
            (
                f"{row.recipe}, {row.precision}, {row.targets}",
                f"{sum(plan.seconds for plan in row.plans):.0f}",
                gb(sum(plan.plan for plan in row.plans)),
                gb(row.stored),
                gb(row.stored + row.store + row.graphs),
            )
            for row in rows
        ],
    )
    return "\n".join(lines)


def main() -> None:
    """Measures one build and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--precision", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--targets", default="sm89", help="separated by commas")
    parser.add_argument("--work", type=Path, default=Path("tensorrt-builds"), help="for weights, graphs and plans")
    parser.add_argument("--export", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.work = given.work.absolute()
    context = context_of(given)
    if given.export:
        export(context)
        return
    row = measure(context)
    rows = sorted([*(other for other in read() if other.key != row.key), row], key=lambda each: each.key)
    RESULTS.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n", encoding="utf-8")
    page = RESULTS.with_suffix(".md")
    written = page.read_text(encoding="utf-8").partition(MARK)[0] if page.is_file() else ""
    page.write_text(written + report(rows), encoding="utf-8")
    print(f"{row.recipe}: {sum(plan.seconds for plan in row.plans):.0f} s, {gb(row.stored)} GB")


if __name__ == "__main__":
    main()
