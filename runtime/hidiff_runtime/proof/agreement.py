"""Whether a bundle's reference samples are of its graphs: names, sizes and numbers, before anything is made of them.

Noise is drawn and halves are repeated at sizes that a file says, and names become arguments of the denoiser, so each is
compared with the manifest's first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from hidiff_runtime.conditioning import EMBEDDINGS, INPAINTING, takes_channels
from hidiff_runtime.consistency import CONTROL_IMAGE
from hidiff_runtime.errors import BundleError
from hidiff_runtime.fields import REBUILD
from hidiff_runtime.manifest import GraphRecord, Manifest
from hidiff_runtime.proof.samples import INDEX, Drawn, Expected, PictureSample, ReferenceSamples, RunSample, Source

Shape = tuple[int, ...]


def check_samples(manifest: Manifest, samples: ReferenceSamples) -> None:
    """Refuses samples that are not of the manifest's graphs.

    Raises:
        BundleError: the sample at fault is named.
    """
    phases = {record.phase: record for record in manifest.phases}
    for index, call in enumerate(samples.calls):
        where = f"calls[{index}]"
        if call.phase not in phases:
            raise _wrong(where, "is of a phase that the bundle has no graph for", call.phase.name)
        graph = phases[call.phase]
        due = {spec.name: spec.shape for spec in graph.inputs if spec.name != "window_shifts"}
        _check_inputs(where, samples, call.inputs, due, required=due)
        _check_expected(f"{where}.expected", samples, call.expected, graph.outputs[0].shape)
        if len(call.window_shifts) != len(manifest.windowed_blocks) or max(call.window_shifts, default=0) > 3:
            rule = f"must be {len(manifest.windowed_blocks)} numbers from 0 to 3"
            raise _wrong(f"{where}.window_shifts", rule, call.window_shifts)
    graphs = {name: record for name, record in manifest.others() if name.startswith(("text_encoder", "vae_"))}
    for index, sample in enumerate(samples.networks):
        where = f"networks[{index}]"
        if sample.network not in graphs:
            raise _wrong(where, "is of a network that the bundle does not have", sample.network)
        if sample.prompt is not None and not sample.network.startswith("text_encoder"):
            raise _wrong(where, "has a prompt, which only a text encoder takes", sample.network)
        _check_network(where, samples, sample.inputs, sample.expected, graphs[sample.network])
    for index, run in enumerate(samples.runs):
        _check_run(f"runs[{index}]", manifest, samples, run)
    for index, picture in enumerate(samples.pictures):
        _check_picture(f"pictures[{index}]", manifest, samples, picture)


def _check_network(
    where: str,
    samples: ReferenceSamples,
    inputs: Mapping[str, Source],
    expected: Mapping[str, Expected],
    graph: GraphRecord,
) -> None:
    due = {spec.name: spec.shape for spec in graph.inputs}
    _check_inputs(where, samples, inputs, due, required=due)
    if not expected:
        raise _wrong(f"{where}.expected", "must have an output", {})
    for name, output in expected.items():
        spec = graph.output(name)
        if spec is None:
            raise _wrong(f"{where}.expected", "must be outputs of the network", name)
        _check_expected(f"{where}.expected.{name}", samples, output, spec.shape)


def _check_run(where: str, manifest: Manifest, samples: ReferenceSamples, run: RunSample) -> None:
    if run.sampler not in manifest.samplers:
        raise _wrong(f"{where}.sampler", f"must be one of {sorted(manifest.samplers)}", run.sampler)
    latents = (manifest.batch, *manifest.latent)
    residuals = {spec.name: spec.shape for record in manifest.phases for spec in record.residuals}
    _check_inputs(f"{where}.control", samples, run.control, residuals, required=())
    _check_inputs(where, samples, run.inputs, _run_inputs(manifest), required=("prompt_embeds",))
    for expected in (run.expected, *run.trajectory):
        _check_expected(f"{where}.expected", samples, expected, latents)


def _run_inputs(manifest: Manifest) -> dict[str, Shape]:
    """What the denoiser takes by name, and its shape."""
    batch, (channels, *size) = manifest.batch, manifest.latent
    due: dict[str, Shape] = {"latents": (batch, *manifest.latent)}
    for name in EMBEDDINGS:
        spec = manifest.phases[0].input(name)
        if spec is not None:
            for sign in ("", "negative_")[: 1 + manifest.guidance]:
                due[sign + name] = (batch, *spec.shape[1:])
    if takes_channels(manifest):
        mask, masked = INPAINTING
        due |= {mask: (batch, 1, *size), masked: (batch, channels, *size)}
    if manifest.controlnet is not None:
        due[CONTROL_IMAGE] = (batch, 3, manifest.height, manifest.width)
    return due


def _check_picture(where: str, manifest: Manifest, samples: ReferenceSamples, picture: PictureSample) -> None:
    if picture.run >= len(samples.runs):
        raise _wrong(f"{where}.run", f"must be one of the {len(samples.runs)} runs, counted from 0", picture.run)
    if manifest.vae is None:
        raise _wrong(where, "is there, but the bundle has no VAE to decode it", picture.run)
    *_, height, width = manifest.vae.decoder.outputs[0].shape
    part = samples.tensors[picture.tensor].shape
    top, left = picture.corner
    if len(part) != 4 or part[:2] != (manifest.batch, 3) or min(part[2:]) < 1:
        raise _wrong(f"{where}.tensor", f"must be {manifest.batch} pictures of three channels", list(part))
    if top + part[2] > height or left + part[3] > width:
        raise _wrong(
            where, f"must lie within a tile of {width}x{height} pixels", f"{part[3]}x{part[2]} at {left}, {top}"
        )


def _check_inputs(
    where: str,
    samples: ReferenceSamples,
    inputs: Mapping[str, Source],
    due: Mapping[str, Shape],
    required: Iterable[str],
) -> None:
    for name in required:
        if name not in inputs:
            raise _wrong(f"{where}.inputs", f"must hold {name}", sorted(inputs))
    for name, source in inputs.items():
        if name not in due:
            raise _wrong(f"{where}.inputs", f"must be of {', '.join(sorted(due)) or 'none'}", name)
        found = source.shape if isinstance(source, Drawn) else _repeated(samples, source.tensor, source.repeat)
        if found != due[name]:
            raise _wrong(f"{where}.inputs.{name}", f"must be of shape {list(due[name])}", list(found))


def _repeated(samples: ReferenceSamples, tensor: str, repeat: int) -> Shape:
    first, *others = samples.tensors[tensor].shape or (0,)
    return (first * repeat, *others)


def _check_expected(where: str, samples: ReferenceSamples, expected: Expected, due: Shape) -> None:
    kept = samples.tensors[expected.tensor]
    if expected.shape != due:
        raise _wrong(where, f"must be of shape {list(due)}", list(expected.shape))
    if expected.positions is None:
        if kept.shape != due:
            raise _wrong(where, f"must have a tensor of shape {list(due)}", list(kept.shape))
        return
    positions, size = samples.tensors[expected.positions], int(np.prod(due, dtype=np.int64))
    if positions.ndim != 1 or positions.dtype.kind not in "iu" or not positions.size or kept.shape != positions.shape:
        rule = "must have as many positions as values, whole numbers"
        raise _wrong(where, rule, f"{positions.dtype} {list(positions.shape)} for {list(kept.shape)}")
    if positions.min() < 0 or positions.max() >= size:
        raise _wrong(where, f"must have positions from 0 to {size - 1}", f"{positions.min()} to {positions.max()}")


def _wrong(where: str, rule: str, given: object) -> BundleError:
    return BundleError(f"{INDEX}: {where} {rule}.", given=repr(given)[:200], advice=REBUILD)
