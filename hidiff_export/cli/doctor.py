"""`hidiff-export doctor`: what this machine can build and run, and how to get the rest."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import click


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
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = findings["machine"]
    console.print(f"{machine['system']}, {machine['processors']} processors, Python {machine['python']}")
    table = Table("backend", "", "found", "to get it", box=None, pad_edge=False, header_style="bold")
    for name, found in findings["backends"].items():
        mark = "[green]yes[/green]" if found["usable"] else "[yellow]no[/yellow]"
        table.add_row(name, mark, found["detail"], found["advice"])
    console.print(table)
    console.print(", ".join(f"{name} {version}" for name, version in findings["tools"].items()), highlight=False)


def examine() -> dict[str, Any]:
    """The machine, its backends and the versions of the tools, as JSON values."""
    from hidiff_export.versions import tool_versions
    from hidiff_runtime import backends

    available = {name: backends.get(name).available() for name in backends.NAMES}
    return {
        "machine": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "python": platform.python_version(),
        },
        "backends": {
            name: {"usable": found.usable, "detail": found.detail, "advice": found.advice}
            for name, found in available.items()
        },
        "tools": tool_versions(),
    }
