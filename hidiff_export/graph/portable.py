"""The portable graph of a network: what every backend builds from."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.errors import ExportError
from hidiff_export.graph.capture import capture
from hidiff_export.graph.declined import note_declined
from hidiff_export.graph.passes.base import RewritePass
from hidiff_export.graph.passes.collect_constants import CollectConstants
from hidiff_export.graph.passes.externalize_weights import ExternalizeWeights
from hidiff_export.graph.passes.fold_constants import FoldConstants
from hidiff_export.graph.passes.name_by_module import NameByModule
from hidiff_export.graph.passes.narrow_indices import NarrowIndices
from hidiff_export.graph.passes.nearest_to_gather import NearestToGather
from hidiff_export.graph.passes.remove_no_ops import RemoveNoOps
from hidiff_export.modules.graph_module import GraphModule
from hidiff_runtime.version import __version__


def write_graph(module: GraphModule, model_batch: int, store: WeightStore, path: Path) -> None:
    """Exports a network to ``path``, beside the weight store that the graph points into.

    The file is a function of the arguments and of the tools' versions alone.

    Args:
        module: the UNet in one phase, or the ControlNet; its weights those of the store.
        model_batch: latents of one evaluation, the negative prompt's included.
        store: in the same folder as ``path``.
        path: of the ONNX file.

    Raises:
        ExportError: torch cannot export the network, or a pass found something wrong.
        OSError: the file cannot be written.
    """
    model = capture(module, model_batch)
    run_passes(model, portable_passes(store, module.network), path.name)
    save(model, path)


def portable_passes(store: WeightStore, network: str) -> ir.passes.Sequential:
    """Lists the passes from what the exporter gives to the portable graph.

    Args:
        store: of the network's weights.
        network: name of the attribute under which the exported module holds the network.
    """
    prefix = f"{network}."
    weights = {prefix + name for name in store.names()}
    return ir.passes.Sequential(
        FoldConstants(weights),
        common.IdentityEliminationPass(),
        NarrowIndices(),
        NearestToGather(),
        RemoveNoOps(),
        CollectConstants(weights),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        ExternalizeWeights(store, prefix),
        NameByModule(network),
        common.ClearMetadataAndDocStringPass(),
        common.RemoveUnusedOpsetsPass(),
    )


def run_passes(model: ir.Model, passes: ir.passes.Sequential, name: str = "") -> None:
    """Runs passes in place, and notes what they decline: see `hidiff_export.graph.declined`.

    Args:
        model: the graph.
        passes: to be run in their order.
        name: of the file that the graph is for; by default the graph's own.

    Raises:
        ExportError: one fails.
    """
    try:
        passes(model)
    except (ir.passes.PassError, ir.passes.InvariantError) as error:
        raise ExportError(
            "A graph pass failed.",
            given=" ".join(str(cause) for cause in _causes(error)),
            advice="Report this together with the recipe and the versions that 'hidiff-export doctor' shows.",
        ) from error
    for done in passes.passes:
        if isinstance(done, RewritePass):
            note_declined(name or model.graph.name or "graph", type(done).__name__, done.declined.values())


def _causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_causes(error.__cause__)]


def load_graph(path: Path) -> ir.Model:
    """Reads a graph, whose weights may lie in a file that has several names.

    onnx-ir refuses such files where the first value is read, as possible links to what a graph should not see. But
    `cp -al`, package stores and Triton repositories of a bundle leave them, and a bundle's files are compared with its
    manifest. All else that it refuses stays refused: symbolic links, and places outside the graph's folder.
    """
    model = ir.load(path)
    values = model.graph.initializers.values()
    tensors = [value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor)]
    beside = {location for location in {str(tensor.location) for tensor in tensors} if _is_beside(path, location)}
    for tensor in tensors:
        if str(tensor.location) in beside:
            tensor.base_dir = _CheckedFolder(path.parent)
    return model


def _is_beside(graph: Path, location: str) -> bool:
    return Path(location).name == location and not (graph.parent / location).is_symlink()


class _CheckedFolder(os.PathLike[str]):
    """A folder that says it is empty, by which onnx-ir knows one whose files the caller has checked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __fspath__(self) -> str:
        return str(self._folder)

    def __bool__(self) -> bool:
        return False


def save(model: ir.Model, path: Path) -> None:
    """Writes a graph; weights stay where they are."""
    model.producer_name = "hidiff-export"
    model.producer_version = __version__
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
