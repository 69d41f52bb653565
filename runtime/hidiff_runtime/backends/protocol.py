"""What a backend is to the runtime: a device that opens engine files, its memory, and sessions that evaluate them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from hidiff_runtime.errors import EngineError
from hidiff_runtime.format.manifest import GraphRecord, TensorSpec

WeightMap = Mapping[str, Path]
"""The weight stores by model name (``unet``): files that every session of a bundle maps, so that they share memory."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine.

    Args:
        usable: whether its library is there and finds a device.
        detail: version and devices where it is usable, else what is missing.
        advice: how to get it; empty where it is usable.
    """

    usable: bool
    detail: str
    advice: str = ""


class DeviceArray(Protocol):
    """A tensor in a device's memory: a handle that only its own device can read. Freed with its last reference."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its static shape."""
        ...

    @property
    def dtype(self) -> str:
        """``float32`` or ``int32``."""
        ...


class DeviceMemory(Protocol):
    """A device's memory and its one stream: what is asked of it, and of its sessions, happens in that order."""

    @property
    def on_host(self) -> bool:
        """Whether it is the host's own memory, so that nothing is saved by leaving arrays there."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Returns a new tensor of any content.

        Raises:
            EngineError: there is too little memory.
        """
        ...

    def upload(self, array: NDArray[Any], into: DeviceArray) -> None:
        """Copies ``array`` to the device; returns at once, and the caller may change ``array`` from then on.

        Args:
            array: of the shape and type of ``into``, in any memory order.
            into: where to.
        """
        ...

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Returns the content once everything asked for before has happened: an array of the caller's own.

        Raises:
            EngineError: something asked for before failed on the device.
        """
        ...


class Session(AbstractContextManager["Session"], Protocol):
    """An open engine. A context manager: leaving it gives its memory back.

    It may be entered by another thread than the one that evaluates.
    """

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluates the engine on one array for each input of its record; outputs are by name.

        Raises:
            EngineError: the engine refuses an input, or fails.
        """
        ...

    def execute(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Asks the device to evaluate the engine; only where the device has memory. Returns before it is done.

        Args:
            inputs: one tensor for each input of the record, of its shape and type.
            outputs: where each output of the record goes; none of them is an input too.

        Raises:
            EngineError: the engine refuses a tensor, or fails.
        """
        ...


@runtime_checkable
class ProfiledSession(Protocol):
    """A session of a backend that can tell how long each kind of operator takes, opened with its option ``profile``."""

    def operator_seconds(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Evaluates the engine once and returns the seconds of each kind of operator, the longest first.

        Once for a session: a library may end its profile with it.

        Raises:
            EngineError: the session was not opened with ``profile``, or fails.
        """
        ...


class Device(AbstractContextManager["Device"], Protocol):
    """What the sessions of one open bundle share: stream, scratch memory, caches.

    A context manager that is entered once; before that it touches no hardware. Sessions are closed before it is left.
    """

    @property
    def memory(self) -> DeviceMemory | None:
        """Its memory once entered; ``None`` where sessions take and give host arrays only."""
        ...

    @property
    def maps_weights(self) -> bool:
        """Whether its sessions use weight stores as they lie on the disk, each in memory once for all; once entered."""
        ...

    def open(self, engine: Path, weights: WeightMap, record: GraphRecord) -> Session:
        """Returns a session of an engine file, which loads when it is entered.

        Args:
            engine: the file, which may be a symbolic link, as for `Backend.files`.
            weights: the stores it may point into, which may be links too.
            record: of its graph: what goes in and out; a `PhaseRecord` where the engine is a phase's.

        Raises:
            EngineError: the library or a file is missing.
        """
        ...


class Backend(Protocol):
    """A way to run engines."""

    @property
    def name(self) -> str:
        """Its name in manifests and options."""
        ...

    def available(self) -> Availability:
        """Returns whether it can run here; imports its library if there is one, and never raises."""
        ...

    def files(self, engine: Path) -> tuple[Path, ...]:
        """Returns every file that the engine consists of, itself first; weight stores are among them if it names them.

        Args:
            engine: the file that the manifest names, its content already checked. It may be a symbolic link into a
                store where files have other names: what belongs to it lies beside the link.

        Raises:
            BundleError: the file does not say what others belong to it, or names some that are elsewhere.
        """
        ...

    def device(self, options: Mapping[str, Any]) -> Device:
        """Returns the device that ``options`` ask for, not yet entered.

        Raises:
            InputError: an option is not one of this backend's, or has a value it cannot have.
        """
        ...


def check_tensors(
    what: str, specs: Sequence[TensorSpec], given: Mapping[str, NDArray[Any]] | Mapping[str, DeviceArray]
) -> None:
    """Refuses arrays that are not an engine's ``inputs`` or ``outputs``, which ``what`` says.

    Raises:
        EngineError: their names, or the shape or type of one of them, are others.
    """
    expected = {spec.name for spec in specs}
    if given.keys() != expected:
        raise EngineError(
            f"The engine has other {what}.", given=", ".join(sorted(given)), advice=", ".join(sorted(expected))
        )
    for spec in specs:
        array = given[spec.name]
        if array.shape != spec.shape or array.dtype != spec.dtype:
            text = f"{array.dtype}{list(array.shape)} for {spec}"
            raise EngineError(f"One of the {what} is not the engine's.", given=text)


def check_fits(array: NDArray[Any], into: DeviceArray) -> None:
    """Refuses to upload an array into a tensor of another shape or type. Raises EngineError."""
    if array.shape != into.shape or array.dtype != into.dtype:
        given = f"{array.dtype}{list(array.shape)} for {into.dtype}{list(into.shape)}"
        raise EngineError("An array does not fit the tensor it is for.", given=given)
