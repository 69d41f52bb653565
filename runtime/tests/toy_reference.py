"""Reference samples of everything that a toy with pictures has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import toy
import toy_pictures

from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.verification.comparison import Bound
from hidiff_runtime.verification.image_metrics import unit
from hidiff_runtime.verification.reference_samples import INDEX, Drawn, NetworkSample, PictureSample
from hidiff_runtime.verification.sample_recorder import SampleRecorder

PROMPT = "a lighthouse at dusk"
BOUND = Bound(60, "numpy against numpy")
ALIKE = replace(BOUND, psnr_db=60, ssim=0.999)
CORNER = (3, 5)


def record(folder: Path, kind: toy.Toy) -> None:
    """Samples of everything that the toy has, in the place of those of its UNet alone."""
    kind = replace(kind, tokens=toy_pictures.TOKENS)
    manifest = Manifest.read(folder)
    recorder = SampleRecorder("numpy", BOUND, BOUND)
    stored = toy.stored_weights(kind)
    _record_calls(recorder, manifest, stored)
    run = toy.reference_run(kind, manifest, stored)
    toy.record_run(recorder, {**run, "trajectory": ()})
    picture = unit(toy_pictures.decode(run["latents"] / np.float32(toy_pictures.SCALING_FACTOR)))
    part = recorder.keep(picture[..., CORNER[0] : CORNER[0] + 20, CORNER[1] : CORNER[1] + 24])
    recorder.pictures.append(PictureSample(0, ALIKE, CORNER, part))
    for encoder in manifest.text_encoders:
        ids = np.array([Tokenizer.open(folder / encoder.tokenizer).encode(PROMPT).ids], np.int32)
        given = {"input_ids": ids, "clip_skip": np.array([1], np.int32)}
        found = toy_pictures.encode_text(encoder, given)
        record_network(recorder, encoder.name, given, found, PROMPT)
    _record_vae(recorder, manifest)
    recorder.write(folder / "reference")
    toy.seal(folder, replace(manifest, reference=f"reference/{INDEX}"))


def record_others(folder: Path, kind: toy.Toy) -> None:
    """Samples of what the buckets after the first have of their own: an evaluation of each phase, and the VAE's."""
    first, *others = Manifest.read(folder).whole.manifests
    recorded = [first]
    for number, bucket in enumerate(others, start=1):
        recorder = SampleRecorder("numpy", BOUND, BOUND)
        _record_calls(recorder, bucket, toy.stored_weights(kind))
        if bucket.vae is not None:
            _record_vae(recorder, bucket)
        recorder.write(folder / f"reference/{number}")
        recorded.append(replace(bucket, reference=f"reference/{number}/{INDEX}"))
    toy.seal(folder, *recorded)


def _record_calls(recorder: SampleRecorder, manifest: Manifest, stored: toy.Arrays) -> None:
    for phase in manifest.phases:
        inputs = {spec.name: Drawn(seed, spec.shape) for seed, spec in enumerate(phase.inputs) if spec.dtype != "int32"}
        spec = phase.input("window_shifts")
        assert spec is not None
        shifts = np.indices(spec.shape).sum(axis=0).astype(np.int32) % 4
        given = {name: drawn.array() for name, drawn in inputs.items()} | {"window_shifts": shifts}
        noise = toy.unet(phase.phase.name, stored, given)
        toy.record_call(recorder, phase.phase, inputs, shifts.ravel().tolist(), noise)


def _record_vae(recorder: SampleRecorder, manifest: Manifest) -> None:
    vae = manifest.vae
    assert vae is not None
    latents, image = (Drawn(seed, graph.inputs[0].shape) for seed, graph in enumerate((vae.decoder, vae.encoder)))
    outputs: dict[str, Any] = {"image": toy_pictures.decode(latents.array())}
    record_network(recorder, "vae_decoder", {"latents": latents}, outputs)
    outputs = {"moments": toy_pictures.encode(image.array())}
    record_network(recorder, "vae_encoder", {"image": image}, outputs)


def record_network(
    recorder: SampleRecorder, network: str, inputs: dict[str, Any], outputs: dict[str, Any], prompt: str | None = None
) -> None:
    """One evaluation of a text encoder, or of half of the VAE."""
    expected = {name: recorder.output(output) for name, output in outputs.items()}
    recorder.networks.append(NetworkSample(network, BOUND, recorder.inputs(inputs), expected, prompt))
