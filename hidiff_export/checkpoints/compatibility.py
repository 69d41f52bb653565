"""Whether a checkpoint is of the family, the task and the width that a recipe names, and which it is if not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.contents import CONTROLNET, LORA, UNET, TensorKind, added_kind, kind_of, listed
from hidiff_export.checkpoints.state_dict import Shapes
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family, Task, Width, widths_of

_SUPPORTED = "Give a checkpoint of one of the families that `hidiff-export recipes` lists."
_FAMILY = "Set the recipe's family to the checkpoint's, or give another checkpoint."
_TASK = "Set the recipe's task to the checkpoint's, or give another checkpoint."
_ARCHITECTURE = "Only checkpoints with their family's published architecture can be built."
_INCOMPLETE = (
    "If this is one file of several, give the folder; a distilled model with fewer layers cannot be built. "
    "Else the file was saved without them: give the checkpoint as it was published."
)
_FUSED = "Give the LoRA in a file of its own as --lora, and a checkpoint without it."

_ALSO = {
    Component.TEXT_ENCODER: ("CLIPTextModelWithProjection", "CLIPModel"),
    Component.TEXT_ENCODER_2: ("CLIPModel",),
}
"""Classes of transformers that hold the network's own tensors, beside others that are left out."""

_CLASSES = {
    "ControlNetUnionModel": "a union ControlNet",
    "ControlNetXSAdapter": "a ControlNet-XS",
    "UNetControlNetXSModel": "a UNet with a ControlNet-XS inside",
    "T2IAdapter": "a T2I-Adapter",
    "SparseControlNetModel": "a ControlNet for video",
    "FluxControlNetModel": "a ControlNet for Flux",
    "SD3ControlNetModel": "a ControlNet for Stable Diffusion 3",
    "UNetMotionModel": "a video UNet (AnimateDiff)",
    "UNetSpatioTemporalConditionModel": "a video UNet (Stable Video Diffusion)",
    "StableCascadeUNet": "Stable Cascade's UNet",
    "AutoencoderTiny": "a tiny VAE (TAESD)",
    "AsymmetricAutoencoderKL": "a VAE with another decoder",
    "ConsistencyDecoderVAE": "a VAE with another decoder",
    "T5EncoderModel": "a T5 text encoder, as Flux and SD3 have",
    "BertModel": "a BERT text encoder",
}
"""What classes of diffusers and transformers are that lie where a network is looked for."""

_CHANNELS = {
    4: "not an inpainting one",
    5: "one that takes a depth map",
    7: "an upscaler",
    8: "InstructPix2Pix's or another that takes a picture beside the latents",
    9: "an inpainting one",
}
"""What a UNet with so many input channels is for."""

_MASKED = "use_attention_mask"
_OBEYED_BY_PIPELINES = {
    "vae": {
        "latents_mean": "has latents with a mean of their own in each channel",
        "latents_std": "has latents with a deviation of their own in each channel",
    },
    "text_encoder": {_MASKED: "masks the padding of prompts"},
    "controlnet": {"global_pool_conditions": "pools its residuals over the picture"},
}
"""Settings that change what diffusers' pipelines do with a network, by its folder: key and what it means."""


@dataclass(frozen=True)
class _Traits:
    """What tells the families apart, read from tensor shapes; the same for diffusers' and the original names."""

    channels: int
    text_width: int
    linear_projection: bool
    size_conditioned: bool

    @classmethod
    def of(cls, shapes: Shapes) -> _Traits | None:
        """Returns the traits, or None when the tensors are of no Stable Diffusion UNet or ControlNet."""
        first = _conv_in(shapes)
        keys = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
        projection = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), None)
        if first is None or keys is None or projection is None:
            return None
        sized = "add_embedding.linear_1.weight" in shapes or "label_emb.0.0.weight" in shapes
        return cls(first[0], keys[-1], len(projection) == 2, sized)

    def __str__(self) -> str:
        projection = "linear" if self.linear_projection else "convolutional"
        sized = "with" if self.size_conditioned else "without"
        return (
            f"{self.channels} channels, prompt width {self.text_width}, "
            f"{projection} projections, {sized} size conditioning"
        )


def check_family(component: Component, family: Family, task: Task, width: Width, shapes: Shapes) -> None:
    """Raises CheckpointError when the tensors of a UNet or ControlNet are another family's, width's or task's.

    Args:
        component: what the tensors are to be.
        family: wanted.
        task: wanted.
        width: wanted.
        shapes: under diffusers' or the original LDM names.
    """
    found, kind = _Traits.of(shapes), kind_of(shapes)
    if kind is not (CONTROLNET if component is Component.CONTROLNET else UNET):
        raise _another_kind(component, kind, shapes)
    if found is None or found != _published(component, family, task, width):
        raise _another_family(component, family, task, width, shapes)
    first, wanted = _conv_in(shapes), component.config(family, task, width)["in_channels"]
    if first is not None and first[1] != wanted:
        use = _CHANNELS.get(first[1], "of a kind not known here")
        raise CheckpointError(
            f"The checkpoint does not serve the task {task.value}.",
            given=f"{first[1]} input channels, {wanted} wanted: it is {use}",
            advice=_TASK if first[1] in (4, 9) else _SUPPORTED,
        )


def _another_kind(component: Component, kind: TensorKind | None, shapes: Shapes) -> CheckpointError:
    what = f": it is {kind.what}" if kind else ""
    return CheckpointError(
        f"The checkpoint is no Stable Diffusion {component.class_name}{what}.",
        given=f"{len(shapes)} tensors, {listed(sorted(shapes))}" if shapes else "no tensors",
        advice=kind.advice if kind else _SUPPORTED,
    )


def _another_family(component: Component, family: Family, task: Task, width: Width, shapes: Shapes) -> CheckpointError:
    found = _Traits.of(shapes)
    likely = found and _families_like(component, task, found)
    other = _other_unet(shapes) if component is Component.UNET else None
    what = f"is {other.what}" if other else f"looks like {likely}" if likely else "is of no family known here"
    smaller = " and fewer attention blocks than the published ones" if found is None else ""
    return CheckpointError(
        f"The checkpoint is not {family.value} at {width.value} width: it {what}.",
        given=str(found) if found else f"{len(shapes)} tensors{smaller}",
        advice=other.advice if other else _FAMILY,
    )


def _other_unet(shapes: Shapes) -> TensorKind | None:
    """Returns which UNet of another architecture this is, by what only that one has; None if it is unknown."""
    first = _conv_in(shapes) or ()
    keys = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), ())
    if any(part in name for name in shapes for part in ("time_stack", "temporal_")):
        return TensorKind("a video UNet, such as Stable Video Diffusion's", _SUPPORTED)
    if any(name.startswith("add_embedding.image_") for name in shapes):
        return TensorKind("a Kandinsky UNet", _SUPPORTED)
    if any(".add_k_proj." in name for name in shapes):
        return TensorKind("a DeepFloyd IF UNet", _SUPPORTED)
    if first[:1] == (384,) and keys[-1:] == (1280,):
        return TensorKind("SDXL's refiner", "Give SDXL's base model: the refiner is another UNet, which is not built.")
    if first[1:2] == (7,):
        return TensorKind("the UNet of Stable Diffusion's x4 upscaler", _SUPPORTED)
    return None


def check_class(component: Component, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError when a configuration is of another class than the network's, or of a quantized one."""
    quantized = config.get("quantization_config")
    if isinstance(quantized, Mapping):
        raise CheckpointError(
            "The checkpoint is quantized, and cannot be read as weights.",
            given=f"config.json says quantization_config: {quantized.get('quant_method', 'of no method')}",
            advice="Take the checkpoint that it was made from.",
        )
    class_name = _class_of(component, config)
    if class_name not in (component.class_name, *_ALSO.get(component, ())):
        what = _CLASSES.get(class_name) if isinstance(class_name, str) else None
        raise CheckpointError(
            f"The checkpoint's configuration is not of a {component.class_name}.",
            given=f"{class_name}{f': {what}' if what else ''}",
            advice=_SUPPORTED if what else "Give the folder that holds the pipeline, or the network itself.",
        )


def check_config(component: Component, expected: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration to build from: the expected one, with what a checkpoint is free to set.

    Raises CheckpointError when the checkpoint's own configuration is another architecture.
    """
    check_class(component, given)
    given = _text_half(component, given)
    wanted, found = (_plain(component.full_config(config)) for config in (expected, given))
    differing = [key for key in wanted if found[key] != wanted[key] and key not in component.free_keys]
    if differing:
        raise CheckpointError(
            "The checkpoint's configuration is not its family's.",
            given=listed([f"{key} {found[key]} for {wanted[key]}" for key in differing]),
            advice="Only checkpoints with their family's published architecture can be built.",
        )
    return {**expected, **{key: given[key] for key in component.free_keys if given.get(key) is not None}}


def check_pipeline_settings(component: Component, family: Family, given: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a configuration that has diffusers' pipelines do what bundles do not."""
    for key, meaning in _OBEYED_BY_PIPELINES.get(component.value, {}).items():
        if given.get(key) and not (family.is_sdxl and key == _MASKED):  # SDXL's do not look at it
            raise CheckpointError(
                f"The checkpoint's {component.value} {meaning}, which bundles do not do.",
                given=f"{key} {given[key]}",
                advice="Give a checkpoint with the family's own; without this setting it would draw other pictures.",
            )


def check_shapes(component: Component, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raises CheckpointError when tensors are missing, left over or of another shape than the network's."""
    wanted = component.shapes(config)
    missing = sorted(wanted.keys() - shapes.keys())
    extra = sorted(shapes.keys() - wanted.keys())
    differing = [name for name in sorted(wanted.keys() & shapes.keys()) if wanted[name] != shapes[name]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {listed(missing)}")
    if extra:
        problems.append(_extras(extra))
    if differing:
        detail = [f"{name} {list(shapes[name])} for {list(wanted[name])}" for name in differing]
        problems.append(f"{len(differing)} of another shape: {listed(detail)}")
    if not problems:
        return
    added = [kind for name in extra if (kind := added_kind(name)) is not None]
    if added and not missing and not differing:
        advice = added[0].advice if added[0] is not LORA else _FUSED
    elif missing and not extra and not differing:
        advice = _INCOMPLETE
    else:
        advice = _ARCHITECTURE
    raise CheckpointError(
        f"The checkpoint's tensors are not those of its {component.class_name}.",
        given="; ".join(problems),
        advice=advice,
    )


def _extras(names: list[str]) -> str:
    """Returns tensors that a network has no place for, grouped by what they belong to."""
    groups: dict[str, list[str]] = {}
    for name in names:
        kind = added_kind(name)
        groups.setdefault(kind.what if kind else "", []).append(name)
    return "; ".join(
        f"{len(group)} {'of ' + what if what else 'unknown'}: {listed(group)}" for what, group in groups.items()
    )


def _class_of(component: Component, config: Mapping[str, Any]) -> Any:
    architectures = config.get("architectures") or component.class_name
    return config.get("_class_name", architectures[0] if isinstance(architectures, list) else architectures)


def _text_half(component: Component, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the configuration of a whole CLIP, that of its text encoder."""
    inner = config.get("text_config")
    if not component.is_text or not isinstance(inner, Mapping):
        return config
    own = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    return {**inner, **own}


def _conv_in(shapes: Shapes) -> tuple[int, ...] | None:
    shape = shapes.get("conv_in.weight", shapes.get("input_blocks.0.0.weight"))
    return shape if shape is not None and len(shape) == 4 else None


@cache
def _published(component: Component, family: Family, task: Task, width: Width) -> _Traits | None:
    return _Traits.of(component.shapes(component.config(family, task, width)))


def _families_like(component: Component, task: Task, traits: _Traits) -> str:
    matches: dict[Width, list[str]] = {}
    for family in Family:
        for width in widths_of(family):
            if _published(component, family, task, width) == traits:
                matches.setdefault(width, []).append(family.value)
    return "; ".join(f"{' or '.join(names)} at {width.value} width" for width, names in matches.items())


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration without diffusers' own keys, lists of one repeated value as that value."""
    return {key: _uniform(value) for key, value in config.items() if not key.startswith("_")}


def _uniform(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        values = tuple(_uniform(item) for item in value)
        return values[0] if values and all(item == values[0] for item in values) else values
    return value
