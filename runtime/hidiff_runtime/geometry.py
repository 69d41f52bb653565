"""Whether a manifest's sizes are those of its graphs: picture, latents, batch, windows and what goes in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hidiff_runtime.fields import Fields
from hidiff_runtime.records import TensorSpec

if TYPE_CHECKING:
    from hidiff_runtime.manifest import Manifest
    from hidiff_runtime.records import PhaseRecord

PIXELS_PER_LATENT = 8
"""Of a picture's side, for each element of its latents' side."""

_SIZES_FREE = {"prompt_embeds": 2, "text_embeds": 1, "time_ids": 1}
"""Inputs that each picture has one of, and how many axes follow the batch, whose lengths are the model's own."""


def check_geometry(manifest: Manifest, fields: Fields) -> None:
    """Refuses a manifest whose sizes are not those of its graphs.

    Raises:
        BundleError: the field at fault is named.
    """
    height, width = manifest.height, manifest.width
    if manifest.latent[1:] != (height / PIXELS_PER_LATENT, width / PIXELS_PER_LATENT):
        rule = f"must be those of a picture of {width}x{height}: channels, and its sides over {PIXELS_PER_LATENT}"
        raise fields.wrong("latent", rule, list(manifest.latent))
    _check_vae_tiles(manifest, fields)
    missing = [phase.name for phase in manifest.rule.phases() if phase not in {r.phase for r in manifest.phases}]
    if missing:
        raise fields.wrong("phases", "must have a graph for each phase that the rule reaches", f"without {missing}")
    shared = _shared(manifest.phases[0])
    for index, record in enumerate(manifest.phases):
        where = f"phases[{index}]"
        _check_outputs(manifest, record, fields, where)
        _check_inputs(manifest, record, fields, where)
        if _shared(record) != shared:
            given = ", ".join(map(str, record.inputs))
            raise fields.wrong(f"{where}.inputs", "must be those of the other phases, but for residuals", given)


def _shared(record: PhaseRecord) -> set[TensorSpec]:
    return set(record.inputs) - set(record.residuals)


def _check_outputs(manifest: Manifest, record: PhaseRecord, fields: Fields, where: str) -> None:
    due = TensorSpec("noise_pred", (_batch(manifest), *manifest.latent), "float32")
    if record.outputs != (due,):
        given = ", ".join(map(str, record.outputs))
        raise fields.wrong(f"{where}.outputs", f"must be {due}, by batch, guidance and latent", given)


def _check_inputs(manifest: Manifest, record: PhaseRecord, fields: Fields, where: str) -> None:
    key, batch = f"{where}.inputs", _batch(manifest)
    names = [spec.name for spec in record.inputs]
    if len(set(names)) != len(names):
        raise fields.wrong(key, "must have each name once", names)
    channels, *size = manifest.latent
    allowed: dict[str, list[tuple[int, ...]]] = {
        # With mask and masked picture behind them for inpainting.
        "latents": [(batch, depth, *size) for depth in (channels, channels + 1 + channels)],
        "timestep": [(1,)],
        "window_shifts": [(len(manifest.windowed_blocks),)],
    }
    for name in ("latents", "timestep", "prompt_embeds", *(("window_shifts",) * bool(manifest.windowed_blocks))):
        if name not in names:
            raise fields.wrong(key, f"must hold {name}", names)
    if bool(record.residuals) != record.phase.control:
        raise fields.wrong(key, "must hold a ControlNet's residuals exactly where the phase takes them", names)
    for spec in record.inputs:
        dtype = "int32" if spec.name == "window_shifts" else "float32"
        axes = 3 if spec in record.residuals else _SIZES_FREE.get(spec.name)
        if axes is not None:
            fits = len(spec.shape) == 1 + axes and spec.shape[0] == batch
        else:
            fits = spec.shape in allowed.get(spec.name, [])
        if not fits or spec.dtype != dtype:
            rule = f"must hold what a UNet takes, for a batch of {batch} and latents {list(manifest.latent)}"
            raise fields.wrong(key, rule, str(spec))


def _batch(manifest: Manifest) -> int:
    """Of the graphs: each picture's latents, with guidance twice."""
    return manifest.batch * (1 + manifest.guidance)


def _check_vae_tiles(manifest: Manifest, fields: Fields) -> None:
    """A tile of the picture has as many pixels for each latent as the picture."""
    if manifest.vae is None:
        return
    latents, image = manifest.vae.decoder.input("latents"), manifest.vae.decoder.output("image")
    if latents is None or image is None or len(latents.shape) != 4:
        return  # refused beside the VAE's other inputs and outputs
    due = (1, 3, *(side * PIXELS_PER_LATENT for side in latents.shape[2:]))
    if image.shape != due:
        raise fields.wrong("vae.decoder.outputs", f"must be an image of {list(due)} for {latents}", str(image))
