"""Whether a checkpoint is of the family, the task and the width that a recipe names, and which it is if not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hidiff_export.errors import CheckpointError
from hidiff_export.families import Family, Task, Width
from hidiff_export.model.component import Component
from hidiff_export.model.state_dict import Shapes

_SHOWN = 4

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
        """The traits, or None when the tensors are of no Stable Diffusion UNet or ControlNet."""
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
    found = _Traits.of(shapes)
    if found is None:
        raise CheckpointError(
            f"The checkpoint is no Stable Diffusion {component.class_name}.",
            given=f"{len(shapes)} tensors, {_some(sorted(shapes))}",
            advice="Give a checkpoint that has one; a LoRA file goes to --lora, beside it.",
        )
    if found != _published(component, family, task, width):
        likely = _families_like(component, task, found)
        looks = f"looks like {likely}" if likely else "is of no family known here"
        raise CheckpointError(
            f"The checkpoint is not {family.value} at {width.value} width: it {looks}.",
            given=str(found),
            advice="Set the recipe's family to the checkpoint's, or give another checkpoint.",
        )
    first, wanted = _conv_in(shapes), component.config(family, task, width)["in_channels"]
    if first is not None and first[1] != wanted:
        purpose = "is an inpainting one" if first[1] == 9 else "is not an inpainting one"
        raise CheckpointError(
            f"The checkpoint does not serve the task {task.value}.",
            given=f"{first[1]} input channels, {wanted} wanted: it {purpose}",
            advice="Set the recipe's task to the checkpoint's, or give another checkpoint.",
        )


def check_config(component: Component, expected: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration to build from: the expected one, with what a checkpoint is free to set.

    Raises CheckpointError when the checkpoint's own configuration is another architecture.
    """
    listed = given.get("architectures") or component.class_name
    class_name = given.get("_class_name", listed[0] if isinstance(listed, list) else listed)
    if class_name != component.class_name:
        raise CheckpointError(
            f"The checkpoint's configuration is not of a {component.class_name}.",
            given=class_name,
            advice="Give the folder that holds the pipeline, or the network itself.",
        )
    wanted, found = (_plain(component.full_config(config)) for config in (expected, given))
    differing = [key for key in wanted if found[key] != wanted[key] and key not in component.free_keys]
    if differing:
        raise CheckpointError(
            "The checkpoint's configuration is not its family's.",
            given=_some([f"{key} {found[key]} for {wanted[key]}" for key in differing]),
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
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} unknown: {_some(extra)}")
    if differing:
        detail = [f"{name} {list(shapes[name])} for {list(wanted[name])}" for name in differing]
        problems.append(f"{len(differing)} of another shape: {_some(detail)}")
    if problems:
        raise CheckpointError(
            f"The checkpoint's tensors are not those of its {component.class_name}.",
            given="; ".join(problems),
            advice="Get the checkpoint again; a LoRA file is not a checkpoint, give it as --lora.",
        )


def _conv_in(shapes: Shapes) -> tuple[int, ...] | None:
    shape = shapes.get("conv_in.weight", shapes.get("input_blocks.0.0.weight"))
    return shape if shape is not None and len(shape) == 4 else None


@cache
def _published(component: Component, family: Family, task: Task, width: Width) -> _Traits | None:
    return _Traits.of(component.shapes(component.config(family, task, width)))


def _families_like(component: Component, task: Task, traits: _Traits) -> str:
    matches: dict[Width, list[str]] = {}
    for width in Width:
        for family in Family:
            if _published(component, family, task, width) == traits:
                matches.setdefault(width, []).append(family.value)
    return "; ".join(f"{' or '.join(names)} at {width.value} width" for width, names in matches.items())


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without diffusers' own keys, lists of one repeated value as that value."""
    return {key: _uniform(value) for key, value in config.items() if not key.startswith("_")}


def _uniform(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        values = tuple(_uniform(item) for item in value)
        return values[0] if values and all(item == values[0] for item in values) else values
    return value


def _some(items: Iterable[str]) -> str:
    shown = list(items)
    rest = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
