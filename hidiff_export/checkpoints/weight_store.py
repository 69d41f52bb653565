"""The weight store: a model's tensors, once, in one precision, which every graph of the bundle points into.

It is a safetensors file under the model's own names, so diffusers reads it too. Graphs refer to a tensor by the offset
and length that `WeightStore.reference` gives; `WeightStore.state_dict` gives the same bytes to PyTorch without a copy.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from hidiff_export.checkpoints.state_dict import TORCH_DTYPES, map_tensors, shapes_of
from hidiff_export.errors import BundleError, CheckpointError, StorageError
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.format.dtypes import BY_NAME
from hidiff_runtime.format.safetensors import SafetensorsFile, SafetensorsWriter, TensorInfo, TensorLayout

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""

PRECISIONS: Mapping[Precision, tuple[str, torch.dtype]] = {
    precision: (BY_NAME[precision.value].tag, TORCH_DTYPES[precision.value])
    for precision in (Precision.FLOAT32, Precision.FLOAT16, Precision.BFLOAT16)
}
"""Each precision's safetensors tag and torch dtype."""

_WORKERS = 2


class WeightStore:
    """A weight store on disk. Make one with `write`, or `open` one that is there."""

    def __init__(self, file: SafetensorsFile, precision: Precision) -> None:
        self.path = file.path
        self.precision = precision
        self._file = file

    @classmethod
    def write(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        path: Path,
        precision: Precision,
        progress: Progress | None = None,
    ) -> WeightStore:
        """Writes a state dict in one precision, whole or not at all.

        Tensors are taken, rounded to the precision and written one by one, a few at a time in memory. The file's bytes
        depend on the names, the values and the precision alone. Data begins at a page; what alignment each tensor has
        is said at `SafetensorsWriter`.

        Args:
            state_dict: floating-point tensors by name; a lazy one is never held whole.
            path: where the store goes; an older one is replaced at the end.
            precision: of the stored tensors.
            progress: told how far the writing is.

        Raises:
            CheckpointError: for a NaN, an infinity, a value beyond the precision's range or an integer tensor.
            StorageError: when there is no room, or the disk refuses.
        """
        tag, dtype = PRECISIONS[precision]
        layouts = {name: TensorLayout(tag, shape) for name, shape in shapes_of(state_dict).items()}
        total = sum(layout.nbytes for layout in layouts.values())
        _check_room(path, total)
        done = 0
        with SafetensorsWriter(path, layouts, {"format": "pt"}) as writer:
            for name, bits in _ahead(writer.order, partial(_bits, state_dict, dtype)):
                writer.add(name, bits)
                done += layouts[name].nbytes
                if progress is not None:
                    progress(done, total)
        return cls(SafetensorsFile.open(path), precision)

    @classmethod
    def open(cls, path: Path) -> WeightStore:
        """Opens a store. Raises BundleError when the file is missing, damaged or no weight store."""
        file = SafetensorsFile.open(path)
        tags = {file.info(name).dtype for name in file}
        found = [precision for precision, (tag, _) in PRECISIONS.items() if {tag} == tags]
        if not found:
            raise BundleError(
                "A weight store holds one floating-point precision; this file does not.",
                given=f"{path}: {', '.join(sorted(tags)) or 'no tensor'}",
                advice="Build the bundle again.",
            )
        return cls(file, found[0])

    def names(self) -> tuple[str, ...]:
        """Returns the tensors' names in the order of their data."""
        return self._file.names()

    def reference(self, name: str) -> TensorInfo:
        """Returns where a tensor lies: `offset` and `nbytes` are what ONNX external data calls offset and length."""
        return self._file.info(name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns every tensor, mapped from the file without a copy.

        Pages come in from the disk as they are used and belong to the page cache. A tensor that is written to gets
        memory of its own; the file never changes.
        """
        return map_tensors(self._file, self._file.names())


def _bits(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype, name: str) -> NDArray[Any]:
    """Returns a tensor in the store's precision, as an array that the writer takes; bfloat16 as uint16."""
    tensor = state_dict[name].detach()
    if not tensor.is_floating_point():
        raise CheckpointError(
            "A weight is not a floating-point number.",
            given=f"{name}: {tensor.dtype}",
            advice="Save the checkpoint in float32, float16 or bfloat16; quantized ones are not taken.",
        )
    cast = tensor.to(dtype).contiguous()
    if not _finite(cast):
        _refuse(name, tensor, dtype)
    return (cast.view(torch.uint16) if dtype is torch.bfloat16 else cast).numpy()


def _finite(tensor: torch.Tensor) -> bool:
    # One pass and no temporary, twenty times faster than isfinite: the extremes are finite only if all values are.
    return tensor.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def _refuse(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if _finite(tensor):
        largest = float(tensor.abs().max())
        raise CheckpointError(
            f"A weight is beyond the range of {str(dtype).removeprefix('torch.')}.",
            given=f"{name}: magnitude {largest:g}, the largest possible is {torch.finfo(dtype).max:g}",
            advice="Choose precision float32 or bfloat16 in the recipe.",
        )
    count = int((~torch.isfinite(tensor)).sum())
    raise CheckpointError(
        "A weight holds NaN or an infinity.",
        given=f"{name}: {count} of {tensor.numel()} values",
        advice="The checkpoint is broken (an overflow while training or converting it): get it from its source again.",
    )


def _ahead(names: tuple[str, ...], make: Callable[[str], NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Makes arrays in threads, a few ahead of their use, and yields them in order."""
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="weights")
    pending: deque[tuple[str, Future[NDArray[Any]]]] = deque()
    try:
        for name in names:
            pending.append((name, pool.submit(make, name)))
            if len(pending) > _WORKERS:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_room(path: Path, nbytes: int) -> None:
    """Refuses before any work when the disk cannot hold the file, which may take minutes to make."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise StorageError(
            "The folder for the weights cannot be written to.",
            given=f"{path.parent}: {error.strerror}",
            advice="Choose a folder that exists and can be written to.",
        ) from error
    if free < nbytes:
        raise StorageError(
            "The disk has no room for the weights.",
            given=f"{path.parent}: {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} GB needed",
            advice="Free space on the disk, or choose a folder on another one.",
        )
