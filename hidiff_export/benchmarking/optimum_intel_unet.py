"""The UNet of optimum-intel's OpenVINO pipelines, without HiDiffusion, exported and compiled as these do it.

optimum-intel may need an interpreter of its own, for it asks for older libraries than this project does. So nothing is
imported here but what it brings itself.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from hidiff_export.benchmarking.stock_arguments import stock_arguments

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
"""OpenVINO's names of precisions."""
_WEIGHTS = {"weights.safetensors": "diffusion_pytorch_model.safetensors", "config.json": "config.json"}
"""Files of a bundle's network, and what diffusers calls them."""
_PROMPT_TOKENS = 77
"""What its pipelines take from CLIP's tokenizer."""
_PART = "unet"


def evaluator(_kind: str, settings: Mapping[str, Any]) -> OptimumUNet:
    """Returns the UNet over the settings' ``store``, exported in float32 as optimum-intel exports it."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO would send an event
    torch.set_num_threads(settings["threads"])
    folder = TemporaryDirectory(prefix="hidiff-bench-")
    _export(Path(settings["store"]).parent, Path(folder.name), settings["shapes"])
    return OptimumUNet(folder, settings)


def _export(stored: Path, folder: Path, shapes: Mapping[str, Any]) -> None:
    """Writes ``unet/`` as the folder of one of its pipelines has it, whose other parts tell it what is set here."""
    from optimum.exporters.openvino.convert import export_models
    from optimum.exporters.tasks import TasksManager

    source = folder / "source"
    source.mkdir()
    for name, named in _WEIGHTS.items():
        (source / named).symlink_to((stored / name).resolve())
    unet = UNet2DConditionModel.from_pretrained(source, torch_dtype=torch.float32).eval()
    unet.config.model_max_length = _PROMPT_TOKENS
    if "text_embeds" in shapes:
        unet.config.text_encoder_projection_dim = shapes["text_embeds"][-1]
        unet.config.requires_aesthetics_score = False
    kind: dict[str, Any] = {
        "library_name": "diffusers",
        "task": "semantic-segmentation",
        "exporter": "openvino",
        "model_type": "unet",
    }
    made = TasksManager.get_exporter_config_constructor(model=unet, **kind)
    models = {_PART: (unet, made(unet.config, int_dtype="int64", float_dtype="fp32"))}
    export_models(models, folder, [f"{_PART}/openvino_model.xml"], stateful=False)
    (folder / _PART / "config.json").write_text(json.dumps(dict(unet.config), default=str))


class OptimumUNet:
    """Its ``OVModelUnet`` with the sizes fixed, as ``pipeline.reshape`` fixes them.

    Args:
        folder: holds ``unet/`` as optimum-intel wrote it; kept until the process ends.
        settings: ``precision``, ``threads``, ``profile`` and the inputs' ``shapes``.
    """

    def __init__(self, folder: TemporaryDirectory[str], settings: Mapping[str, Any]) -> None:
        from optimum.intel.openvino.modeling_diffusion import OVModelUnet, core

        self._folder = folder
        model = core.read_model(Path(folder.name) / _PART / "openvino_model.xml")
        given = stock_arguments(settings["shapes"])
        shapes = {**given, **given.pop("added_cond_kwargs", {})}
        model.reshape({part: shapes[part.get_any_name()] for part in model.inputs})
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": settings["threads"],
            "INFERENCE_PRECISION_HINT": _HINTS[settings["precision"]],
            "PERF_COUNT": settings["profile"],
        }
        pipeline = SimpleNamespace(ov_config=options, _compile_only=False, model_save_dir=folder.name, _device="CPU")
        self._unet = OVModelUnet(model, pipeline, _PART)
        self._unet.compile()

    def open(self, phase: str) -> None:
        """Does nothing: there is one kind of evaluation."""

    def evaluate(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Returns the prediction."""
        output: NDArray[Any] = self._unet.forward(**stock_arguments(inputs))["out_sample"].numpy()
        return output

    def operators(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, float]:
        """Returns what OpenVINO profiled of an evaluation."""
        request = self._unet.request.create_infer_request()
        given = stock_arguments(inputs)
        request.infer({**given, **given.pop("added_cond_kwargs", {})})
        found: Counter[str] = Counter()
        for node in request.get_profiling_info():
            found[node.node_type] += node.real_time.total_seconds()
        return {name: seconds for name, seconds in found.most_common() if seconds}
