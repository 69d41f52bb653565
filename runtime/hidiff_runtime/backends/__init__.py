"""The backends by name, each imported when it is asked for, and which of them have a bundle's engines."""

from __future__ import annotations

from hidiff_runtime.backends.protocol import Availability, Backend
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.manifest import Contents
from hidiff_runtime.format.specs import STEP, GraphRecord

NAMES = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")
"""Every backend, the one to be preferred first."""


def get(name: str) -> Backend:
    """Returns the backend called ``name``; its library need not be installed.

    Raises:
        InputError: there is no such backend.
    """
    if name not in NAMES:
        raise InputError("There is no such backend.", given=name, advice=f"Use one of {', '.join(NAMES)}.")
    if name == "onnxruntime":
        from hidiff_runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    if name == "openvino":
        from hidiff_runtime.backends.openvino.inference_device import OpenVinoBackend

        return OpenVinoBackend()
    from hidiff_runtime.backends.tensorrt.device import TensorRtBackend

    return TensorRtBackend(name)


def named(contents: Contents, wanted: str | Backend) -> Backend:
    """Returns the backend that was asked for, which has an engine for every graph and can run here.

    Args:
        contents: of the bundle's manifest.
        wanted: a backend or its name.

    Raises:
        BundleError: the bundle has engines of it, but not for each of its graphs.
        EngineError: the backend cannot run here.
        InputError: there is no such backend, or the bundle has no engines of it.
    """
    backend = get(wanted) if isinstance(wanted, str) else wanted
    graphs = _graphs(contents)
    if lacking := [graph.graph for graph in graphs if backend.name not in graph.engines]:
        if len(lacking) < len(graphs):
            raise BundleError(
                f"The bundle has engines of {backend.name}, but not for all of its graphs.",
                given=f"none for {', '.join(lacking[:3])}",
                advice=REBUILD,
            )
        raise InputError(
            "The bundle has no engines of this backend.",
            given=backend.name,
            advice=f"It has {', '.join(_offered(contents))}.",
        )
    check_usable(backend, backend.available())
    return backend


def known(contents: Contents) -> list[Backend]:
    """Returns the backends that have an engine for every graph, the one to be preferred first.

    Raises:
        BundleError: there is none that this runtime knows.
    """
    offered = _offered(contents)
    found = [get(name) for name in NAMES if name in offered]
    if not found:
        raise BundleError(
            "The bundle has no engines that this hidiff-runtime knows.",
            given=", ".join(offered) or "no backend with an engine for every graph",
            advice=f"Build it for one of {', '.join(NAMES)}, or upgrade hidiff-runtime.",
        )
    return found


def check_usable(backend: Backend, availability: Availability) -> None:
    """Refuses a backend that cannot run here. Raises EngineError."""
    if not availability.usable:
        raise EngineError(
            f"The backend {backend.name} cannot run here.", given=availability.detail, advice=availability.advice
        )


def _graphs(contents: Contents) -> list[GraphRecord]:
    """Returns the graphs that each need an engine of a backend that runs the bundle."""
    return [
        record
        for manifest in contents.manifests
        for record in (*manifest.phases, *(other for name, other in manifest.others() if name != STEP))
    ]


def _offered(contents: Contents) -> list[str]:
    """Returns the backends that have an engine for every graph, as the manifest calls them."""
    graphs = _graphs(contents)
    return [name for name in graphs[0].engines if all(name in graph.engines for graph in graphs)]
