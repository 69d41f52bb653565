"""Whether the fields of a manifest agree with each other, and its graphs' inputs and outputs with the picture.

A run draws noise and makes arrays of the sizes that are stated here before an engine has a say, so that none of them
may be larger than such a picture needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hidiff_runtime.format.codec import Fields
from hidiff_runtime.format.manifest_record import ManifestRecord
from hidiff_runtime.format.specs import (
    CONTROLNET,
    UNGUIDED_CONTROLNET,
    GraphRecord,
    PhaseRecord,
    TensorSpec,
    VaeRecord,
)
from hidiff_runtime.format.step_graph import GUIDANCE_RESCALE, STATE, step_inputs, step_outputs
from hidiff_runtime.reused_features import DEEP_FEATURES

CONTROL_IMAGE = "control_image"
CONDITIONING_SCALE = "conditioning_scale"
_SMALLEST_FACTOR = 1e-4
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

PIXELS = 8
"""Pixels of a picture for each of its latents, along either side."""

MOST_PIXELS = 2**26
"""Of all pictures of a run: four times those of 4096x4096."""

_MOST_CHANNELS = 64
_BYTES_PER_PIXEL = 64
"""Of a tensor, for each pixel of the graphs' batch: three times a ControlNet's largest residual."""

_BYTES = 2**26
"""Of a tensor, whatever the picture: embeddings do not grow with it."""

WINDOW_SHIFTS = "window_shifts"
_EMBEDDINGS = {"prompt_embeds": 3, "text_embeds": 2, "time_ids": 2}
"""A phase's inputs beside its latents and residuals, with the axes of those that there is one of for each picture."""


def validate_contents(manifests: Sequence[ManifestRecord], fields: Fields, *, listed: bool) -> None:
    """Refuses a manifest whose fields do not agree with each other.

    Args:
        manifests: what it says of each bucket.
        fields: that it was read from.
        listed: whether buckets are a list of it; else the only one's fields are among the others.

    Raises:
        BundleError: the field at fault is named.
    """
    if not manifests:
        raise fields.wrong("buckets", "must not be empty", [])
    _check_shared(manifests[0], fields)
    known = []
    for index, manifest in enumerate(manifests):
        own = fields.below(f"buckets[{index}]") if listed else fields
        bucket = (manifest.width, manifest.height, manifest.batch)
        if bucket in known or manifest.latent[0] != manifests[0].latent[0]:
            raise own.wrong("", "is there twice, or has other latents than the first", bucket)
        known.append(bucket)
        _check_bucket(manifest, own)


def _check_shared(manifest: ManifestRecord, fields: Fields) -> None:
    """Refuses what there is once and does not agree."""
    for key, path in manifest.shared_paths():
        if path not in manifest.files:
            raise fields.wrong(key, "refers to a file that 'files' does not list", path)
    if manifest.default_sampler not in manifest.samplers:
        raise fields.wrong("default_sampler", f"must be one of {sorted(manifest.samplers)}", manifest.default_sampler)
    if not manifest.steps or list(manifest.steps) != sorted(set(manifest.steps)):
        raise fields.wrong("steps", "must be rising step counts", manifest.steps)
    if "unet" not in manifest.weights:
        raise fields.wrong("weights", "must name the UNet's store", sorted(manifest.weights))
    _check_rescale(manifest, fields)
    _check_forecast(manifest, fields)
    for encoder in manifest.text_encoders:
        _check_text_encoder(encoder, fields, encoder.name)
    if manifest.timing is not None:
        _check_tensors(manifest, manifest.timing, fields, "timing")


def _check_bucket(manifest: ManifestRecord, fields: Fields) -> None:
    """Refuses a bucket that does not agree with itself or with what it shares."""
    for key, path in manifest.own_paths():
        if path not in manifest.files:
            raise fields.wrong(key, "refers to a file that 'files' does not list", path)
    phases = [record.phase for record in manifest.phases]
    if not phases:
        raise fields.wrong("phases", "must not be empty", [])
    known = manifest.rule.phases()
    for index, phase in enumerate(phases):
        if phase in phases[:index] or phase not in known:
            raise fields.wrong(
                f"phases[{index}]", "is there twice, or is a phase that the rule never reaches", phase.name
            )
    if manifest.rule.guidance is not None and not manifest.guidance:
        raise fields.wrong("rule.guidance", "is for a bundle with guidance", manifest.rule.guidance)
    _check_geometry(manifest, fields)
    for key, record in ((CONTROLNET, manifest.controlnet), (UNGUIDED_CONTROLNET, manifest.unguided_controlnet)):
        if record is not None:
            _check_controlnet(manifest, record, fields, key)
    if manifest.step is not None or manifest.unguided_step is not None:
        _check_steps(manifest, fields)
    _check_text_encoders(manifest, fields)
    if manifest.vae is not None:
        _check_vae(manifest, manifest.vae, fields)


def _check_geometry(manifest: ManifestRecord, fields: Fields) -> None:
    """Refuses graphs whose inputs and outputs do not fit the picture that they are for."""
    _check_picture(manifest, fields)
    missing = [phase.name for phase in manifest.rule.phases() if phase not in {r.phase for r in manifest.phases}]
    if missing:
        raise fields.wrong("phases", "must have a graph for each phase that the rule reaches", f"without {missing}")
    for index, phase in enumerate(manifest.phases):
        _check_phase(manifest, phase, fields, f"phases[{index}]")
        _check_tensors(manifest, phase, fields, f"phases[{index}]")
    for key, record in manifest.others():
        _check_tensors(manifest, record, fields, key)
    if manifest.vae is not None:
        _check_tiles(manifest.vae, fields)


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
    due = (manifest.batch_of(record.phase), *manifest.latent)
    features = _features(manifest, record, fields, key)
    if found != [("noise_pred", due, "float32"), *features]:
        given = ", ".join(map(str, record.outputs))
        beside = f", then {DEEP_FEATURES}" if features else " alone"
        raise fields.wrong(f"{key}.outputs", f"must be noise_pred float32{list(due)}{beside}", given)


def _features(
    manifest: ManifestRecord, record: PhaseRecord, fields: Fields, key: str
) -> list[tuple[str, tuple[int, ...], str]]:
    """Returns what a phase must give that a shallow graph of the same phase takes: nothing if there is none."""
    phase = record.phase
    taken = record.input(DEEP_FEATURES)
    if (taken is not None) != phase.shallow:
        raise fields.wrong(f"{key}.inputs", f"must hold {DEEP_FEATURES} exactly where the phase is shallow", phase.name)
    batch = manifest.batch_of(phase)
    if taken is not None and (len(taken.shape) != 4 or taken.shape[0] != batch or taken.dtype != "float32"):
        raise fields.wrong(f"{key}.inputs", f"must hold float32 {DEEP_FEATURES} for each picture", str(taken))
    partner = next((each for each in manifest.phases if each.phase == replace(phase, shallow=True)), None)
    due = None if phase.shallow or partner is None else partner.input(DEEP_FEATURES)
    return [] if due is None else [(due.name, due.shape, due.dtype)]


def _check_inputs(manifest: ManifestRecord, record: PhaseRecord, fields: Fields, key: str) -> None:
    channels, *size = manifest.latent
    batch, blocks = manifest.batch_of(record.phase), len(manifest.windowed_blocks)
    inputs = {spec.name: spec for spec in record.inputs}
    if len(inputs) != len(record.inputs):
        raise fields.wrong(key, "must have names of their own", [spec.name for spec in record.inputs])
    for name in ("timestep", "prompt_embeds", *[WINDOW_SHIFTS] * bool(blocks)):
        if name not in inputs:
            raise fields.wrong(key, f"must hold {name}", sorted(inputs))
    latents = inputs.pop("latents", None)
    due = [(batch, depth, *size) for depth in (channels, 2 * channels + 1)]
    if latents is None or latents.shape not in due or latents.dtype != "float32":
        raise fields.wrong(key, f"must hold float32 latents {list(due[0])}", str(latents))
    for spec in inputs.values():
        if not _is_given(spec, batch, blocks) and spec not in record.residuals and spec.name != DEEP_FEATURES:
            raise fields.wrong(key, "must be what a run gives, one for each picture", str(spec))


def _check_residuals(manifest: ManifestRecord, record: PhaseRecord, fields: Fields, key: str) -> None:
    """A phase takes residuals exactly where it is one with a ControlNet's, and all else as the first phase does."""
    residuals, first, batch = record.residuals, manifest.phases[0], manifest.batch_of(record.phase)
    if bool(residuals) != record.phase.control:
        raise fields.wrong(
            key, "must hold a ControlNet's residuals exactly where the phase takes them", record.phase.name
        )
    if any(len(spec.shape) != 4 or spec.shape[0] != batch or spec.dtype != "float32" for spec in residuals):
        raise fields.wrong(key, "must hold residuals for each picture", ", ".join(map(str, residuals)))
    own = {spec for spec in record.inputs if spec not in residuals and spec.name != DEEP_FEATURES}
    if own != {_of_batch(spec, batch) for spec in first.inputs if spec not in first.residuals}:
        raise fields.wrong(key, "must be those of the first phase", ", ".join(map(str, record.inputs)))


def _of_batch(spec: TensorSpec, batch: int) -> TensorSpec:
    """Returns the same input of graphs with another batch, which is every input's first axis but of those with one."""
    return spec if len(spec.shape) < 2 else replace(spec, shape=(batch, *spec.shape[1:]))


def _is_given(spec: TensorSpec, batch: int, blocks: int) -> bool:
    """Returns whether a run gives this beside latents and residuals."""
    if spec.name in ("timestep", WINDOW_SHIFTS):
        due = [((1,), "float32")] if spec.name == "timestep" else [((blocks,), "int32"), ((batch, blocks), "int32")]
        return (spec.shape, spec.dtype) in due
    axes = _EMBEDDINGS.get(spec.name)
    known = len(spec.shape) == axes and spec.shape[0] == batch and spec.dtype == "float32"
    return known and (spec.name != "time_ids" or spec.shape[1] == 6)


def _check_tensors(manifest: ManifestRecord, record: GraphRecord, fields: Fields, key: str) -> None:
    pixels = manifest.graph_batch * manifest.width * manifest.height
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


def _check_tiles(vae: VaeRecord, fields: Fields) -> None:
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


def _check_rescale(manifest: ManifestRecord, fields: Fields) -> None:
    """Guidance is rescaled by a part of it, where there is some."""
    rescale = manifest.guidance_rescale
    if not 0 <= rescale <= 1 or (rescale and not manifest.guidance):
        raise fields.wrong("guidance_rescale", "must be from 0 to 1, and 0 without guidance", rescale)


def _check_forecast(manifest: ManifestRecord, fields: Fields) -> None:
    """A forecast's windows hold steps, and its end is a part of the run."""
    if manifest.forecast is not None and manifest.forecast.fault:
        raise fields.wrong("forecast", manifest.forecast.fault, manifest.forecast)


def _check_controlnet(manifest: ManifestRecord, controlnet: GraphRecord, fields: Fields, key: str) -> None:
    """The ControlNet takes what the phases take, a picture and a scale, and gives the residuals that they take."""
    if "controlnet" not in manifest.weights:
        raise fields.wrong("weights", "must name the ControlNet's store", sorted(manifest.weights))
    phases = [record for record in manifest.phases if manifest.controlnet_of(record.phase) == controlnet]
    if not phases:
        raise fields.wrong(key, "is there, but no phase takes its residuals", controlnet.graph)
    for record in phases:
        # A shallow graph takes those of the layers that it has.
        given = tuple(spec for spec in controlnet.outputs if spec in record.residuals or not record.phase.shallow)
        if given != record.residuals:
            text = ", ".join(map(str, controlnet.outputs))
            raise fields.wrong(f"{key}.outputs", f"must be the residuals of {record.phase.name}", text)
    own = {CONTROL_IMAGE, CONDITIONING_SCALE}
    shared = [spec for spec in controlnet.inputs if spec.name not in own]
    for spec in shared:
        if any(record.input(spec.name) != spec for record in phases):
            raise fields.wrong(f"{key}.inputs", "must be those of the phases, or its own", str(spec))
    image, scale = controlnet.input(CONTROL_IMAGE), controlnet.input(CONDITIONING_SCALE)
    if image is None or scale is None or len(controlnet.inputs) != len(shared) + len(own):
        names = [spec.name for spec in controlnet.inputs]
        raise fields.wrong(f"{key}.inputs", f"must hold {' and '.join(sorted(own))} once each", names)
    batch = manifest.batch_of(phases[0].phase)
    picture = len(image.shape) == 4 and image.shape[:2] == (batch, 3) and image.dtype == "float32"
    if not picture or scale.shape != (1,) or scale.dtype != "float32":
        rule = "must hold the scale as one number and the picture as [graphs' batch, 3, height, width], float32"
        raise fields.wrong(f"{key}.inputs", rule, f"{image}, {scale}")


def _check_steps(manifest: ManifestRecord, fields: Fields) -> None:
    """The step graphs take what every phase gives, and give what every phase takes."""
    tails = any(record.phase.unguided for record in manifest.phases)
    for record in manifest.phases:
        key, step = "unguided_step" if record.phase.unguided else "step", manifest.step_of(record.phase)
        if step is None:
            raise fields.wrong(key, f"must be there, for it follows {record.phase.name}", None)
        first = manifest.phases[0].input("latents")  # of a guided phase, which comes before the others
        state = step.input(STATE)
        if state is None or first is None:
            raise fields.wrong(f"{key}.inputs", "must hold a state", ", ".join(map(str, step.inputs)))
        due = (manifest.batch, record.outputs[0], first, state.shape[0])
        rescale = step.input(GUIDANCE_RESCALE) is not None
        for place, found, expected in (
            ("inputs", step.inputs, step_inputs(*due, rescale=rescale)),
            ("outputs", step.outputs, step_outputs(*due, unguided=tails)),
        ):
            if sorted(found, key=str) != sorted(expected, key=str):
                rule = f"must be those of the phase {record.phase.name}: {', '.join(map(str, expected))}"
                raise fields.wrong(f"{key}.{place}", rule, ", ".join(map(str, found)))


def _check_text_encoders(manifest: ManifestRecord, fields: Fields) -> None:
    """Together the text encoders give what the phases take."""
    if not manifest.text_encoders:
        return
    names = [record.name for record in manifest.text_encoders]
    if names != list(TEXT_ENCODERS[: len(names)]):
        raise fields.wrong("text_encoders", f"must be {' and '.join(TEXT_ENCODERS)}, or the first of them", names)
    width = 0
    for record in manifest.text_encoders:
        if record.name not in manifest.weights:
            raise fields.wrong("weights", f"must name the store of {record.name}", sorted(manifest.weights))
        embeds = record.output("prompt_embeds")
        assert embeds is not None  # by `_check_geometry`, as all axes are
        width += embeds.shape[2]
    taken, ids = manifest.phases[0].input("prompt_embeds"), manifest.text_encoders[0].input("input_ids")
    if taken is not None and width != taken.shape[-1]:
        raise fields.wrong("text_encoders", f"must give embeddings as wide as {taken}", width)
    if taken is not None and ids is not None and (not ids.shape[1] or taken.shape[1] % ids.shape[1]):
        raise fields.wrong("text_encoders", f"must take {taken.shape[1]} tokens in a whole number of times", str(ids))
    pooled = manifest.phases[0].input("text_embeds")
    given = manifest.text_encoders[-1].output("text_embeds")
    if pooled is not None and (given is None or given.shape[-1] != pooled.shape[-1]):
        raise fields.wrong("text_encoders", f"must give {pooled}", str(given))


def _check_vae(manifest: ManifestRecord, vae: VaeRecord, fields: Fields) -> None:
    """Encoder and decoder are for tiles of one size, which the picture is not smaller than."""
    if "vae" not in manifest.weights:
        raise fields.wrong("weights", "must name the VAE's store", sorted(manifest.weights))
    latents, image = vae.decoder.input("latents"), vae.decoder.output("image")
    picture, moments = vae.encoder.input("image"), vae.encoder.output("moments")
    if latents is None or image is None or picture is None or moments is None:
        raise fields.wrong("vae", "must take latents and give image, and the other way round give moments", str(vae))
    channels, height, width = manifest.latent
    rows, columns = latents.shape[2:]
    whole = latents.shape[:2] == (1, channels) and 0 < rows <= height and 0 < columns <= width
    fitting = image.shape[2:] == picture.shape[2:] and moments.shape == (1, 2 * channels, rows, columns)
    if not whole or not fitting:
        given = ", ".join(map(str, (latents, image, picture, moments)))
        raise fields.wrong("vae", f"must be for tiles of at most {list(manifest.latent)} latents", given)
    if vae.overlap >= min(image.shape[2:]):
        raise fields.wrong("vae.overlap", f"must be smaller than a tile, {list(image.shape[2:])}", vae.overlap)
    if not _SMALLEST_FACTOR <= vae.scaling_factor <= 1 / _SMALLEST_FACTOR:
        rule = f"must be from {_SMALLEST_FACTOR:g} to {1 / _SMALLEST_FACTOR:g}"
        raise fields.wrong("vae.scaling_factor", rule, vae.scaling_factor)
    if len(vae.preview) != channels + 1:
        raise fields.wrong("vae.preview", f"must have {channels + 1} rows", len(vae.preview))
