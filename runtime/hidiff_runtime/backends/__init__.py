"""The backends by name, each imported when it is asked for, and which of them runs a bundle on this machine."""

from __future__ import annotations

from hidiff_runtime.backends.protocol import Backend
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.manifest import Contents
from hidiff_runtime.format.specs import STEP

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


def choose(contents: Contents, wanted: str | Backend | None) -> Backend:
    """Returns the backend to use: it has an engine for every graph, and it can run here.

    Args:
        contents: of the bundle's manifest.
        wanted: a backend or its name; None for the first that this machine has.

    Raises:
        BundleError: the bundle has no engines of a backend that is known, or not one for each of its graphs.
        EngineError: the backend cannot run here.
        InputError: there is no such backend, or the bundle has no engines of it.
    """
    graphs = [
        record
        for manifest in contents.manifests
        for record in (*manifest.phases, *(other for name, other in manifest.others() if name != STEP))
    ]
    offered = [name for name in graphs[0].engines if all(name in graph.engines for graph in graphs)]
    if wanted is None:
        known = [get(name) for name in NAMES if name in offered]
        if not known:
            raise BundleError(
                "The bundle has no engines that this hidiff-runtime knows.",
                given=", ".join(offered) or "no backend with an engine for every graph",
                advice=f"Build it for one of {', '.join(NAMES)}, or upgrade hidiff-runtime.",
            )
        chosen = next((backend for backend in known if backend.available().usable), known[0])
    else:
        chosen = get(wanted) if isinstance(wanted, str) else wanted
        if lacking := [graph.graph for graph in graphs if chosen.name not in graph.engines]:
            if len(lacking) < len(graphs):
                raise BundleError(
                    f"The bundle has engines of {chosen.name}, but not for all of its graphs.",
                    given=f"none for {', '.join(lacking[:3])}",
                    advice=REBUILD,
                )
            raise InputError(
                "The bundle has no engines of this backend.", given=chosen.name, advice=f"It has {', '.join(offered)}."
            )
    availability = chosen.available()
    if not availability.usable:
        raise EngineError(
            f"The backend {chosen.name} cannot run here.", given=availability.detail, advice=availability.advice
        )
    return chosen
