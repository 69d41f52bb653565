"""The bundle's own ControlNet: a picture and a scale become the residuals of each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.denoising.conditioning import Array, check_array, check_scale
from hidiff_runtime.denoising.run_context import ControlRequest, EngineSource, engine_errors
from hidiff_runtime.errors import EngineError, InputError
from hidiff_runtime.finite_values import count_nonfinite
from hidiff_runtime.format.specs import GraphRecord, TensorSpec
from hidiff_runtime.format.validation import CONDITIONING_SCALE, CONTROL_IMAGE

if TYPE_CHECKING:
    from hidiff_runtime.backends.protocol import DeviceArray


class ControlNet:
    """What a run asks for residuals, with the picture checked and resized once.

    Args:
        bundle: whose engine computes.
        control_image: float32 ``[batch, 3, height, width]`` of the bundle's picture size, 0 to 1; resized (nearest, as
            published) to what the ControlNet sees, and the same for both halves of guidance.
        conditioning_scale: what the residuals are multiplied by.

    Attributes:
        records: of the bundle's ControlNet: of its graph for guided phases, and where there is one for the others.

    Raises:
        InputError: the picture or the scale is not one the ControlNet takes.
    """

    def __init__(
        self, bundle: EngineSource, record: GraphRecord, control_image: Any, conditioning_scale: float
    ) -> None:
        manifest = bundle.manifest
        image = check_array(CONTROL_IMAGE, control_image, (manifest.batch, 3, manifest.height, manifest.width))
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 1:
            raise InputError(
                f"{CONTROL_IMAGE} must lie between 0 and 1.",
                given=f"{low:g} to {high:g}",
                advice="Divide 8-bit colours by 255; a picture from -1 to 1 becomes (picture + 1) / 2.",
            )
        self._bundle = bundle
        without = manifest.unguided_controlnet
        self.records = {False: record, **({} if without is None else {True: without})}
        self._own: dict[str, Array] = {
            spec.name: _fitted(image, spec.shape)
            if spec.name == CONTROL_IMAGE
            else np.array([check_conditioning_scale(conditioning_scale)], dtype=np.float32)
            for spec in record.inputs
            if spec.name in (CONTROL_IMAGE, CONDITIONING_SCALE)
        }

    def own(self, *, unguided: bool) -> dict[str, Array]:
        """Returns picture and scale as a graph takes them, by input name: the same at every evaluation."""
        rows = {spec.name: spec.shape[0] for spec in self.records[unguided].inputs}
        return {name: array[: rows[name]] for name, array in self._own.items()}

    def __call__(self, request: ControlRequest) -> dict[str, Array]:
        """Returns the residuals by name, at the sizes that the manifest says.

        Raises:
            EngineError: the engine does not load, failed, or gave anything else.
        """
        record, own = self.records[request.unguided], self.own(unguided=request.unguided)
        shared = {spec.name: request.inputs[spec.name] for spec in record.inputs if spec.name not in own}
        where = _where(request.step, request.steps)
        session = self._bundle.controlnet_engine(unguided=request.unguided)
        with engine_errors(where):
            outputs = session.run({**shared, **own})
        for spec in record.outputs:
            found = outputs.get(spec.name)
            if found is None or found.shape != spec.shape:
                given = "nothing" if found is None else list(found.shape)
                raise EngineError(f"The engine did not give {spec}: {where}.", given=given, advice="Build it again.")
            if bad := count_nonfinite(found):
                raise EngineError(
                    f"The engine gave NaN or infinite values: {where}.",
                    given=f"{bad} of {found.size} values of {spec.name}, backend {self._bundle.backend}",
                    advice="Half precision may overflow, float32 does not.",
                )
        return {spec.name: outputs[spec.name].astype(np.float32, copy=False) for spec in record.outputs}

    def execute(
        self,
        tensors: Callable[[Sequence[TensorSpec]], Mapping[str, DeviceArray]],
        step: int,
        steps: int,
        *,
        unguided: bool,
    ) -> None:
        """Has the residuals computed where they are needed. What is not finite shows in the UNet's output.

        Args:
            tensors: gives the tensors of these names, what the run and `own` hold among them.
            step: for messages, and so is ``steps``.
            unguided: whether for the prompts alone.

        Raises:
            EngineError: the engine does not load, or failed.
        """
        session, record = self._bundle.controlnet_engine(unguided=unguided), self.records[unguided]
        with engine_errors(_where(step, steps)):
            session.execute(tensors(record.inputs), tensors(record.outputs))


def fixed_control(residuals: Mapping[str, Array]) -> Callable[[ControlRequest], dict[str, Array]]:
    """Returns what gives the same residuals at every step: those for the prompts, where they are asked for alone.

    Args:
        residuals: by graph input name, for the negative prompts first where the bundle has guidance.
    """

    def control(request: ControlRequest) -> dict[str, Array]:
        return {name: each[len(each) // 2 :] if request.unguided else each for name, each in residuals.items()}

    return control


def _where(step: int, steps: int) -> str:
    return f"ControlNet, step {step + 1} of {steps}"


def check_conditioning_scale(conditioning_scale: Any) -> float:
    """Returns the scale of a ControlNet's residuals. Raises InputError where `check_scale` does."""
    return check_scale(CONDITIONING_SCALE, conditioning_scale, "1.0")


def nearest(image: Array, height: int, width: int) -> Array:
    """Returns ``[batch, channels, height, width]`` of another size, each value the nearest one's.

    Index ``floor(i * (size / resized))`` in float32, as ``torch.nn.functional.interpolate`` has it.
    """
    rows, columns = _nearest_indices(image.shape[2], height), _nearest_indices(image.shape[3], width)
    return image[:, :, rows[:, None], columns]


def _nearest_indices(size: int, resized: int) -> NDArray[np.int64]:
    scale = np.float32(size) / np.float32(resized)
    indices: NDArray[np.int64] = np.floor(np.arange(resized, dtype=np.float32) * scale).astype(np.int64)
    return indices.clip(max=size - 1)


def _fitted(image: Array, shape: tuple[int, ...]) -> Array:
    """Returns the picture at the graph's size and batch."""
    resized = nearest(image, *shape[2:])
    return np.ascontiguousarray(np.concatenate([resized] * (shape[0] // image.shape[0])))
