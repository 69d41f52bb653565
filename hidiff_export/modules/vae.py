"""The VAE as two static graphs, for tiles of one size: latents to a picture, and a picture to latents' moments."""

from __future__ import annotations

from typing import Any

import torch

from hidiff_export.families.vae_tiling import VaeTiles
from hidiff_export.modules.graph_module import GraphModule
from hidiff_runtime.format.manifest import TensorSpec


class _VaeModule(GraphModule):
    """One half of diffusers' ``AutoencoderKL`` for tiles of one size; float32 in and out, casts inside.

    Tiles go through one by one: bundles hold graphs of a batch of 1, whatever a run's is.
    """

    network = "vae"

    def __init__(self, vae: Any, tiles: VaeTiles) -> None:
        super().__init__()
        self.vae: Any = vae
        self.tiles = tiles


class VaeDecoder(_VaeModule):
    """``post_quant_conv`` and the decoder."""

    title = "the VAE's decoder"

    def input_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns name, shape and type of the input: latents of one tile."""
        return self.tiles.decoder_inputs(model_batch)

    def output_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns name, shape and type of the output: the tile's picture."""
        return self.tiles.decoder_outputs(model_batch)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the picture, [batch, 3, 8 * height, 8 * width], from about -1 to 1, not clamped.

        Args:
            latents: [batch, 4, height, width], the scaling factor taken out.
        """
        first = self.vae.post_quant_conv
        image: torch.Tensor = self.vae.decoder(first(latents.to(first.weight.dtype)))
        return image.to(latents.dtype)


class VaeEncoder(_VaeModule):
    """The encoder and ``quant_conv``."""

    title = "the VAE's encoder"

    def input_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns name, shape and type of the input: the picture of one tile."""
        return self.tiles.encoder_inputs(model_batch)

    def output_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:
        """Returns name, shape and type of the output: the tile's moments."""
        return self.tiles.encoder_outputs(model_batch)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Means and logarithms of variances, [batch, 8, height, width], neither clamped nor scaled.

        Args:
            image: [batch, 3, 8 * height, 8 * width], -1 to 1.
        """
        last = self.vae.quant_conv
        moments: torch.Tensor = last(self.vae.encoder(image.to(last.weight.dtype)))
        return moments.to(image.dtype)
