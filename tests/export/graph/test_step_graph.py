"""The step graph in ONNX Runtime beside the host's own guidance and sampler, over whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.graph.step_graph import write_step_graph
from hidiff_export.recipe.field_types import SamplerName
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.denoising.conditioning import guided
from hidiff_runtime.format.specs import GraphRecord, TensorSpec
from hidiff_runtime.format.step_graph import padded_rows, step_inputs, step_outputs
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.torch_rng import TorchGenerator

SLOTS, STEPS = 4, 9
SIZE = (6, 8)
SHAPE = (2, 4, *SIZE)
CONFIG = default_scheduler(Family.SDXL)[1]
KEPT = ("next_sample", "next_state", "latents", "next_unsound")
UNSOUND = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def record(*, guidance: bool = True, inpainting: bool = False, slots: int = SLOTS, rescale: bool = True) -> GraphRecord:
    rows = SHAPE[0] * (1 + guidance)
    noise_pred = TensorSpec("noise_pred", (rows, 4, *SIZE), "float32")
    latents = TensorSpec("latents", (rows, 9 if inpainting else 4, *SIZE), "float32")
    due = (SHAPE[0], noise_pred, latents, slots)
    return GraphRecord("step/step.onnx", {}, step_inputs(*due, rescale=rescale), step_outputs(*due))


class Step:
    """The graph of a record, run by ONNX Runtime."""

    def __init__(self, kind: GraphRecord, path: Path) -> None:
        write_step_graph(kind, path)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = (self._session.get_inputs(), self._session.get_outputs())
        for values, specs in zip(found, (kind.inputs, kind.outputs), strict=True):
            assert {value.name: tuple(value.shape) for value in values} == {spec.name: spec.shape for spec in specs}

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, inputs), strict=True))


def number(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def network(latents: np.ndarray) -> np.ndarray:
    """Some function of what a UNet takes, for errors to go round and round in."""
    halves = len(latents) // SHAPE[0]
    return np.concatenate([np.tanh(latents[:2] * (1 + half) + 0.1) for half in range(halves)]).astype(np.float32)


def runs(
    step: Step,
    table: SamplerTable,
    scale: float | None,
    *,
    rescale: tuple[float, float] = (0.0, 0.0),
    late: int = 0,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Sample of the host and of the graph after each evaluation.

    Args:
        rescale: of guidance, the host's and the graph's.
        late: shifts the graph's rows by evaluations.
    """
    schedule = table.schedule(STEPS, eta=0.7 if table.eta else 0.0)
    generator = TorchGenerator(3)
    state = schedule.start(generator.randn(SHAPE))
    repeat = 1 if scale is None else 2
    sample, states, unsound = state.latents, np.zeros((SLOTS, *SHAPE), np.float32), np.zeros(3, np.int32)
    latents = np.concatenate([state.model_input()] * repeat)
    for index, evaluation in enumerate(schedule.evaluations):
        drawn = generator.randn(SHAPE) if state.draws_noise else None
        host = guided(network(np.concatenate([state.model_input()] * repeat)), scale, rescale[0])
        state.advance(host, drawn)
        following = schedule.evaluations[min(index + 1, len(schedule) - 1)]
        rows = schedule.evaluations[max(index - late, 0)].rows
        found = step(
            noise_pred=network(latents),
            sample=sample,
            noise=np.zeros(SHAPE, np.float32) if drawn is None else drawn,
            state=states,
            rows=padded_rows(rows, SLOTS),
            input_scale=number(following.input_scale),
            unsound=unsound,
            **({} if scale is None else {"guidance_scale": number(scale), "guidance_rescale": number(rescale[1])}),
        )
        assert evaluation.draws_noise == (drawn is not None)
        sample, states, latents, unsound = (found[name] for name in KEPT)
        assert unsound.tolist() == [index + 1, 0, 0]
        yield state.latents, sample


def furthest(pairs: Iterator[tuple[np.ndarray, ...]]) -> float:
    """The largest difference after any evaluation, in parts of the largest value."""
    return max(float(np.abs(host - graph).max() / np.abs(host).max()) for host, graph in pairs)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    return Step(record(), tmp_path_factory.mktemp("step") / "step.onnx")


@pytest.mark.parametrize("sampler", SamplerName)
def test_whole_runs_are_the_hosts(step: Step, sampler: SamplerName) -> None:
    table = probe(sampler.value, CONFIG, (STEPS,))
    assert furthest(runs(step, table, 3.0)) < 5e-6
    assert furthest(runs(step, table, 3.0, late=1)) > 0.1


@pytest.mark.parametrize("rescale", [0.25, 0.7, 1.0])
def test_whole_runs_with_rescaled_guidance_are_the_hosts(step: Step, rescale: float) -> None:
    table = probe("dpmpp_2m", CONFIG, (STEPS,))
    assert furthest(runs(step, table, 3.0, rescale=(rescale, rescale))) < 5e-6
    assert furthest(runs(step, table, 3.0, rescale=(rescale, 0.0))) > 1e-2
    assert furthest(runs(step, table, 0.9, rescale=(rescale, 0.0))) < 5e-6


def once(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a step that adds the guided noise to the sample."""
    random = np.random.default_rng(0)
    noise_pred, sample = (random.standard_normal((4, *SHAPE[1:])).astype(np.float32) for _ in range(2))
    given = {
        "noise_pred": noise_pred * np.array([1, 2, 3, 5], np.float32)[:, None, None, None],
        "sample": sample[:2],
        "noise": np.zeros(SHAPE, np.float32),
        "state": np.zeros((SLOTS, *SHAPE), np.float32),
        "rows": padded_rows(np.array([[1.0, 1.0, 0.0]]), SLOTS),
        "input_scale": number(0.5),
        "unsound": np.zeros(3, np.int32),
        "guidance_scale": number(4.0),
    }
    return {**given, **changes}


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_guidance_is_rescaled_as_diffusers_does_it(step: Step, rescale: float) -> None:
    given = once(guidance_rescale=number(rescale))
    negative, positive = torch.from_numpy(given["noise_pred"]).chunk(2)
    due = rescale_noise_cfg(negative + 4.0 * (positive - negative), positive, rescale).numpy()
    found = step(**given)["next_sample"] - given["sample"]
    assert np.abs(found - due).max() < 2e-6 * np.abs(due).max()
    together = negative + 4.0 * (positive - negative)  # one deviation for all pictures is another result
    wrong = (rescale * together * (positive.std() / together.std()) + (1 - rescale) * together).numpy()
    assert np.abs(wrong - due).max() > 1e-3 * np.abs(due).max()


def test_a_rescale_of_0_is_to_the_bit_what_it_is_without(step: Step, tmp_path: Path) -> None:
    older = Step(record(rescale=False), tmp_path / "older.onnx")
    due, found = older(**once()), step(**once(guidance_rescale=number(0)))
    assert all(np.array_equal(found[name], due[name]) for name in KEPT)
    assert not np.array_equal(step(**once(guidance_rescale=number(0.1)))["next_sample"], due["next_sample"])


def test_without_guidance(tmp_path: Path) -> None:
    table = probe("euler", CONFIG, (STEPS,))
    assert furthest(runs(Step(record(guidance=False), tmp_path / "step.onnx"), table, None)) < 5e-6


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_up_to_a_scale_of_one_the_positive_half_counts_alone(step: Step, scale: float) -> None:
    random = np.random.default_rng(0)
    noise_pred, sample, other = (random.standard_normal((4, *SHAPE[1:])).astype(np.float32) for _ in range(3))
    given = {
        "sample": sample[:2],
        "noise": np.zeros(SHAPE, np.float32),
        "state": np.zeros((SLOTS, *SHAPE), np.float32),
        "rows": padded_rows(np.array([[1.0, 1.0, 0.0]]), SLOTS),
        "input_scale": number(0.5),
        "unsound": np.zeros(3, np.int32),
        "guidance_scale": number(scale),
        "guidance_rescale": number(0.7),
    }
    first = step(noise_pred=noise_pred, **given)
    assert np.array_equal(first["next_sample"], sample[:2] + noise_pred[2:])
    second = step(noise_pred=np.concatenate([other[:2], noise_pred[2:]]), **given)
    assert np.array_equal(first["next_sample"], second["next_sample"])
    assert not np.array_equal(step(noise_pred=other, **given)["next_sample"], first["next_sample"])


def test_inpainting_puts_its_channels_behind(tmp_path: Path) -> None:
    kind = record(inpainting=True, slots=1)
    random = np.random.default_rng(1)
    given = {spec.name: random.standard_normal(spec.shape).astype(spec.dtype) for spec in kind.inputs}
    given["guidance_scale"] = number(3)
    found = Step(kind, tmp_path / "step.onnx")(**given)
    assert np.array_equal(found["latents"][:, 4:], given["channels"])
    for half in np.split(found["latents"][:, :4], 2):
        assert np.array_equal(half, found["next_sample"] * given["input_scale"])


@pytest.mark.parametrize("values", [["nan"], ["inf", "-inf"], ["nan", "inf", "inf"]], ids=" ".join)
def test_what_is_not_finite_is_counted(step: Step, values: list[str]) -> None:
    given = {spec.name: np.ones(spec.shape, spec.dtype) for spec in record().inputs}
    given["unsound"] = np.array([6, 0, 0], np.int32)
    spoilt = given["noise_pred"].copy()
    for index, name in enumerate(values):
        spoilt[index % 4, index, 1, 2] = UNSOUND[name]
    assert step(**given)["next_unsound"].tolist() == [7, 0, 0]
    assert step(**{**given, "noise_pred": spoilt})["next_unsound"].tolist() == [7, 7, len(values)]
    given["unsound"] = np.array([8, 7, 5], np.int32)  # the first time counts
    assert step(**{**given, "noise_pred": spoilt})["next_unsound"].tolist() == [9, 7, 5]
    assert step(**given)["next_unsound"].tolist() == [9, 7, 5]


@pytest.mark.needs("tensorrt-rtx")
@pytest.mark.parametrize("kind", [record(), record(guidance=False, slots=1), record(inpainting=True, slots=2)])
def test_tensorrt_rtx_builds_it(tmp_path: Path, kind: GraphRecord) -> None:
    import tensorrt_rtx as trt

    write_step_graph(kind, tmp_path / "step.onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tmp_path / "step.onnx")), parser.get_error(0).desc()
    for count, at, specs in (
        (network.num_inputs, network.get_input, kind.inputs),
        (network.num_outputs, network.get_output, kind.outputs),
    ):
        found = {at(index).name: (tuple(at(index).shape), at(index).dtype) for index in range(count)}
        types = {"float32": trt.float32, "int32": trt.int32}
        assert found == {spec.name: (spec.shape, types[spec.dtype]) for spec in specs}
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
