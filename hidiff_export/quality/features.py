"""What a picture looks like to a network out of local files: a CLIP model, any in ONNX, or a classifier."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from hidiff_export.errors import InputError
from hidiff_export.quality.classifier import Classifier, is_classifier
from hidiff_export.quality.distances import as_tensor
from hidiff_runtime.onnxruntime_import import SWITCH
from hidiff_runtime.optional_libraries import optional_library

Array = NDArray[Any]

_IMAGENET_MEAN, _IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_USUAL_SIDE = 224
ADVICE = (
    "Give a folder that CLIPVisionModelWithProjection.save_pretrained and CLIPImageProcessor.save_pretrained wrote, or "
    "an .onnx file that takes pictures [batch, 3, height, width], normalized as torchvision's models take them, and "
    "gives features [batch, features]."
)
"""What `open_features` takes."""


class FeatureModel(Protocol):
    """Turns pictures into features.

    Attributes:
        name: for people.
        labels: what `named` tells apart; none where it tells nothing.
    """

    name: str
    labels: tuple[str, ...]

    def features(self, pictures: Sequence[Array]) -> Tensor:
        """Returns float32 ``[pictures, features]`` of uint8 pictures ``[height, width, 3]`` of one size."""
        ...

    def named(self, features: Tensor) -> list[str]:
        """Returns the label that each row of features is taken for."""
        ...


def open_features(model: Path) -> FeatureModel:
    """Returns the feature model in a folder or file.

    Raises:
        InputError: there is none at this path, it is damaged, or of another kind.
    """
    if is_classifier(model):
        return ClassifierFeatures(model)
    if model.is_dir():
        return ClipFeatures(model)
    if model.suffix.lower() == ".onnx" and model.is_file():
        return OnnxFeatures(model)
    raise InputError("There is no feature model at this path.", given=model, advice=ADVICE)


class ClassifierFeatures:
    """A `Classifier`, which also names the subject.

    Raises:
        InputError: the folder's files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        try:
            self._network = Classifier.load(folder)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise InputError("The classifier does not load.", given=f"{folder}: {error}", advice=ADVICE) from error
        self.labels = self._network.labels

    def features(self, pictures: Sequence[Array]) -> Tensor:
        """Returns what the last layer but one computes."""
        with torch.no_grad():
            return self._network.features(as_tensor(pictures))

    def named(self, features: Tensor) -> list[str]:
        """Returns the label with the highest score."""
        with torch.no_grad():
            best = self._network.scores(features).argmax(1)
        return [self.labels[index] for index in best.tolist()]


class _Unlabeled:
    """A model that names nothing."""

    labels: tuple[str, ...] = ()

    def named(self, features: Tensor) -> list[str]:
        """Returns no name for anything."""
        return [""] * len(features)


class ClipFeatures(_Unlabeled):
    """A CLIP vision model of transformers, with its own image processor.

    Raises:
        InputError: the folder holds no such model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        self.name = folder.name
        try:
            self._processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            network = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                "There is no CLIP vision model in this folder.", given=f"{folder}: {error}", advice=ADVICE
            ) from error
        self._network = network.eval()

    def features(self, pictures: Sequence[Array]) -> Tensor:
        """Returns the projected embeddings."""
        pixels = self._processor(images=list(pictures), return_tensors="pt").pixel_values
        with torch.no_grad():
            embeds: Tensor = self._network(pixels).image_embeds
        return embeds


class OnnxFeatures(_Unlabeled):
    """A network in an ONNX file, as torchvision's are exported, run by ONNX Runtime on the CPU.

    Raises:
        InputError: it does not load, or takes or gives something else.
    """

    def __init__(self, path: Path) -> None:
        os.environ.setdefault(SWITCH, "1")
        onnxruntime: Any = optional_library(
            "onnxruntime", "Features of an ONNX file need ONNX Runtime", "Run `pip install 'hidiff-export[cpu]'`."
        )
        self.name = path.name
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes of errors share no base but this
            raise InputError("The feature model does not load.", given=f"{path}: {error}", advice=ADVICE) from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if len(shape) != 4 or shape[1] != 3 or len(outputs) != 1 or inputs[0].type != "tensor(float)":
            given = f"{path} takes {[(one.name, one.shape) for one in inputs]}, gives {len(outputs)} outputs"
            raise InputError("The feature model takes or gives something else.", given=given, advice=ADVICE)
        self._input = inputs[0].name
        self._batch = shape[0] if isinstance(shape[0], int) else None
        self._size = tuple(side if isinstance(side, int) else _USUAL_SIDE for side in shape[2:])
        try:  # before anything is drawn
            self.features([np.zeros((*self._size, 3), np.uint8)])
        except Exception as error:
            raise InputError("The feature model does not run.", given=f"{path}: {error}", advice=ADVICE) from error

    def features(self, pictures: Sequence[Array]) -> Tensor:
        """Returns what it gives, as one row a picture."""
        sized = torch.nn.functional.interpolate(
            as_tensor(pictures), self._size, mode="bilinear", antialias=True, align_corners=False
        )
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_IMAGENET_MEAN, _IMAGENET_DEVIATION))
        pixels = ((sized - mean) / deviation).numpy()
        size = self._batch or len(pixels)
        rows = []
        for first in range(0, len(pixels), size):
            part = pixels[first : first + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
            rows.append(self._session.run(None, {self._input: padded})[0].reshape(size, -1)[: len(part)])
        return torch.from_numpy(np.concatenate(rows).astype(np.float32))
