"""Whether the fields of a manifest agree with each other."""

from __future__ import annotations

from hidiff_runtime.format.codec import Fields
from hidiff_runtime.format.graph_shapes import check_geometry
from hidiff_runtime.format.manifest_record import ManifestRecord
from hidiff_runtime.format.specs import GraphRecord, TensorSpec, VaeRecord
from hidiff_runtime.format.step_graph import GUIDANCE_RESCALE, STATE, step_inputs, step_outputs

CONTROL_IMAGE = "control_image"
CONDITIONING_SCALE = "conditioning_scale"
_SMALLEST_FACTOR = 1e-4
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def validate_manifest(manifest: ManifestRecord, fields: Fields) -> None:
    """Refuses a manifest whose fields do not agree with each other.

    Raises:
        BundleError: the field at fault is named.
    """
    for key, path in manifest.paths():
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
    if manifest.default_sampler not in manifest.samplers:
        raise fields.wrong("default_sampler", f"must be one of {sorted(manifest.samplers)}", manifest.default_sampler)
    if not manifest.steps or list(manifest.steps) != sorted(set(manifest.steps)):
        raise fields.wrong("steps", "must be rising step counts", manifest.steps)
    if "unet" not in manifest.weights:
        raise fields.wrong("weights", "must name the UNet's store", sorted(manifest.weights))
    _check_rescale(manifest, fields)
    check_geometry(manifest, fields)
    if manifest.controlnet is not None:
        _check_controlnet(manifest, manifest.controlnet, fields)
    if manifest.step is not None:
        _check_step(manifest, manifest.step, fields)
    _check_text_encoders(manifest, fields)
    if manifest.vae is not None:
        _check_vae(manifest, manifest.vae, fields)


def _check_rescale(manifest: ManifestRecord, fields: Fields) -> None:
    """Guidance is rescaled by a part of it, where there is some."""
    rescale = manifest.guidance_rescale
    if not 0 <= rescale <= 1 or (rescale and not manifest.guidance):
        raise fields.wrong("guidance_rescale", "must be from 0 to 1, and 0 without guidance", rescale)


def _check_controlnet(manifest: ManifestRecord, controlnet: GraphRecord, fields: Fields) -> None:
    """The ControlNet takes what the phases take, a picture and a scale, and gives the residuals that they take."""
    if "controlnet" not in manifest.weights:
        raise fields.wrong("weights", "must name the ControlNet's store", sorted(manifest.weights))
    phases = [record for record in manifest.phases if record.phase.control]
    if not phases:
        raise fields.wrong("controlnet", "is there, but no phase takes residuals", controlnet.graph)
    for record in phases:
        if controlnet.outputs != record.residuals:
            given = ", ".join(map(str, controlnet.outputs))
            raise fields.wrong("controlnet.outputs", f"must be the residuals of {record.phase.name}", given)
    own = {CONTROL_IMAGE, CONDITIONING_SCALE}
    shared = [spec for spec in controlnet.inputs if spec.name not in own]
    for spec in shared:
        if any(record.input(spec.name) != spec for record in phases):
            raise fields.wrong("controlnet.inputs", "must be those of the phases, or its own", str(spec))
    image, scale = controlnet.input(CONTROL_IMAGE), controlnet.input(CONDITIONING_SCALE)
    if image is None or scale is None or len(controlnet.inputs) != len(shared) + len(own):
        names = [spec.name for spec in controlnet.inputs]
        raise fields.wrong("controlnet.inputs", f"must hold {' and '.join(sorted(own))} once each", names)
    if not _is_picture(image, manifest) or scale.shape != (1,) or scale.dtype != "float32":
        rule = "must hold the scale as one number and the picture as [graphs' batch, 3, height, width], float32"
        raise fields.wrong("controlnet.inputs", rule, f"{image}, {scale}")


def _check_step(manifest: ManifestRecord, step: GraphRecord, fields: Fields) -> None:
    """The step graph takes what every phase gives, and gives what every phase takes."""
    state, rescale = step.input(STATE), step.input(GUIDANCE_RESCALE) is not None
    for record in manifest.phases:
        latents = record.input("latents")
        if state is None or latents is None:
            raise fields.wrong("step.inputs", f"must hold a state, and {record.phase.name} latents", str(state))
        due = (manifest.batch, record.outputs[0], latents, state.shape[0])
        for key, found, expected in (
            ("step.inputs", step.inputs, step_inputs(*due, rescale=rescale)),
            ("step.outputs", step.outputs, step_outputs(*due)),
        ):
            if sorted(found, key=str) != sorted(expected, key=str):
                rule = f"must be those of the phase {record.phase.name}: {', '.join(map(str, expected))}"
                raise fields.wrong(key, rule, ", ".join(map(str, found)))


def _is_picture(spec: TensorSpec, manifest: ManifestRecord) -> bool:
    batch = manifest.batch * (1 + manifest.guidance)
    return len(spec.shape) == 4 and spec.shape[:2] == (batch, 3) and spec.dtype == "float32"


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
        assert embeds is not None  # by `check_geometry`, as all axes are
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
