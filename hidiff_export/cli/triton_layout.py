"""What `hidiff-export triton --layout per-phase` says of the repository that it wrote."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hidiff_export.deploy.per_phase import PerPhase


def print_per_phase(found: PerPhase, *, as_json: bool) -> None:
    """Says what was written, what the copies of the weights cost, and how to start it."""
    written, secret = found.written, secrets.token_hex(16)
    if as_json:
        facts = {
            "repository": str(written.folder),
            "models": [*written.models, found.start, *found.engines],
            "bundle": written.bundle,
            "linked": written.linked,
            "bytes": written.bytes,
            "backend": found.backend,
            "needs": found.needs,
            "engines": {name: files.weights for name, files in found.engines.items()},
            "weights": found.weights,
            "copies": found.copies,
            "options": found.options(secret),
        }
        click.echo(json.dumps(facts, indent=2))
        return
    linked = {
        "onnxruntime": "linked, so they take no room",
        "tensorrt": "linked, but plans in parts, put together, are not",
    }
    disk = linked[found.backend] if written.linked else "copied"
    click.echo(f"{written.folder}: {', '.join(written.models)}, {found.start} ({written.bytes / 1e6:,.1f} MB)")
    click.echo(f"bundle {written.bundle[:12]}: engines and weights are {disk}")
    for name, files in found.engines.items():
        click.echo(f"  {name:<32} {files.weights / 1e6:>10,.1f} MB of weights")
    click.echo(
        f"memory: {found.copies / 1e6:,.1f} MB of weights on each device, a copy for each model; the bundle has "
        f"{found.weights / 1e6:,.1f} MB, of which --layout pipeline keeps one phase's open at a time"
    )
    for needed in found.needs:
        click.echo(f"needs: {needed}, which Triton's image has to have")
    options = " \\\n  ".join((f"--model-repository {written.folder}", *found.options(secret)))
    click.echo(f"next: tritonserver {options}")
