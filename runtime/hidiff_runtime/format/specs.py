"""What a manifest says of single files and graphs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from hidiff_runtime.format.codec import FLOAT32_MAX, INT64_MAX, Fields
from hidiff_runtime.format.paths import path_error
from hidiff_runtime.format.record_codec import FLAT, BundlePath, Float, Form, Shape, decode, whole
from hidiff_runtime.format.regular_files import open_regular
from hidiff_runtime.phases import Phase

DTYPES = {"float32": 4, "int32": 4}
"""Types a graph's inputs and outputs may have, and their bytes; other precisions stay inside the graph."""


Dtype = Annotated[str, Form(lambda fields, name: fields.choice(name, DTYPES))]

CONTROLNET: Literal["controlnet"] = "controlnet"
STEP: Literal["step"] = "step"
UNGUIDED_CONTROLNET: Literal["unguided_controlnet"] = "unguided_controlnet"
UNGUIDED_STEP: Literal["unguided_step"] = "unguided_step"
"""What the two are called beside phases without guidance."""

Network = Literal["text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"]
"""What computes before the first step or after the last, by its graph's name."""

SAMPLE_TENSORS = "samples.safetensors"
"""The reference samples' tensors, beside their index."""


def tensors_beside(index: str) -> str:
    """Returns the path in the bundle of the reference samples' tensors: beside their index."""
    return PurePosixPath(index).with_name(SAMPLE_TENSORS).as_posix()


@dataclass(frozen=True)
class TensorSpec:
    """Name, static shape and type (``float32`` or ``int32``) of a graph's input or output."""

    name: str
    shape: Shape
    dtype: Dtype

    @property
    def bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


def _sha256(fields: Fields, name: str) -> str:
    digest = fields.text(name)
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise fields.wrong(name, "must be 64 hexadecimal digits", digest)
    return digest


@dataclass(frozen=True)
class FileDigest:
    """What a file must be: its size in bytes and the SHA-256 of its content, in hexadecimal."""

    size: Annotated[int, whole(most=INT64_MAX)]  # weight stores are larger than int32 counts
    sha256: Annotated[str, Form(_sha256)]

    @classmethod
    def of(cls, path: Path) -> FileDigest:
        """Returns the record of the regular file at ``path`` as it is now. Raises OSError for anything else."""
        digest = hashlib.sha256()
        size = 0
        with open_regular(path) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
        return cls(size, digest.hexdigest())


def _listed_file(fields: Fields, path: str) -> FileDigest:
    if fault := path_error(path):
        raise fields.wrong(repr(path), fault, path)
    return fields.nested(path, lambda inner: decode(FileDigest, inner))


ListedFile = Annotated[FileDigest, Form(_listed_file)]
"""A file of the bundle, by its path."""


@dataclass(frozen=True)
class GraphRecord:
    """A graph, the engines built from it, and what goes in and out.

    Args:
        graph: path of the portable ONNX graph.
        engines: backend name to the path of its engine.
        inputs: in the graph's order.
        outputs: in the graph's order.
    """

    graph: BundlePath
    engines: Mapping[str, BundlePath]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec | None:
        """Returns the input called ``name``, if the graph has one."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """Returns the output called ``name``, if the graph has one."""
        return next((spec for spec in self.outputs if spec.name == name), None)


@dataclass(frozen=True)
class PhaseRecord(GraphRecord):
    """One phase of the UNet."""

    phase: Phase = field(metadata=FLAT)

    @property
    def residuals(self) -> tuple[TensorSpec, ...]:
        """The inputs that take a ControlNet's residuals: ``down_residual_00``, …, ``mid_residual``."""
        return tuple(spec for spec in self.inputs if spec.name.startswith(("down_residual_", "mid_residual")))


@dataclass(frozen=True)
class TextEncoderRecord(GraphRecord):
    """A text encoder: ``input_ids`` and ``clip_skip`` become ``prompt_embeds``, and ``text_embeds`` where it pools.

    Args:
        name: ``text_encoder`` or ``text_encoder_2``: its folder, and its key among the weights.
        tokenizer: path of the ``tokenizer.json`` that makes its tokens.
        clip_skip: the most layers that can be skipped.
    """

    name: str
    tokenizer: BundlePath
    clip_skip: int

    @property
    def places(self) -> int | None:
        """How many tokens it takes."""
        ids = self.input("input_ids")
        return None if ids is None else ids.shape[-1]


def _preview(fields: Fields, name: str) -> tuple[tuple[float, ...], ...]:
    rows = fields.take(name)
    lists = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 3 for row in rows)
    if not lists or not all(type(value) in (int, float) and abs(value) <= FLOAT32_MAX for row in rows for value in row):
        raise fields.wrong(name, "must be rows of three numbers that float32 can hold", rows)
    return tuple(tuple(map(float, row)) for row in rows)


Preview = Annotated[
    tuple[tuple[float, float, float], ...], Form(_preview, lambda rows: [list(map(float, row)) for row in rows])
]


@dataclass(frozen=True)
class VaeRecord:
    """The VAE, which sees a picture in tiles of one size; a tile may be the whole picture.

    Args:
        decoder: ``latents``, the scaling factor taken out, become an ``image`` from about -1 to 1.
        encoder: an ``image`` from -1 to 1 becomes ``moments``, mean and logarithm of the variance.
        scaling_factor: what latents are multiplied by for the UNet.
        overlap: pixels that neighbouring tiles share; 0 where one tile is the picture.
        preview: five rows of red, green and blue: what four latent channels and a 1 are multiplied by for a preview.
    """

    decoder: GraphRecord
    encoder: GraphRecord
    scaling_factor: Float
    overlap: int
    preview: Preview
