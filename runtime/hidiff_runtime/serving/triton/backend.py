"""Engines that are models of their own on the same Triton server: a session is a name, an evaluation is a request.

The pipeline stays the one there is; only what it asks for an evaluation is another model instead of a library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from numpy.typing import NDArray

from hidiff_runtime.backends.protocol import Availability, DeviceArray, WeightMap
from hidiff_runtime.errors import EngineError, InputError
from hidiff_runtime.format.manifest import GraphRecord

Arrays = Mapping[str, NDArray[Any]]


class Call(Protocol):
    """How a model of the server is asked."""

    def __call__(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The outputs of this name, as arrays of the caller's own.

        Raises:
            EngineError: the server has no such model, or the model failed.
        """
        ...


class TritonBackend:
    """Opens sessions of models that the server loaded.

    Args:
        name: the backend that the models' engines were built for, so that a manifest has it.
        models: what `hidiff_runtime.serving.triton.layout.engine_models` gave.
        call: asks a model.
    """

    remote = True

    def __init__(self, name: str, models: Mapping[str, GraphRecord], call: Call) -> None:
        self.name = name
        self._models = {record.graph: model for model, record in models.items()}
        self._call = call

    def available(self) -> Availability:
        """Always: whether the models are there shows when they are asked."""
        return Availability(True, f"{len(self._models)} models of this Triton server")

    def files(self, engine: Path) -> tuple[Path, ...]:  # noqa: ARG002 - the protocol's
        """None: they are the models'."""
        return ()

    def device(self, options: Mapping[str, Any]) -> TritonDevice:
        """The server. Raises InputError for any option: where engines run is in the models' configuration."""
        if options:
            raise InputError(
                "Engines that are models of their own take no options here.",
                given=", ".join(options),
                advice="Set it in the models' config.pbtxt.",
            )
        return TritonDevice(self._models, self._call)


class TritonDevice:
    """The server that the models are on. It takes and gives the host's arrays.

    Args:
        models: by the path of their graph in the bundle.
        call: asks a model.
    """

    memory = None

    def __init__(self, models: Mapping[str, str], call: Call) -> None:
        self._models = models
        self._call = call

    def __enter__(self) -> TritonDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def open(self, engine: Path, weights: WeightMap, record: GraphRecord) -> TritonSession:  # noqa: ARG002
        """A session of the model that the graph's engine became."""
        return TritonSession(self._models[record.graph], record, self._call)


class TritonSession:
    """One model. The server holds it open, so entering and leaving do nothing.

    Args:
        model: its name.
        record: of its graph.
        call: asks it.
    """

    def __init__(self, model: str, record: GraphRecord, call: Call) -> None:
        self._model = model
        self._record = record
        self._call = call

    def __enter__(self) -> TritonSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Asks the model. Raises EngineError when it refuses, fails, or gives another shape than the record's."""
        outputs = self._call(self._model, inputs, [spec.name for spec in self._record.outputs])
        for spec in self._record.outputs:
            found = outputs[spec.name]
            if found.shape != spec.shape or found.dtype != spec.dtype:
                raise EngineError(
                    f"The model {self._model} gave another output than the bundle's graph.",
                    given=f"{found.dtype}{list(found.shape)} for {spec}",
                    advice="Write the model repository again from this bundle.",
                )
        return outputs

    def execute(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:  # noqa: ARG002
        """Never asked for: the device has no memory. Raises EngineError."""
        raise EngineError("Models of a Triton server take host arrays only.", given=self._model)
