"""Opening one file of a checkpoint, and saying what it is where it is no safetensors file with weights in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.contents import UNET, kind_of
from hidiff_export.errors import BundleError, CheckpointError
from hidiff_runtime.format.safetensors import CHECKPOINT_HEADER_LIMIT, SafetensorsFile

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
"""Endings of files that torch.save wrote."""

OTHER_FORMATS = {
    ".gguf": "a GGUF file, which is quantized",
    ".msgpack": "a Flax checkpoint",
    ".h5": "a TensorFlow checkpoint",
    ".onnx": "an ONNX graph",
    ".part": "an unfinished download",
    ".crdownload": "an unfinished download",
    ".incomplete": "an unfinished download",
    ".aria2": "an unfinished download",
}
"""Endings of files that people take for checkpoints, and what they are."""

_HALF = (
    "Take the checkpoint's float16 or bfloat16 file instead; int8 and fp8 engines are made by the recipe's precision."
)
_LFS = b"version https://git-lfs.github.com/spec/"
_START = 512

_QUANTIZED = (
    (re.compile(r"\.(absmax|quant_map|nested_absmax)$|\.quant_state\."), "bitsandbytes' 4 bits (nf4 or fp4)"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes' 8 bits"),
    (re.compile(r"\.weight\._(data|scale)$"), "optimum-quanto's"),
    (re.compile(r"\.(qweight|qzeros|wscales|smooth_factor)$"), "packed integers (SVDQuant, GPTQ or AWQ)"),
    (re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale)$"), "fp8 with scales"),
)


def open_weights(path: Path) -> SafetensorsFile:
    """Opens a safetensors file of a checkpoint.

    Raises:
        CheckpointError: it is missing, cut short, quantized, or something else altogether, which the message names.
    """
    refuse_lfs_pointer(path)
    if wrong := _wrong_content(path, _read_start(path)):
        raise wrong
    try:
        return SafetensorsFile.open(path, CHECKPOINT_HEADER_LIMIT)
    except BundleError as error:
        if quantized := _quantized_types(path):
            raise quantized from error
        raise CheckpointError(error.summary, given=error.given, advice=error.advice) from error


def refuse_quantized(dtypes: Mapping[str, str], where: str) -> None:
    """Raises CheckpointError when the tensors of a network are quantized.

    Args:
        dtypes: of the network's tensors by name, as safetensors names them.
        where: the file or folder.
    """
    for pattern, what in _QUANTIZED:
        marks = [name for name in dtypes if pattern.search(name)]
        if marks:
            raise _quantized(f"in {what} form", f"{where}: {marks[0]}")
    whole = [name for name, dtype in dtypes.items() if name.endswith(".weight") and dtype.startswith(("I", "U"))]
    if whole:
        raise _quantized(f"to integers of {dtypes[whole[0]][1:]} bits", f"{where}: {whole[0]} is {dtypes[whole[0]]}")


def refuse_lfs_pointer(path: Path) -> None:
    """Raises CheckpointError for the few lines that Git LFS leaves in the place of a file that was not fetched."""
    if _read_start(path).startswith(_LFS):
        raise CheckpointError(
            "A file of the checkpoint is a Git LFS pointer, not the file itself.",
            given=path,
            advice="Run `git lfs install` and `git lfs pull` in the folder that was cloned.",
        )


def no_checkpoint(path: Path) -> CheckpointError:
    """Returns what is said of a file whose ending is not that of a checkpoint which is taken."""
    what = OTHER_FORMATS.get(path.suffix.lower())
    if what is None and path.name.endswith(".json"):
        what = "a description of a checkpoint"
        advice = f"Give the folder: {path.parent}."
    elif what is not None and "download" in what:
        advice = "Let the download finish, or start it again."
    elif what is not None:
        advice = "Take the checkpoint's .safetensors file or its diffusers folder instead."
    else:
        what = "of a kind that is not known"
        advice = "Give a diffusers folder or a .safetensors file; one with another ending can be renamed."
    return CheckpointError(f"The file is no checkpoint: it is {what}.", given=path, advice=advice)


def looks_like_safetensors(path: Path) -> bool:
    """Returns whether a file begins as a safetensors file does, whatever its name."""
    return _read_start(path)[8:9] == b"{"


def _wrong_content(path: Path, start: bytes) -> CheckpointError | None:
    text = start.lstrip().lower()
    if not start and path.is_file():
        return CheckpointError("A file of the checkpoint is empty.", given=path, advice="Download it again.")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return CheckpointError(
            "A file of the checkpoint is a pickle under the name of a safetensors file.",
            given=path,
            advice="Take the checkpoint's safetensors file; if there is none, give this one its own ending (.ckpt), "
            "and convert it as the message then says.",
        )
    if start.startswith(b"GGUF"):
        return _quantized("in GGUF form", str(path))
    if text.startswith((b"<!doctype", b"<html", b"<?xml")) or text.startswith(b'{"error'):
        return CheckpointError(
            "A file of the checkpoint is a web page: what a site answered instead of the file.",
            given=path,
            advice="Download it while logged in, or with the site's access token.",
        )
    return None


def _quantized_types(path: Path) -> CheckpointError | None:
    """Of a file that has types which are no numpy's: fp8 and smaller, as quantized checkpoints have."""
    try:
        header = _header(path)
    except (OSError, ValueError):
        return None
    odd = [
        (name, entry["dtype"])
        for name, entry in header.items()
        if isinstance(entry, dict) and str(entry.get("dtype")).startswith(("F8_", "F6_", "F4"))
    ]
    if not odd:
        return None
    kind = kind_of(header)
    other = f"; it is {kind.what}" if kind not in (None, UNET) else ""
    bits = odd[0][1].split("_")[0][1:]
    return _quantized(f"to fp{bits}", f"{path}: {len(odd)} tensors, {odd[0][0]} is {odd[0][1]}{other}")


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > CHECKPOINT_HEADER_LIMIT:
            return {}
        header = json.loads(file.read(length))
    return header if isinstance(header, dict) else {}


def _quantized(how: str, given: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint is quantized, {how}, and cannot be read as weights.", given=given, advice=_HALF
    )


def _read_start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_START)
    except OSError:
        return b""  # whoever opens it next says why
