"""The weights that the reference computes with: from the bundle's own stores, or from another checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import Checkpoint, build, load, load_stored
from hidiff_export.checkpoints.lora import fuse, read_lora
from hidiff_export.checkpoints.model_index import read_model_index
from hidiff_export.checkpoints.sources import MODEL_INDEX
from hidiff_export.checkpoints.state_dict import LazyStateDict, shapes_of
from hidiff_export.checkpoints.stored_configs import WEIGHTS
from hidiff_export.checkpoints.weight_store import PRECISIONS, WeightStore
from hidiff_export.graph.float32_ops import precision_of
from hidiff_export.recipe import Recipe
from hidiff_export.reference.diffusers_run import Networks
from hidiff_export.reference.text_vae_reference import PictureNetworks
from hidiff_export.reference.tolerances import Boundary, bound_for
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.verification.comparison import Metrics, Verdict

_NAMED = 5


def networks_of_store(root: Path, recipe: Recipe) -> Networks:
    """Returns the float32 networks of a bundle, with the weights as stored; float32 ones are mapped, not copied.

    Args:
        root: the bundle's folder, also while it is being built.
        recipe: which says whether there is a ControlNet. Text encoders and the VAE are loaded when they are asked.
    """
    controlnet = _stored(root, Component.CONTROLNET) if recipe.controlnet is not None else None
    return Networks(_stored(root, Component.UNET), controlnet, PictureNetworks(root, recipe))


def _stored(root: Path, component: Component) -> Any:
    return load_stored(component, WeightStore.open(root / component.value / WEIGHTS))


def unet_of_source(source: str, recipe: Recipe) -> Any:
    """Returns a float32 UNet with a checkpoint's weights, as `weights_of_source` gives them, and with its errors."""
    return build(Component.UNET, *weights_of_source(Component.UNET, source, recipe)[:2], torch.float32)


def weights_of_source(component: Component, source: str, recipe: Recipe) -> Checkpoint:
    """Returns a network's float32 weights in a checkpoint, rounded as the bundle rounds them when they are stored.

    The recipe's LoRA files are fused into them, as they were when the bundle was built.

    Raises:
        CheckpointError: it or a LoRA is missing, damaged or another family's.
    """
    _, dtype = PRECISIONS[precision_of(component.value, recipe.precision)]
    kind = (recipe.family, recipe.task, recipe.unet_width)
    loras = [read_lora(Path(lora.path), lora.scale, *kind) for lora in recipe.lora]
    config, tensors, _ = fuse(component, load(component, source, *kind), loras)
    rounded = LazyStateDict(shapes_of(tensors), lambda name: tensors[name].to(dtype).to(torch.float32))
    return Checkpoint(config, rounded)


def compare_weights(network: str, expected: Mapping[str, torch.Tensor], stored: Path, recipe: Recipe) -> Verdict:
    """Compares every tensor of a weight store with the expected one, bit for bit; those that differ are named.

    Args:
        network: whose weights they are.
        expected: float32 tensors by name, rounded as the store's are.
        stored: the store's file.
    """
    found = WeightStore.open(stored).state_dict()
    signal = noise = power = product = largest = 0.0
    differing = sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        reference, candidate = (tensor.to(torch.float32).flatten() for tensor in (expected[name], found[name]))
        if torch.equal(reference, candidate):
            signal, power, product = (total + _dot(reference, reference) for total in (signal, power, product))
            continue
        differing.append(name)
        if reference.shape != candidate.shape:
            continue
        difference = candidate - reference
        largest = max(largest, float(difference.abs().max()))
        signal, noise = signal + _dot(reference, reference), noise + _dot(difference, difference)
        power, product = power + _dot(candidate, candidate), product + _dot(reference, candidate)
    ratio = 10 * math.log10(signal / noise) if noise and signal else math.inf
    cosine = product / math.sqrt(signal * power) if noise and signal and power else 1.0
    metrics = Metrics(ratio, largest, cosine)
    bound = bound_for(Boundary.WEIGHTS, recipe)
    return Verdict(Boundary.WEIGHTS.value, bound, metrics, network, fault=_fault(differing))


def compare_model_index(source: str, manifest: Manifest, recipe: Recipe) -> Verdict:
    """Compares what a missing negative prompt stands for with what the source's ``model_index.json`` says."""
    taken = [component for component in Component if component.value in manifest.weights]
    due = read_model_index(source, recipe.family, taken).force_zeros_for_empty_prompt
    found = manifest.force_zeros_for_empty_prompt
    fault = "" if found == due else f"force_zeros_for_empty_prompt is {due}, in the bundle {found}"
    bound = bound_for(Boundary.WEIGHTS, recipe)
    return Verdict(Boundary.WEIGHTS.value, bound, Metrics(math.inf, 0.0, 1.0), MODEL_INDEX, fault=fault)


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one, other))


def _fault(differing: list[str]) -> str:
    if not differing:
        return ""
    more = "" if len(differing) <= _NAMED else f" and {len(differing) - _NAMED} more"
    return f"{len(differing)} tensors differ: {', '.join(sorted(differing)[:_NAMED])}{more}"
