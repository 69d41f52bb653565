"""Requests as tensors to rows of plain values, and finished rows to tensors; numpy alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.image_metadata import encoded
from hidiff_runtime.pipeline.request_fields import BY_NAME, Kind
from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.serving.service import generation_metadata
from hidiff_runtime.serving.triton.schema import OUTPUT, OUTPUTS, PREVIEWS, RESULT
from hidiff_runtime.text_safety import encodable

if TYPE_CHECKING:
    from PIL.Image import Image

    from hidiff_runtime.pipeline.pipeline import PictureStep, Result
    from hidiff_runtime.pipeline.request import Request

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorRow:
    """One run that a request asks for.

    Args:
        values: by the names of `hidiff_runtime.pipeline.request_fields.FIELDS`, what was left out left out.
        output: one of `OUTPUTS`.
        previews: how many to send along the way.
    """

    values: dict[str, object]
    output: str
    previews: int


def read_rows(tensors: Mapping[str, NDArray[Any]], limits: Limits) -> list[TensorRow]:
    """Returns the rows of a request.

    An optional tensor is there for all rows or for none; an empty text in it stands for left out.

    Args:
        tensors: by name, ``[rows, 1]``, texts and pictures as bytes.

    Raises:
        InputError: too many rows, tensors of different shapes, a text that is not UTF-8, no such output, or several.
    """
    shapes = {array.shape for array in tensors.values()}
    rows = len(tensors["prompt"]) if "prompt" in tensors else 0
    if shapes != {(rows, 1)} or not rows:
        raise InputError(
            "Each input must have one value for each row, and prompt is needed.",
            given="; ".join(f"{name} {list(array.shape)}" for name, array in tensors.items()) or "no inputs",
        )
    if rows > limits.pictures:
        raise InputError("These are too many rows.", given=rows, advice=f"This server takes up to {limits.pictures}.")
    found = []
    for index in range(rows):
        values = {name: _plain(name, array[index, 0]) for name, array in tensors.items()}
        given = {name: value for name, value in values.items() if value not in ("", b"")}
        found.append(TensorRow(given, _output(given.pop(OUTPUT, OUTPUTS[0])), _previews(given.pop(PREVIEWS, 0))))
    if len({row.output for row in found}) > 1:
        raise InputError("The rows of one request must have the same output.", advice="Send a request for each.")
    return found


def _plain(name: str, value: Any) -> object:
    """Returns a Python value of a tensor's element."""
    kind: Kind = BY_NAME[name].kind if name in BY_NAME else ("text" if name == OUTPUT else "whole")
    if kind == "picture":
        return value
    if kind != "text":
        return value.item()
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8.", given=f"byte {error.start} of {len(value)}") from error


def _output(value: object) -> str:
    if value not in OUTPUTS:
        raise InputError("There is no such output.", given=repr(value)[:60], advice=f"Use one of {', '.join(OUTPUTS)}.")
    return str(value)


def _previews(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise InputError("previews must not be negative.", given=value, advice="0 is none.")
    return value


def shows(step: int, steps: int, previews: int) -> bool:
    """Returns whether a preview goes with the finished step, counted from 0: they are spread evenly."""
    return (step + 1) * previews // steps > step * previews // steps


def check_one_tensor(rows: Sequence[TensorRow], runs: Sequence[Request]) -> None:
    """Refuses rows whose results `joined` could not put under each other, before any is made.

    Raises:
        InputError: they are pixels of several sizes.
    """
    sizes = dict.fromkeys(f"{run.size[0]}x{run.size[1]}" for row, run in zip(rows, runs, strict=True))
    if len(sizes) > 1 and any(row.output == "uint8" for row in rows):
        raise InputError(
            "Pixels of several sizes do not fit into one tensor.",
            given=", ".join(sizes),
            advice="Ask for the output png or base64, or for one size in a request.",
        )


def progress(row: int, step: PictureStep, how: TensorRow) -> Arrays:
    """Returns the message of a finished step."""
    made: Arrays = {
        "event": _texts("progress"),
        "row": np.array([[row]], np.int32),
        "step": np.array([[step.step + 1]], np.int32),
        "steps": np.array([[step.steps]], np.int32),
        "phase": _texts(step.phase.name),
    }
    if shows(step.step, step.steps, how.previews):
        made["preview"] = _texts(_picture(step.preview(), how.output))
    return made


def finished(row: int, result: Result, output: str) -> Arrays:
    """Returns the message of a finished row: its pictures as ``output`` says, and how they were made."""
    made: Arrays = {
        "event": _texts("result"),
        "row": np.array([[row]], np.int32),
        "parameters": _texts(*(json.dumps(generation_metadata(result, index)) for index in range(len(result.images)))),
    }
    if output == "uint8":
        made["pixels"] = np.stack([np.asarray(image) for image in result.images])[None]
    else:
        made["image"] = _texts(*(_picture(image, output) for image in result.images))
    return made


def failed(message: str, kind: str) -> Arrays:
    """Returns the message of a failed request for a model that asked: Triton would not hand it an error's kind."""
    return {"event": _texts("error"), "parameters": _texts(json.dumps({"message": message, "kind": kind}))}


def refused(message: Arrays) -> tuple[str, str] | None:
    """Returns message and kind of what `failed` made; None for any other message."""
    if message["event"].ravel()[0] != b"error":
        return None
    told = json.loads(message["parameters"].ravel()[0])
    return told["message"], told["kind"]


def joined(messages: Sequence[Arrays]) -> Arrays:
    """Returns the results of a request's rows under each other."""
    names = [name for name in RESULT if name in messages[0]]
    return {name: np.concatenate([message[name] for message in messages]) for name in names}


def _picture(image: Image, output: str) -> bytes:
    content = encoded(image)
    return base64.b64encode(content) if output == "base64" else content


def _texts(*values: str | bytes) -> NDArray[Any]:
    """Returns one row of texts."""
    return np.array([[encodable(value).encode() if isinstance(value, str) else value for value in values]], np.object_)
