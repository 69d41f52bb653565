"""`hidiff-export doctor`: what this machine can build and run, and how to get the rest."""

from __future__ import annotations

import json
import os
import platform
from typing import TYPE_CHECKING, Any

import click

from hidiff_export.cli.console import console
from hidiff_export.errors import EngineError

if TYPE_CHECKING:
    from rich.table import Table

    from hidiff_export.engines.tensorrt.libraries import BuilderLibrary

_KINDS = {"builds engines": "builders", "runs engines": "backends"}


@click.command(
    short_help="Show which backends this machine has.",
    epilog="""\b
Examples:
  hidiff-export doctor
  hidiff-export doctor --json
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show which backends this machine has, how to get the others, and which tool versions are installed."""
    findings = examine()
    if as_json:
        click.echo(json.dumps(findings, indent=2))
        return
    output, machine = console(), findings["machine"]
    output.print(f"{machine['system']}, {machine['processors']} processors, Python {machine['python']}")
    for kind in ("builds engines", "runs engines"):
        output.print(_table(kind, findings[_KINDS[kind]]))
    output.print(", ".join(f"{name} {version}" for name, version in findings["tools"].items()), highlight=False)


def _table(kind: str, backends: dict[str, Any]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(kind, "", "found", "to get it", box=None, pad_edge=False, header_style="bold")
    for name, found in backends.items():
        mark = "[green]yes[/green]" if found["usable"] else "[yellow]no[/yellow]"
        table.add_row(name, mark, escape(found["detail"]), escape(found["advice"]))
    return table


def examine() -> dict[str, Any]:
    """Returns the machine, what builds and runs engines on it, and the versions of the tools, as JSON values."""
    from hidiff_export.engines.tensorrt.libraries import TENSORRT, TENSORRT_RTX
    from hidiff_export.tool_versions import tool_versions
    from hidiff_runtime import backends

    available = {name: backends.get(name).available() for name in backends.NAMES}
    return {
        "machine": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "python": platform.python_version(),
        },
        "builders": {library.backend: _builder(library) for library in (TENSORRT, TENSORRT_RTX)},
        "backends": {
            name: {"usable": found.usable, "detail": found.detail, "advice": found.advice}
            for name, found in available.items()
        },
        "tools": tool_versions(),
    }


def _builder(library: BuilderLibrary) -> dict[str, Any]:
    """Returns whether a TensorRT builds engines here, and for which GPUs."""
    from hidiff_export.engines.tensorrt.capabilities import THIS_MACHINE, check_targets
    from hidiff_export.engines.tensorrt.capabilities import examine as examine_library

    try:
        found = examine_library(library)
        check_targets(library, found.targets or THIS_MACHINE)
    except EngineError as error:
        return {"usable": False, "detail": error.summary, "advice": error.advice}
    here = "no GPU here" if found.gpu is None else f"here {found.gpu.name} ({found.gpu.target})"
    builds_for = f"for {', '.join(found.targets)}; {here}" if found.targets else here
    return {"usable": True, "detail": f"{library.module} {found.version}: {builds_for}", "advice": ""}
