"""A tiny SDXL VAE as a bundle holds it: weights, portable graphs and ONNX Runtime's engines, for tiles of one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build
from hidiff_export.checkpoints.synthetic import synthesize
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.engines.onnxruntime import lower
from hidiff_export.families.family import Family, Width, vae_config
from hidiff_export.families.vae_tiling import VaeTiles
from hidiff_export.graph.portable import write_graph
from hidiff_export.modules.vae import VaeDecoder, VaeEncoder
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.backends.onnxruntime import OnnxRuntimeBackend
from hidiff_runtime.format.manifest import GraphRecord
from hidiff_runtime.format.specs import VaeRecord

CONFIG = vae_config(Family.SDXL, Width.TINY)
TILES = VaeTiles(96, 64, 16)
WEIGHTS = "weights.safetensors"
_PREVIEW = tuple((0.1 * row, 0.0, 0.0) for row in range(5))


def record() -> VaeRecord:
    """What a manifest says of it."""
    halves = {
        "decoder": (TILES.decoder_inputs(), TILES.decoder_outputs()),
        "encoder": (TILES.encoder_inputs(), TILES.encoder_outputs()),
    }
    graphs = {
        half: GraphRecord(f"{half}.onnx", {"onnxruntime": f"{half}.onnxruntime.onnx"}, *specs)
        for half, specs in halves.items()
    }
    return VaeRecord(graphs["decoder"], graphs["encoder"], CONFIG["scaling_factor"], TILES.overlap, _PREVIEW)


def network(folder: Path) -> Any:
    """diffusers' ``AutoencoderKL`` over the stored weights."""
    return build(Component.VAE, CONFIG, WeightStore.open(folder / WEIGHTS).state_dict())


def write_vae(folder: Path) -> None:
    """Writes everything to a new folder."""
    folder.mkdir()
    store = WeightStore.write(synthesize(Component.VAE, CONFIG, 0), folder / WEIGHTS, Precision.FLOAT32)
    for module in (VaeDecoder(network(folder), TILES), VaeEncoder(network(folder), TILES)):
        half = "decoder" if isinstance(module, VaeDecoder) else "encoder"
        write_graph(module, 1, store, folder / f"{half}.onnx")
        lower(folder / f"{half}.onnx", folder / f"{half}.onnxruntime.onnx")


@dataclass
class Opened:
    """Stands in for an open bundle: real engines of the VAE and nothing else; notes what goes through them.

    Args:
        root: where `write_vae` wrote.
        vae: the record in force.
    """

    root: Path
    vae: VaeRecord = field(default_factory=record)
    seen: list[np.ndarray] = field(default_factory=list)
    given: list[np.ndarray] = field(default_factory=list)

    @property
    def manifest(self) -> Any:
        """With the record alone."""
        return SimpleNamespace(vae=self.vae)

    @contextmanager
    def network(self, name: str) -> Iterator[Any]:
        """The session of a half."""
        graph = self.vae.decoder if name == "vae_decoder" else self.vae.encoder
        device = OnnxRuntimeBackend().device({"device": "cpu", "threads": 1})
        with (
            device as entered,
            entered.open(self.root / graph.engines["onnxruntime"], {"vae": self.root / WEIGHTS}, graph) as session,
        ):
            yield SimpleNamespace(run=lambda inputs: self._noted(session, inputs))

    def _noted(self, session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = session.run(inputs)
        self.seen.extend(inputs.values())
        self.given.extend(outputs.values())
        return outputs
