"""What the per-phase layout's models and whoever writes its repository agree on.

There every engine is a model of its own, ``NAME_stream`` asks these models, and ``NAME_start`` loads it after them.
"""

from __future__ import annotations

from hidiff_runtime.backends.session_pool import STEP
from hidiff_runtime.format.manifest import GraphRecord, Manifest
from hidiff_runtime.serving.triton.schema import Tensor

LOADS = "loads"
"""Parameter of ``NAME_start``: names of the models to load, in order, with commas between them."""

PING, LOADED = Tensor("ping", "TYPE_INT32"), Tensor("loaded", "TYPE_INT32")
"""Of ``NAME_start``: an input that says nothing, and how many of the models are loaded."""

ENGINES, PREFIX = "engines", "engine_prefix"
"""Parameters of ``NAME_stream``: whose engines the models are, and what the models' names begin with."""


def engine_models(manifest: Manifest, prefix: str) -> dict[str, GraphRecord]:
    """Every graph whose engine becomes a model, by that model's name: ``PREFIX_strided``, ``PREFIX_vae_decoder``, …

    The step graph is none: its work is the host's wherever engines take host arrays.
    """
    graphs: dict[str, GraphRecord] = {record.phase.name: record for record in manifest.phases}
    graphs |= {name: record for name, record in manifest.others() if name != STEP}
    return {f"{prefix}_{name}": record for name, record in graphs.items()}
