"""A network as an ONNX graph, straight from torch's exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch

from hidiff_export.checkpoints.state_dict import TORCH_DTYPES
from hidiff_export.errors import ExportError
from hidiff_export.graph.onnx_dtypes import signature
from hidiff_export.modules.graph_module import GraphModule
from hidiff_runtime.format.manifest import TensorSpec

OPSET = 23
"""The first opset with an attention operator, which keeps attention whole for every backend to lower its own way."""

_REGISTRATION_LOG = "torch.onnx._internal.exporter._registration"


def capture(module: GraphModule, model_batch: int, *, strict: bool = False) -> ir.Model:
    """Exports a network with static shapes, unoptimized; the weights are the network's own tensors.

    Nothing is computed: tracing runs on tensors without data.

    Args:
        module: the UNet in one phase, or the ControlNet.
        model_batch: latents of one evaluation, the negative prompt's included.
        strict: trace the byte code with TorchDynamo rather than run the module. Gives the same graph, as the tests
            show, and proves that the module has no hidden state, but takes five times as long.

    Raises:
        ExportError: torch cannot export it, or the graph has other inputs and outputs than the network says.
    """
    specs = module.input_specs(model_batch)
    arguments = module.arguments({spec.name: torch.zeros(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in specs})
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(module, (), arguments, strict=strict)
            program = torch.onnx.export(exported, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ExportError(
            f"torch cannot export {module.title}.",
            given=f"{type(error).__name__}: {error}",
            advice="Report this together with the recipe and the versions that 'hidiff-export doctor' shows.",
        ) from error
    assert program is not None  # it is only when a file was written instead
    model = program.model
    _name(model.graph.inputs, specs)
    _name(model.graph.outputs, module.output_specs(model_batch))
    return model


def _name(values: Sequence[ir.Value], specs: Sequence[TensorSpec]) -> None:
    """Gives the graph's inputs or outputs the names of their specs, after checking that they are the ones meant."""
    found = [(shape, dtype) for _, shape, dtype in signature(values)]
    wanted = [(spec.shape, spec.dtype) for spec in specs]
    if found != wanted:
        raise ExportError(
            "The exported graph has other inputs or outputs than meant.", given=f"expected {wanted}, got {found}"
        )
    for value, spec in zip(values, specs, strict=True):
        value.name = spec.name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what torch's exporter says to its own developers from the user."""
    log = logging.getLogger(_REGISTRATION_LOG)
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of operators of torchvision that is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            yield
    finally:
        log.setLevel(level)
