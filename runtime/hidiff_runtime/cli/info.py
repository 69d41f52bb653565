"""`hidiff-run info`: what is in a bundle."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from hidiff_runtime.cli.shared_options import add_allow_links
from hidiff_runtime.console.printing import write
from hidiff_runtime.errors import HidiffError
from hidiff_runtime.text_safety import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hidiff_runtime.format.bundle_folder import BundleFolder
    from hidiff_runtime.format.manifest import GraphRecord, Manifest

SUMMARY = "show what is in the bundle, without opening an engine"
EXAMPLE = "info bundle"


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    command.add_argument("--json", action="store_true", help="print the manifest as JSON")
    add_allow_links(command)


def run(options: argparse.Namespace) -> int:
    """Prints the manifest for people, or as it is."""
    from hidiff_runtime.format.bundle_folder import BundleFolder
    from hidiff_runtime.format.left_out import left_out, left_out_lines

    folder = BundleFolder(options.folder, options.allow_links)
    manifest = folder.manifest()
    every = manifest.whole.manifests
    if options.json:
        write(json.dumps(manifest.to_json(), indent=2) + "\n", sys.stdout)
        return 0
    total = sum(file.size for file in manifest.files.values())
    lines = [
        f"{manifest.family} {manifest.task}, {_targets(every)}, {manifest.precision}, guidance {_guidance(manifest)}",
        f"  files     {len(manifest.files)}, {total / 2**20:.1f} MiB",
        f"  samplers  {', '.join(sorted(manifest.samplers))} (default {manifest.default_sampler})",
        f"  steps     {manifest.steps[0]} to {manifest.steps[-1]} ({len(manifest.steps)} tabulated)",
        *(f"  {name:9} {line}" for name, line in left_out_lines(left_out(manifest)).items()),
        f"  text      {_text(manifest)}",
        f"  VAE       {_vae(manifest)}",
        f"  reference {manifest.reference or 'none'}",
        f"  backend   {_backend(folder, manifest)}",
        f"  built by  {', '.join(f'{tool} {version}' for tool, version in manifest.tools.items())}",
    ]
    for bucket in every:
        lines.append("  graphs" if len(every) == 1 else f"  graphs of {bucket.bucket}")
        graphs: list[tuple[str, GraphRecord]] = [(record.phase.name, record) for record in bucket.phases]
        for name, record in [*graphs, *bucket.others()]:
            lines.append(f"    {name:24} engines: {', '.join(record.engines)}")
            lines += [f"      {spec}" for spec in record.inputs]
            lines += [f"      -> {spec}" for spec in record.outputs]
    write("".join(f"{printable(line)}\n" for line in lines), sys.stdout)
    return 0


def _backend(folder: BundleFolder, manifest: Manifest) -> str:
    """Returns which backend runs the bundle here if none is named, and why, or what is missing."""
    from hidiff_runtime.backend_choice import choose

    try:
        choice = choose(folder.root, manifest.whole, None, {})
    except HidiffError as error:
        return f"none can run here: {error.given or error.summary}"
    return f"{choice.backend.name}: {choice.reason}"


def _targets(every: Sequence[Manifest]) -> str:
    """Returns the sizes and batches."""
    batches = {bucket.batch for bucket in every}
    sizes = dict.fromkeys(f"{bucket.width}x{bucket.height}" for bucket in every)
    return f"{', '.join(sizes)} pixels, batch {', '.join(map(str, sorted(batches)))}"


def _guidance(manifest: Manifest) -> str:
    if manifest.guidance_rescale:
        return f"on, rescaled by {manifest.guidance_rescale:g}"
    return "on" if manifest.guidance else "off"


def _text(manifest: Manifest) -> str:
    found = [f"{record.name} (clip skip up to {record.clip_skip})" for record in manifest.text_encoders]
    return ", ".join(found) or "none: prompts come as embeddings"


def _vae(manifest: Manifest) -> str:
    if manifest.vae is None:
        return "none: latents come out"
    height, width = manifest.vae.decoder.outputs[0].shape[2:]
    overlap = manifest.vae.overlap
    tiles = f"in tiles that share {overlap} pixels" if overlap else "in one tile"
    return f"{width}x{height} pixels {tiles}, scaling factor {manifest.vae.scaling_factor:g}"
