"""Helm's own code in a process of its own: ``python helm.py CHART < values.json`` prints a chart's files as JSON.

Its library brings Go's threads and signal handlers, which a process that forks elsewhere does not want.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RELEASE, NAMESPACE = "demo", "pictures"


def lint(chart: Path) -> list[str]:
    """What Helm's linter says beyond hints."""
    found: list[str] = _run(chart, None)
    return found


def render(chart: Path, values: dict[str, Any]) -> dict[str, str]:
    """Every template's text by its file's name. Raises ValueError with Helm's words where it refuses."""
    answer: dict[str, Any] = _run(chart, values)
    if "error" in answer:
        raise ValueError(answer["error"])
    return {Path(name).name: text for name, text in answer["files"].items()}


def _run(chart: Path, values: dict[str, Any] | None) -> Any:
    command = [sys.executable, __file__, str(chart)]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _answer(chart: str, values: dict[str, Any] | None) -> Any:
    import helm_python

    if values is None:
        messages = helm_python.lint(chart)["messages"]
        return [f"{message['path']}: {message['error']}" for message in messages if message["severity"] > 1]
    with helm_python.Chart.load(chart) as loaded:
        try:
            loaded.validate_schema(values)
            return {"files": loaded.render(values, name=RELEASE, namespace=NAMESPACE)}
        except helm_python.HelmError as error:
            return {"error": str(error)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(sys.argv[1], json.load(sys.stdin))))
