"""The part of a check that is not about the UNet: tokens, text encoders, the VAE, and the picture at the end."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import BundleError, EngineError
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.pipeline.vae import decode_tiles, vae_of
from hidiff_runtime.verification.comparison import Bound, Verdict, compare, compare_image
from hidiff_runtime.verification.image_metrics import unit
from hidiff_runtime.verification.reference_samples import NetworkSample, PictureSample, ReferenceSamples

if TYPE_CHECKING:
    from hidiff_runtime.backends.protocol import Session
    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.format.specs import Network

Array = NDArray[Any]

TOKENS = "tokens of a prompt"
TEXT = "text encoder against PyTorch"
VAE = "VAE against PyTorch"
PICTURE = "picture against PyTorch"

EXACT = Bound(
    200, "Tokens are numbers of words, settings are values: no measurements, so that each has to be the same."
)


def tokens_left_out(samples: ReferenceSamples) -> str:
    """Returns why tokens are not compared here; empty where they are, or there are none."""
    if find_spec("tokenizers") is not None or all(sample.prompt is None for sample in samples.networks):
        return ""
    return "Tokens were not compared: the tokenizers library, which prompts need, is not installed."


def comparisons(samples: ReferenceSamples, *, runs: bool) -> int:
    """Returns how many verdicts a check comes to, with whole runs replayed or not."""
    prompts = 0 if tokens_left_out(samples) else sum(sample.prompt is not None for sample in samples.networks)
    replayed = [len(run.trajectory) + 1 for run in samples.runs] + [1] * len(samples.pictures) if runs else []
    alone = len(samples.calls) + len(samples.networks) + len(samples.samplers) + bool(samples.facts)
    return alone + prompts + sum(replayed)


def replay_networks(bundle: Bundle, samples: ReferenceSamples) -> Iterator[Verdict]:
    """Yields a verdict for each sample, and one for the tokens where it has a prompt; each engine is opened once.

    A network of the bundle without a sample is a fault, unless it is the first bucket's too, with whose samples it is
    compared.
    """
    sampled = {sample.network for sample in samples.networks}
    first = bundle.manifest.whole.manifests[0]
    shared = {record.graph for _, record in first.others()} if bundle.manifest != first else set()
    for name, record in bundle.manifest.others():
        if name.startswith(("text_encoder", "vae_")) and name not in sampled and record.graph not in shared:
            yield Verdict(_boundary(name), samples.call_bound, None, name, fault="no reference sample")
    if not tokens_left_out(samples):
        for sample in samples.networks:
            if sample.prompt is not None:
                yield _tokens(bundle, samples, sample, sample.prompt)
    for name, of_network in groupby(samples.networks, lambda sample: sample.network):
        group = list(of_network)
        try:
            with bundle.network(cast("Network", name)) as session:
                for sample in group:
                    yield _evaluated(session, samples, sample)
        except EngineError as error:  # it does not load; one that fails later is a verdict of its own
            yield Verdict(_boundary(name), group[0].bound, None, name, fault=error.summary)


def _boundary(network: str) -> str:
    return VAE if network.startswith("vae_") else TEXT


def _tokens(bundle: Bundle, samples: ReferenceSamples, sample: NetworkSample, prompt: str) -> Verdict:
    record = next(record for record in bundle.manifest.text_encoders if record.name == sample.network)
    try:
        tokens = Tokenizer.open(bundle.file(record.tokenizer), record.places).encode(prompt)
    except (BundleError, EngineError) as error:
        return Verdict(TOKENS, EXACT, None, sample.network, fault=error.summary)
    found = np.array([tokens.ids], dtype=np.int32)
    return compare(TOKENS, samples.array(sample.inputs["input_ids"]), found, EXACT, phase=sample.network)


def _evaluated(session: Session, samples: ReferenceSamples, sample: NetworkSample) -> Verdict:
    """Returns the verdict on the output that is furthest off."""
    boundary = _boundary(sample.network)
    try:
        outputs = session.run({name: samples.array(source) for name, source in sample.inputs.items()})
    except EngineError as error:
        return Verdict(boundary, sample.bound, None, sample.network, fault=error.summary)
    verdicts = []
    for name, expected in sample.expected.items():
        found = outputs.get(name)
        candidate = None if found is None else samples.candidate(expected, found)
        verdicts.append(compare(boundary, samples.reference(expected), candidate, sample.bound, phase=sample.network))
    return worst(verdicts)


def worst(verdicts: list[Verdict]) -> Verdict:
    """Returns the verdict with the least ratio of signal to noise; one without any comes first."""
    return min(verdicts, key=lambda verdict: -np.inf if verdict.metrics is None else verdict.metrics.snr_db)


def replay_picture(bundle: Bundle, samples: ReferenceSamples, sample: PictureSample, latents: Array) -> Verdict:
    """Decodes a run's first tile by itself and compares the part of it that was recorded.

    Args:
        latents: float32 ``[batch, channels, height, width]``, what the run came to.
    """
    expected = samples.tensors[sample.tensor]
    record = vae_of(bundle)
    rows, columns = record.decoder.inputs[0].shape[2:]
    try:
        with bundle.network("vae_decoder") as session:
            tile = unit(decode_tiles(session, record, np.ascontiguousarray(latents[..., :rows, :columns])))
    except EngineError as error:
        return Verdict(PICTURE, sample.bound, None, fault=error.summary)
    (top, left), (height, width) = sample.corner, expected.shape[2:]
    part = tile[..., top : top + height, left : left + width]
    return compare_image(PICTURE, expected, part, sample.bound, steps=samples.runs[sample.run].steps)
