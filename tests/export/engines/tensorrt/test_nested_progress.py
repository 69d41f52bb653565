"""Nested phases as one fraction, and advice by the library's words."""

from __future__ import annotations

import json

import pytest

from hidiff_export.engines.tensorrt.error_advice import REPORT, advice_for
from hidiff_export.engines.tensorrt.nested_progress import NestedProgress
from hidiff_export.engines.tensorrt.worker_protocol import BuildRequest, Initializer
from hidiff_runtime.format.manifest import TensorSpec


def test_steps_of_inner_phases_are_parts_of_the_outer_step() -> None:
    seen: list[tuple[float, str]] = []
    progress = NestedProgress(lambda *shown: seen.append(shown))
    progress.start("build", 2)
    progress.start("clone", 4)
    for step in range(4):
        progress.step("clone", step)
    progress.finish("clone")
    progress.step("build", 0)
    progress.start("optimize", 2)
    progress.step("optimize", 0)
    progress.finish("optimize")
    progress.step("build", 1)
    assert [fraction for fraction, _ in seen] == [0, 0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.75, 1]
    assert [note for _, note in seen[-3:]] == ["optimize", "optimize", "build"]


def test_what_cannot_be_seen_is_not_shown() -> None:
    seen: list[tuple[float, str]] = []
    progress = NestedProgress(lambda *shown: seen.append(shown))
    progress.start("build", 10_000)
    for step in range(10_000):
        progress.step("build", step)
    assert len(seen) < 250
    assert seen[-1][0] > 0.99


def test_a_phase_that_starts_again_does_not_go_back() -> None:
    seen: list[float] = []
    progress = NestedProgress(lambda fraction, _note: seen.append(fraction))
    for _ in range(2):
        progress.start("reformat", 1)
        progress.step("reformat", 0)
        progress.finish("reformat")
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 536871295 bytes.)", "three times the weights"),
        ("Unexpected exception std::bad_alloc", "three times the weights"),
        ("conv_in: tensor volume exceeds 2^31-1", "smaller width, height or batch"),
        ("Attention operation was not supported by a dedicated kernel.", "no attention kernel"),
        (
            "Error Code 4: Invalid Graph [timing cache]: Timing cache has a wrong header",
            "delete ~/.cache/hidiff-export",
        ),
        ("(cudaError 35: CUDA driver version is insufficient for CUDA runtime version)", "no NVIDIA driver here"),
        ("(cudaError 100: no CUDA-capable device is detected)", "no NVIDIA GPU here"),
        ("must have same input types. But they are of types Half and Float.\ncudaError 35", "mixes precisions"),
        ("something new", REPORT),
    ],
)
def test_known_words_have_advice(words: str, advice: str) -> None:
    assert advice in advice_for(words)


def test_a_request_survives_its_journey() -> None:
    request = BuildRequest(
        graph="a.onnx",
        weights="w",
        initializers=(Initializer("w", 64, 8),),
        targets=("sm89",),
        inputs=(TensorSpec("a", (1, 2), "float32"),),
        outputs=(TensorSpec("b", (), "bool"),),
        plan="a.plan",
        layers="a.json",
        timing_cache="t",
    )
    assert BuildRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
