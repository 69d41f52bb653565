"""Whether what a manifest says of its graphs' inputs and outputs fits the picture that it is for.

A run draws noise and makes arrays of the sizes that are stated here before an engine has a say, so that none of them
may be larger than such a picture needs.
"""

from __future__ import annotations

import math

from hidiff_runtime.format.codec import Fields
from hidiff_runtime.format.manifest_record import ManifestRecord
from hidiff_runtime.format.specs import GraphRecord, PhaseRecord, TensorSpec, VaeRecord

PIXELS = 8
"""Pixels of a picture for each of its latents, along either side."""

MOST_PIXELS = 2**26
"""Of all pictures of a run: four times those of 4096x4096."""

_MOST_CHANNELS = 64
_BYTES_PER_PIXEL = 64
"""Of a tensor, for each pixel of the graphs' batch: three times a ControlNet's largest residual."""

_BYTES = 2**26
"""Of a tensor, whatever the picture: embeddings do not grow with it."""

_SHIFTS = "window_shifts"
_EMBEDDINGS = {"prompt_embeds": 3, "text_embeds": 2, "time_ids": 2}
"""A phase's inputs beside its latents and residuals, with the axes of those that there is one of for each picture."""


def check_geometry(manifest: ManifestRecord, fields: Fields) -> None:
    """Refuses sizes that do not belong together.

    Raises:
        BundleError: the field at fault is named.
    """
    _check_picture(manifest, fields)
    missing = [phase.name for phase in manifest.rule.phases() if phase not in {r.phase for r in manifest.phases}]
    if missing:
        raise fields.wrong("phases", "must have a graph for each phase that the rule reaches", f"without {missing}")
    for index, phase in enumerate(manifest.phases):
        _check_phase(manifest, phase, fields, f"phases[{index}]")
        _check_tensors(manifest, phase, fields, f"phases[{index}]")
    for key, record in manifest.others():
        _check_tensors(manifest, record, fields, key)
    for encoder in manifest.text_encoders:
        _check_text_encoder(encoder, fields, encoder.name)
    if manifest.vae is not None:
        _check_vae(manifest.vae, fields)


def _check_picture(manifest: ManifestRecord, fields: Fields) -> None:
    """The latents are the picture's, and no more of them than `MOST_PIXELS` are for."""
    if manifest.batch * manifest.width * manifest.height > MOST_PIXELS:
        given = f"{manifest.batch} of {manifest.width}x{manifest.height}"
        raise fields.wrong("width", f"times height and batch must be {MOST_PIXELS} at most", given)
    channels, height, width = manifest.latent
    if (width * PIXELS, height * PIXELS) != (manifest.width, manifest.height) or channels > _MOST_CHANNELS:
        rule = f"must be channels, and a latent for each {PIXELS} pixels of {manifest.width}x{manifest.height}"
        raise fields.wrong("latent", rule, list(manifest.latent))


def _check_phase(manifest: ManifestRecord, record: PhaseRecord, fields: Fields, key: str) -> None:
    """A phase takes latents, what runs are conditioned on and shifts, and gives noise for the latents' channels."""
    _check_inputs(manifest, record, fields, f"{key}.inputs")
    _check_residuals(manifest, record, fields, f"{key}.inputs")
    found = [(spec.name, spec.shape, spec.dtype) for spec in record.outputs]
    due = (_batch(manifest), *manifest.latent)
    if found != [("noise_pred", due, "float32")]:
        given = ", ".join(map(str, record.outputs))
        raise fields.wrong(f"{key}.outputs", f"must be noise_pred float32{list(due)} alone", given)


def _check_inputs(manifest: ManifestRecord, record: PhaseRecord, fields: Fields, key: str) -> None:
    channels, *size = manifest.latent
    batch, blocks = _batch(manifest), len(manifest.windowed_blocks)
    inputs = {spec.name: spec for spec in record.inputs}
    if len(inputs) != len(record.inputs):
        raise fields.wrong(key, "must have names of their own", [spec.name for spec in record.inputs])
    for name in ("timestep", "prompt_embeds", *[_SHIFTS] * bool(blocks)):
        if name not in inputs:
            raise fields.wrong(key, f"must hold {name}", sorted(inputs))
    latents = inputs.pop("latents", None)
    due = [(batch, depth, *size) for depth in (channels, 2 * channels + 1)]
    if latents is None or latents.shape not in due or latents.dtype != "float32":
        raise fields.wrong(key, f"must hold float32 latents {list(due[0])}", str(latents))
    for spec in inputs.values():
        if not _is_given(spec, batch, blocks) and spec not in record.residuals:
            raise fields.wrong(key, "must be what a run gives, one for each picture", str(spec))


def _check_residuals(manifest: ManifestRecord, record: PhaseRecord, fields: Fields, key: str) -> None:
    """A phase takes residuals exactly where it is one with a ControlNet's, and all else as the first phase does."""
    residuals, first, batch = record.residuals, manifest.phases[0], _batch(manifest)
    if bool(residuals) != record.phase.control:
        raise fields.wrong(
            key, "must hold a ControlNet's residuals exactly where the phase takes them", record.phase.name
        )
    if any(len(spec.shape) != 4 or spec.shape[0] != batch or spec.dtype != "float32" for spec in residuals):
        raise fields.wrong(key, "must hold residuals for each picture", ", ".join(map(str, residuals)))
    if set(record.inputs) - set(residuals) != set(first.inputs) - set(first.residuals):
        raise fields.wrong(key, "must be those of the first phase", ", ".join(map(str, record.inputs)))


def _batch(manifest: ManifestRecord) -> int:
    """Of the graphs: each picture's latents, with guidance twice."""
    return manifest.batch * (1 + manifest.guidance)


def _is_given(spec: TensorSpec, batch: int, blocks: int) -> bool:
    """Returns whether a run gives this beside latents and residuals."""
    if spec.name in ("timestep", _SHIFTS):
        due = ((1,), "float32") if spec.name == "timestep" else ((blocks,), "int32")
        return (spec.shape, spec.dtype) == due
    axes = _EMBEDDINGS.get(spec.name)
    known = len(spec.shape) == axes and spec.shape[0] == batch and spec.dtype == "float32"
    return known and (spec.name != "time_ids" or spec.shape[1] == 6)


def _check_tensors(manifest: ManifestRecord, record: GraphRecord, fields: Fields, key: str) -> None:
    pixels = _batch(manifest) * manifest.width * manifest.height
    for spec in (*record.inputs, *record.outputs):
        if spec.bytes > _BYTES + pixels * _BYTES_PER_PIXEL:
            raise fields.wrong(key, f"takes or gives more than {manifest.width}x{manifest.height} needs", str(spec))


def _check_text_encoder(record: GraphRecord, fields: Fields, key: str) -> None:
    """It takes one row of tokens and how many layers are skipped, and gives their embeddings."""
    inputs = {spec.name: (spec.dtype, len(spec.shape), math.prod(spec.shape[:1])) for spec in record.inputs}
    if inputs != {"input_ids": ("int32", 2, 1), "clip_skip": ("int32", 1, 1)}:
        raise fields.wrong(key, "must take one row of input_ids and one clip_skip", ", ".join(map(str, record.inputs)))
    ids, embeds = record.input("input_ids"), record.output("prompt_embeds")
    axes = {"prompt_embeds": 3, "text_embeds": 2}
    given = [spec for spec in record.outputs if axes.get(spec.name) == len(spec.shape) and spec.shape[0] == 1]
    assert ids is not None
    if embeds is None or embeds.shape[1:2] != ids.shape[1:] or len(given) != len(record.outputs):
        rule = f"must give prompt_embeds for {ids.shape[1]} tokens, and text_embeds at most besides"
        raise fields.wrong(key, rule, ", ".join(map(str, record.outputs)))


def _check_vae(vae: VaeRecord, fields: Fields) -> None:
    """One tile goes in and one comes out, `PIXELS` times as large or as small."""
    for key, record, fine, coarse in (
        ("vae.decoder", vae.decoder, _tile(vae.decoder.outputs), _tile(vae.decoder.inputs)),
        ("vae.encoder", vae.encoder, _tile(vae.encoder.inputs), _tile(vae.encoder.outputs)),
    ):
        if fine is None or coarse is None or fine.shape[:2] != (1, 3) or fine.shape[2:] != _larger(coarse):
            given = ", ".join(map(str, (*record.inputs, *record.outputs)))
            raise fields.wrong(key, f"must have a picture of {PIXELS} pixels for each latent, and nothing else", given)


def _tile(specs: tuple[TensorSpec, ...]) -> TensorSpec | None:
    """Returns the one float32 tensor with four axes; None where there is another, or are several."""
    return specs[0] if len(specs) == 1 and len(specs[0].shape) == 4 and specs[0].dtype == "float32" else None


def _larger(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(side * PIXELS for side in spec.shape[2:])
