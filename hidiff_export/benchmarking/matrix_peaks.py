"""The most operations a second that matrix products reach here, by precision: what no UNet can be faster than."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch

from hidiff_export.child_process import Channel, run_child
from hidiff_export.errors import EngineError
from hidiff_runtime.onnxruntime_import import onnxruntime

SIDES = (1024, 2048)
"""Of square matrices: some processors are fastest where an operand fits the cache."""
_SECONDS = 1.0
"""For which each product is repeated."""

Product = Callable[[], object]


def main() -> None:
    """Answers one request, for so many ``threads``, with operations a second by precision."""
    channel = Channel()
    threads = channel.request()["threads"]
    torch.set_num_threads(threads)
    found: dict[str, float] = {}
    for precision, side, product in _products(threads):
        found[precision] = max(found.get(precision, 0.0), 2 * side**3 / _fastest(product))
    channel.send("done", peaks=found)


def measured_peaks(threads: int, environment: Mapping[str, str]) -> dict[str, float]:
    """Returns the most operations a second by precision, measured in a process of its own.

    Raises:
        EngineError: that process failed.
    """
    ended = run_child(["-m", __name__], {"threads": threads}, environment=environment)
    if ended.answer.get("event") != "done":
        raise EngineError("Matrix products could not be timed.", given=ended.words, advice="Add --no-peaks.")
    peaks: dict[str, float] = ended.answer["peaks"]
    return peaks


def _products(threads: int) -> Iterator[tuple[str, int, Product]]:
    """Yields precision, side and product: PyTorch's of float32 and bfloat16, ONNX Runtime's of int8."""
    for side in SIDES:
        for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            yield precision, side, partial(torch.mm, *(torch.randn(side, side).to(dtype) for _ in range(2)))
        if (integers := _integer_product(side, threads)) is not None:
            yield "int8", side, integers


def _fastest(product: Product) -> float:
    product()
    least, ends = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < ends:
        began = time.perf_counter()
        product()
        least = min(least, time.perf_counter() - began)
    return least


def _integer_product(side: int, threads: int) -> Product | None:
    """Returns a product of uint8 with constant int8, as quantized layers have it; None without ONNX Runtime."""
    try:
        library = onnxruntime()
    except ImportError:
        return None
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.integers(-127, 128, (side, side)).astype(np.int8), "weight")
    node = helper.make_node("MatMulInteger", ["given", "weight"], ["product"])
    takes = helper.make_tensor_value_info("given", TensorProto.UINT8, [side, side])
    gives = helper.make_tensor_value_info("product", TensorProto.INT32, [side, side])
    graph = helper.make_graph([node], "product", [takes], [gives], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    session = library.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = random.integers(0, 256, (side, side)).astype(np.uint8)
    return partial(session.run, ["product"], {"given": given})


if __name__ == "__main__":
    main()
