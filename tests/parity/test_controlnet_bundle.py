"""A bundle with a ControlNet beside diffusers' own ControlNet pipeline under HiDiffusion.

The build is a real one and the ControlNet's engine is ONNX Runtime's. The UNet's phases are PyTorch itself: what they
are worth as graphs is measured elsewhere, and exporting them would take minutes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch.nn import functional

import hidiff_runtime
from hidiff_export import apply_hidiffusion
from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build as build_network
from hidiff_export.checkpoints.load import load
from hidiff_export.compiler.compile import build
from hidiff_export.compiler.stages import graphs
from hidiff_export.compiler.stages.stage import Report
from hidiff_export.engines import onnxruntime
from hidiff_export.families.family import Task
from hidiff_export.graph.portable import write_graph
from hidiff_export.modules.controlnet import ControlNetModule
from hidiff_export.modules.phase_unet import PhaseUNet
from hidiff_export.recipe import Recipe
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_runtime.backends.onnxruntime import OnnxRuntimeBackend
from hidiff_runtime.denoising.controlnet import nearest
from hidiff_runtime.format.manifest import FileDigest, Manifest
from hidiff_runtime.verification.comparison import Metrics
from hidiff_runtime.verification.reference_samples import Drawn
from tests.export.verification.torch_bundle import TorchBackend

# The ControlNet sees latents of 128 at the longer side: this makes that a downscale, and keeps it cheap.
HEIGHT, WIDTH = 128, 1536
STEPS, SEED, GUIDANCE, SCALE = 4, 5, 5.0, 0.8
RECIPE = Recipe.from_dict(
    {
        "family": "sdxl",
        "task": "controlnet",
        "source": "random:0",
        "controlnet": "random:1",
        "unet_width": "tiny",
        "text": False,
        "vae": False,
        "height": HEIGHT,
        "width": WIDTH,
        "sampler": "euler",
        "steps": [STEPS],
        "precision": "float32",
    }
)
FILES = ("config.json", "controlnet.onnx", "controlnet.onnxruntime.onnx", "weights.safetensors")


class Silent:
    @contextmanager
    def stage(self, _title: str, *, reused: bool) -> Iterator[Report]:
        assert not reused
        yield lambda _done, _total, _note: None

    def notice(self, text: str) -> None:
        raise AssertionError(text)


class Backend(TorchBackend):
    """PyTorch for the phases, ONNX Runtime for the ControlNet."""

    def open(self, engine: Path, weights: Mapping[str, Path], record: Any) -> Any:
        if engine.parent.name == "controlnet":
            return OnnxRuntimeBackend().device({"device": "cpu"}).__enter__().open(engine, weights, record)
        return super().open(engine, weights, record)


def write_stub(module: Any, model_batch: int, store: Any, path: Path) -> None:
    """The ControlNet's graph, and of a phase no more than its name."""
    if isinstance(module, PhaseUNet):
        path.write_text(json.dumps({"kind": module.phase.kind.value, "control": module.phase.control}))
    else:
        write_graph(module, model_batch, store, path)


LOWER = onnxruntime.lower


def lower_or_copy(graph: Path, engine: Path) -> None:
    """The engine of the ControlNet, and of a phase no more than its stub."""
    if graph.parent.name == "controlnet":
        LOWER(graph, engine)
    else:
        engine.write_bytes(graph.read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("controlnet") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "write_graph", write_stub)
        patch.setattr(onnxruntime, "lower", lower_or_copy)
        return build(RECIPE, output, Silent()).folder


def tensors(seed: int = 3) -> dict[str, torch.Tensor]:
    """Prompt and control image."""
    generator = torch.Generator().manual_seed(seed)
    config = RECIPE.unet_config()
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    given = {}
    for name, shape in (("prompt_embeds", (1, 77, config["cross_attention_dim"])), ("text_embeds", (1, pooled))):
        given[name] = torch.randn(shape, generator=generator)
        given[f"negative_{name}"] = torch.randn(shape, generator=generator)
    return {**given, "control_image": torch.rand(1, 3, HEIGHT, WIDTH, generator=generator)}


def stored_networks() -> tuple[Any, Any]:
    """UNet and ControlNet from the recipe's sources, not from the bundle."""
    assert RECIPE.controlnet is not None
    unet = build_network(
        Component.UNET, *load(Component.UNET, RECIPE.source, RECIPE.family, RECIPE.task, RECIPE.unet_width)[:2]
    )
    return unet, build_network(
        Component.CONTROLNET,
        *load(Component.CONTROLNET, RECIPE.controlnet, RECIPE.family, Task.CONTROLNET, RECIPE.unet_width)[:2],
    )


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    """The latents that diffusers' own pipeline ends with."""
    unet, controlnet = stored_networks()
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    missing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.StableDiffusionXLControlNetPipeline(
        **missing,
        unet=unet,
        controlnet=controlnet,
        scheduler=build_scheduler("euler", config),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    given = tensors()
    with apply_hidiffusion(pipe, rule=RECIPE.phase_rule(), family=RECIPE.family, task=RECIPE.task):
        latents = pipe(
            prompt_embeds=given["prompt_embeds"],
            negative_prompt_embeds=given["negative_prompt_embeds"],
            pooled_prompt_embeds=given["text_embeds"],
            negative_pooled_prompt_embeds=given["negative_text_embeds"],
            image=given["control_image"],
            controlnet_conditioning_scale=SCALE,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images
    return np.asarray(latents)


def snr_db(reference: np.ndarray, candidate: np.ndarray) -> float:
    return Metrics.of(reference, candidate).snr_db


def test_the_bundle_holds_the_controlnet_once(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest.controlnet is not None
    assert sorted(path.name for path in (folder / "controlnet").iterdir()) == sorted(FILES)
    for name in FILES:
        path = f"controlnet/{name}"
        assert manifest.files[path] == FileDigest.of(folder / path)
    assert manifest.weights == {name: f"{name}/weights.safetensors" for name in ("unet", "controlnet")}
    size = (folder / "controlnet/weights.safetensors").stat().st_size
    assert manifest.files["controlnet/controlnet.onnx"].size < size / 2


def test_a_whole_run_is_diffusers_own(folder: Path, expected: np.ndarray) -> None:
    given = {name: tensor.numpy() for name, tensor in tensors().items()}
    run: dict[str, Any] = {"steps": STEPS, "seed": SEED, "guidance_scale": GUIDANCE}
    with hidiff_runtime.open(folder, backend=Backend(RECIPE)) as bundle:
        phases = [bundle.manifest.rule.phase_at(step, STEPS) for step in range(STEPS)]
        assert [phase.control for phase in phases] == [True, True, True, False]
        denoise = bundle.denoiser().denoise
        assert snr_db(expected, denoise(**given, **run, conditioning_scale=SCALE)) > 60
        # The same comparison fails for another scale and for another picture.
        assert snr_db(expected, denoise(**given, **run, conditioning_scale=SCALE * 0.9)) < 60
        given["control_image"] = 1 - given["control_image"]
        assert snr_db(expected, denoise(**given, **run, conditioning_scale=SCALE)) < 60


@pytest.mark.parametrize("name", ["controlnet.onnx", "controlnet.onnxruntime.onnx"])
def test_the_graph_computes_what_pytorch_does(folder: Path, name: str) -> None:
    _, controlnet = stored_networks()
    module = ControlNetModule(controlnet, RECIPE.latent_height, RECIPE.latent_width)
    record = Manifest.read(folder).controlnet
    assert record is not None
    assert record.inputs == module.input_specs(RECIPE.model_batch)
    inputs = {spec.name: Drawn(seed, spec.shape, 1.0).array() for seed, spec in enumerate(record.inputs)}
    inputs["timestep"] = np.array([481], np.float32)
    inputs["control_image"] = np.abs(inputs["control_image"]).clip(max=1)
    with torch.inference_mode():
        residuals = module(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    weights = {"controlnet": folder / "controlnet/weights.safetensors"}
    path = folder / "controlnet" / name
    with OnnxRuntimeBackend().device({}) as device, device.open(path, weights, record) as session:
        found = session.run(inputs)
        other = session.run({**inputs, "timestep": np.array([482], np.float32)})
    assert list(found) == [spec.name for spec in record.outputs]
    for expected, got, wrong in zip(residuals, found.values(), other.values(), strict=True):
        assert snr_db(expected.numpy(), got) > 80
        # All but the first residual, which is the input convolution's, depend on the timestep.
        assert got is found["down_residual_00"] or snr_db(expected.numpy(), wrong) < 80


def test_the_recorded_samples_hold(folder: Path) -> None:
    with hidiff_runtime.open(folder, backend=Backend(RECIPE)) as bundle:
        report = hidiff_runtime.check(bundle)
    assert report.ok, report.render()


@pytest.mark.parametrize(("size", "resized"), [((128, 1536), (64, 1024)), ((40, 56), (56, 40)), ((7, 9), (7, 18))])
def test_the_picture_is_resized_as_torch_does(size: tuple[int, int], resized: tuple[int, int]) -> None:
    picture = torch.arange(2 * 3 * size[0] * size[1], dtype=torch.float32).reshape(2, 3, *size)
    assert np.array_equal(nearest(picture.numpy(), *resized), functional.interpolate(picture, resized).numpy())
