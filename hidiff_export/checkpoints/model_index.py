"""What a diffusers folder's ``model_index.json`` says of its pipeline: obeyed, refused by name, or named as left out.

diffusers builds a pipeline from this file: its class, the class of each component, and settings of the pipeline itself.
Bundles stand for the pipelines of Stable Diffusion 1.5, 2 and XL; whatever would draw another picture is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.sources import MODEL_INDEX, find_model_index
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import Family

_PIPELINES = frozenset(
    f"StableDiffusion{version}{control}{kind}Pipeline"
    for version in ("", "XL")
    for control in ("", "ControlNet")
    for kind in ("", "Img2Img", "Inpaint")
)
"""Classes that a bundle stands for; which of them it is, the recipe's task decides."""

_OTHERS = {
    "InstructPix2Pix": "which edits a picture by an instruction, with a guidance scale for the picture",
    "LatentConsistencyModel": "whose UNet takes the guidance scale as an input",
}
"""What sets pipelines apart whose names hold these words."""

_ZEROS, _AESTHETICS = "force_zeros_for_empty_prompt", "requires_aesthetics_score"
_CLASSES: Mapping[str, frozenset[str]] = {
    "unet": frozenset({"UNet2DConditionModel"}),
    "vae": frozenset({"AutoencoderKL"}),
    # Its projection is not used, and need not be there.
    "text_encoder": frozenset({"CLIPTextModel", "CLIPTextModelWithProjection"}),
    "text_encoder_2": frozenset({"CLIPTextModelWithProjection"}),
    "tokenizer": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
    "tokenizer_2": frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
}
"""Classes of the components that a bundle holds."""

_MEANINGS = {
    "safety_checker": " (no picture is checked)",
    "image_encoder": " (for IP-Adapters)",
    "controlnet": " (name it as the recipe's controlnet)",
}


@dataclass(frozen=True)
class ModelIndex:
    """What a checkpoint's pipeline is told beside its networks.

    Args:
        force_zeros_for_empty_prompt: whether SDXL's prompts without a negative one have zeros in the place of its
            embeddings, and not the empty prompt's.
        notices: one line for everything that a bundle leaves out without drawing another picture; empty if nothing.
    """

    force_zeros_for_empty_prompt: bool = True
    notices: tuple[str, ...] = ()


def read_model_index(source: str, family: Family, taken: Collection[Component]) -> ModelIndex:
    """Reads a checkpoint's ``model_index.json``; without one (single files, folders of one network) all is as usual.

    Args:
        source: as `hidiff_export.checkpoints.load.load` takes it.
        family: of the bundle.
        taken: the networks that the bundle takes, a ControlNet among them wherever it is from.

    Raises:
        CheckpointError: the pipeline is another than a bundle stands for, or the file is damaged.
        StorageError: when a download cannot be written.
    """
    found = find_model_index(source)
    if found is None:
        return ModelIndex()
    index = {key: value for key, value in found.items() if not key.startswith("_")}
    where = f"{source}: {MODEL_INDEX}"
    _check_pipeline(found.get("_class_name"), where)
    _check_components(index, taken, where)
    _check_aesthetics(found, family, where)
    zeros = index.get(_ZEROS, True) if family.is_sdxl else True
    if not isinstance(zeros, bool):
        raise CheckpointError(
            f"{_ZEROS} must be true or false.",
            given=f"{where} has {_ZEROS} {_json(zeros)}",
            advice="Take the model_index.json that the checkpoint was published with.",
        )
    return ModelIndex(zeros, _notices(index, family, taken))


def _check_pipeline(given: Any, where: str) -> None:
    """Refuses pipelines that do something else with the networks, or have others."""
    name = given[-1] if isinstance(given, list) and given else given  # a list names a file with the class's code too
    if name is None or (name in _PIPELINES and not isinstance(given, list)):
        return
    meaning = next((text for word, text in _OTHERS.items() if word in str(name)), "")
    if isinstance(given, list):
        meaning = "whose code comes with the checkpoint"
    raise CheckpointError(
        f"The checkpoint is of another pipeline, {name}{', ' * bool(meaning)}{meaning}.",
        given=f"{where} has _class_name {_json(given)}",
        advice="HiDiffusion is for Stable Diffusion 1.5, 2 and XL: give a checkpoint of one of them. If only the class "
        "is another and the networks are theirs, write StableDiffusionPipeline or StableDiffusionXLPipeline there.",
    )


def _check_components(index: Mapping[str, Any], taken: Collection[Component], where: str) -> None:
    """Refuses a component that a bundle takes and that is absent, or of a class that computes something else."""
    for component in taken:
        if component is Component.CONTROLNET:
            continue
        names = [component.value]
        if component.is_text:
            names.append(component.value.replace("text_encoder", "tokenizer"))
        for name in names:
            if name in index:
                _check_component(name, index[name], component, where)


def _check_component(name: str, value: Any, component: Component, where: str) -> None:
    if _is_absent(value):
        key = "text" if component.is_text else "vae"
        advice = "Give a checkpoint that has one."
        if component is not Component.UNET:
            advice = f"Give a checkpoint that has one, or set {key}: false for a bundle without."
        raise CheckpointError(
            f"The checkpoint's pipeline has no {name}.", given=f"{where} has {name} {_json(value)}", advice=advice
        )
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise CheckpointError(
            f"{MODEL_INDEX} does not say what its {name} is.",
            given=f"{where} has {name} {_json(value)}, expected a library and a class",
            advice="Take the model_index.json that the checkpoint was published with.",
        )
    if value[1] not in _CLASSES[name]:
        raise CheckpointError(
            f"The checkpoint's {name} is of the class {value[1]}, expected {' or '.join(sorted(_CLASSES[name]))}.",
            given=f"{where} has {name} {_json(value)}",
            advice=f"Give a checkpoint with the {name} of its family; another one draws other pictures.",
        )


def _check_aesthetics(found: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuses SDXL's refiner, which is conditioned on a score; the pipelines that do not read the key pass it over."""
    name = str(found.get("_class_name"))
    if family.is_sdxl and found.get(_AESTHETICS) and ("Img2Img" in name or "Inpaint" in name):
        raise CheckpointError(
            "The checkpoint is conditioned on an aesthetic score, as SDXL's refiner is.",
            given=f"{where} has {_AESTHETICS} true",
            advice="Give SDXL's base model or a fine-tune of it: bundles hold no refiner.",
        )


def _notices(index: Mapping[str, Any], family: Family, taken: Collection[Component]) -> tuple[str, ...]:
    """Returns the line that names what is there and not obeyed; what is absent or switched off is not named."""
    obeyed = {*_CLASSES, "scheduler", *((_ZEROS,) if family.is_sdxl else ())}
    if Component.CONTROLNET in taken:
        obeyed.add("controlnet")
    if _is_absent(index.get("safety_checker")):
        obeyed.add("requires_safety_checker")
    left = [key for key, value in index.items() if key not in obeyed and value is not False and not _is_absent(value)]
    if not left:
        return ()
    return (f"{MODEL_INDEX}: left out {', '.join(key + _MEANINGS.get(key, '') for key in left)}",)


def _is_absent(value: Any) -> bool:
    return value is None or value == [None, None]


def _json(value: Any) -> str:
    """Returns a value as it stands in the file."""
    return json.dumps(value, ensure_ascii=False)
