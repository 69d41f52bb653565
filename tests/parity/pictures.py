"""Bundles from prompt to picture whose engines are PyTorch modules, and the diffusers pipelines that they stand for.

Both sides have the same fabricated checkpoint. A bundle is a real build, tokenizers, sampler tables and manifest
included, but for its graphs: a file only names the module that would have been exported.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from hidiff_export import apply_hidiffusion
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build as build_network
from hidiff_export.checkpoints.load import load
from hidiff_export.checkpoints.tokenizer import tokenizer_json
from hidiff_export.compiler.compile import build
from hidiff_export.compiler.stages import graphs
from hidiff_export.compiler.stages.reference import ReferenceStage
from hidiff_export.engines import onnxruntime
from hidiff_export.families.family import Family, Task, Width
from hidiff_export.modules.graph_module import GraphModule
from hidiff_export.modules.vae import VaeEncoder
from hidiff_export.recipe import Recipe
from hidiff_runtime.format import safetensors
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.pipeline import pipeline as runtime_pipeline
from hidiff_runtime.pipeline.pipeline import Pipeline
from hidiff_runtime.verification.reference_samples import TENSORS
from tests.conftest import NoDisplay
from tests.export.verification.torch_bundle import TorchBackend
from tests.parity.pipelines import scheduler_of

Array = np.ndarray

_MODULES: list[GraphModule] = []
"""What bundles hold in place of graphs: a graph's file has its place in this list."""


@dataclass
class ModuleSession:
    """An engine that is a PyTorch module."""

    module: GraphModule
    record: GraphRecord

    def __enter__(self) -> ModuleSession:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        with torch.inference_mode():
            given = self.module(**self.module.arguments(tensors))
        outputs = given if isinstance(given, tuple) else (given,)
        names = [spec.name for spec in self.record.outputs]
        return {name: output.numpy() for name, output in zip(names, outputs, strict=True)}


class ModuleBackend(TorchBackend):
    """Opens what :func:`module_bundle` wrote."""

    def open(self, engine: Path, weights: Mapping[str, Path], record: GraphRecord) -> Any:  # noqa: ARG002
        return ModuleSession(_MODULES[int(engine.read_text(encoding="utf-8"))], record)


def module_bundle(recipe: Recipe, folder: Path, *, exported: bool = False) -> Path:
    """Builds ``recipe`` without exporting, and without recording what only a check replays.

    Args:
        exported: whether everything but the VAE's encoder is exported all the same.
    """
    write_graph, lower = graphs.write_graph, onnxruntime.lower

    def write_number(module: GraphModule, batch: int, store: Any, path: Path) -> None:
        if exported and not isinstance(module, VaeEncoder):
            write_graph(module, batch, store, path)
            return
        path.write_text(str(len(_MODULES)), encoding="utf-8")
        _MODULES.append(module)

    def lower_or_copy(graph: Path, engine: Path) -> None:
        if graph.read_bytes().isdigit():
            shutil.copyfile(graph, engine)
        else:
            lower(graph, engine)

    def record_nothing(_stage: ReferenceStage, context: Any, _report: Any) -> tuple[Path, ...]:
        path = context.folder / "reference/samples.json"
        path.parent.mkdir()
        path.write_text("{}", encoding="utf-8")
        tensors = path.with_name(TENSORS)
        safetensors.write(tensors, {})
        return (path, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "write_graph", write_number)
        patch.setattr(onnxruntime, "lower", lower_or_copy)
        patch.setattr(ReferenceStage, "run", record_nothing)
        return build(recipe, folder, NoDisplay()).folder


@dataclass(frozen=True)
class Picture:
    """A picture before it is rounded, ``[batch, 3, height, width]`` from 0 to 1, and after."""

    exact: Array
    rounded: Array

    @classmethod
    def of(cls, exact: Array) -> Picture:
        """Rounded as diffusers rounds."""
        return cls(exact, (exact * 255).round().astype(np.uint8))


@contextmanager
def opened(bundle: Path, recipe: Recipe) -> Iterator[Pipeline]:
    """The runtime's pipeline on PyTorch modules; they stay open."""
    with Pipeline.open(bundle, backend=ModuleBackend(recipe), resident="all") as pipe:
        yield pipe


def generated(pipe: Pipeline, **asked: Any) -> Picture:
    """The runtime's picture, and the array that it was rounded from."""
    kept: list[Array] = []

    def keep(images: Array) -> list[Image.Image]:
        kept.append(images)
        return to_pictures(images)

    to_pictures = runtime_pipeline.to_pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_pipeline, "to_pictures", keep)
        given = pipe(**asked)
    images = given if isinstance(given, list) else [given]
    rounded = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
    return Picture(np.clip(kept[0] / 2 + 0.5, 0, 1), rounded)


# The published tokenizers pad with the end, OpenCLIP's with their first token.
_PADDING = {
    ("sd15", "text_encoder"): "<|endoftext|>",
    ("sd21", "text_encoder"): "!",
    ("sdxl", "text_encoder"): "<|endoftext|>",
    ("sdxl", "text_encoder_2"): "!",
}
_RENAMED = {
    "steps": "num_inference_steps",
    "mask": "mask_image",
    "conditioning_scale": "controlnet_conditioning_scale",
    "crops": "crops_coords_top_left",
    "negative_crops": "negative_crops_coords_top_left",
}


@functools.cache
def network(component: Component, family: Family, task: Task, source: str) -> Any:
    """A tiny network of the checkpoint, in its library's own class."""
    model = build_network(component, *load(component, source, family, task, Width.TINY)[:2])
    if component is Component.TEXT_ENCODER and not hasattr(model, "text_model"):
        # Where diffusers' clip_skip looks for the last normalization, and transformers had it before version 5.
        vars(model)["text_model"] = model
    return model


def tokenizer(name: str, family: Family) -> Any:
    """transformers' own tokenizer with a fabricated checkpoint's vocabulary."""
    vocabulary = json.loads(tokenizer_json("random:0", Component(name), family, Width.TINY))["model"]["vocab"]
    padding = _PADDING["sdxl" if family.is_sdxl else family.value, name]
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=padding, model_max_length=77)


def diffusers_pipeline(recipe: Recipe, kind: str, scheduler: Any = None) -> Any:
    """The pipeline of this class with the recipe's checkpoint.

    Args:
        kind: name of the class.
        scheduler: the family's own if left out.
    """
    family, task = recipe.family, recipe.task
    names = [Component.VAE, Component.UNET, *map(Component, recipe.text_encoders)]
    parts: dict[str, Any] = {name.value: network(name, family, task, recipe.source) for name in names}
    parts["scheduler"] = scheduler or scheduler_of(family)
    for name in recipe.text_encoders:
        parts[name.replace("text_encoder", "tokenizer")] = tokenizer(name, family)
    if family.is_sdxl:
        parts["add_watermarker"] = False
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if recipe.controlnet is not None and "ControlNet" in kind:
        parts["controlnet"] = network(Component.CONTROLNET, family, task, recipe.controlnet)
    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected(pipe: Any, recipe: Recipe, asked: Mapping[str, Any], *, hidiffusion: bool = True) -> Picture:
    """diffusers' picture for what the runtime was asked; ``pipe`` is left as it was."""
    given = {_RENAMED.get(name, name): value for name, value in asked.items() if name != "seed"}
    kind = type(pipe).__name__
    if "Img2Img" not in kind:
        given |= {"height": recipe.height, "width": recipe.width}
    if kind.endswith("ControlNetPipeline"):
        given["image"] = given.pop("control_image")
    if not recipe.guidance:
        given["guidance_scale"] = 0.0
    task = recipe.task if recipe.task.has_control and "ControlNet" in kind else None
    given |= {"generator": torch.Generator().manual_seed(asked["seed"]), "output_type": "pt"}
    if not hidiffusion:
        return Picture.of(pipe(**given).images.numpy())
    rule = None if recipe.hidiffusion.thresholds is None else recipe.phase_rule()
    with apply_hidiffusion(pipe, family=recipe.family, task=task, rule=rule):
        return Picture.of(pipe(**given).images.numpy())


def painting(width: int, height: int, seed: int) -> Image.Image:
    """A picture of soft random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def half_mask(width: int, height: int) -> Image.Image:
    """White on the left, black on the right, with a notch so that no axis can be mistaken."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    mask[: height // 4, width // 2 : -width // 4] = 255
    return Image.fromarray(mask)
