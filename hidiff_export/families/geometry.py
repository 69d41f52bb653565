"""The size of every feature map of a UNet in a phase: what the phase's change does to an image size, without torch.

Stock sizes follow diffusers' ``UNet2DConditionModel``: a downsampler halves, rounding up, and an upsampler goes to the
size of the skip connection that comes next. A phase changes three things: the layout's downsampler quarters instead
of halving, its pooled attention's output is halved once more, and its restored attention undoes that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hidiff_export.errors import InputError
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_runtime.phases import Phase, PhaseKind

SHIFTS = 4
"""How many window shifts there are: 0 to 3 quarters of a window, rounded down."""

_CONTROL_LATENT = 128
_CONTROL_MULTIPLE = 8


def _halved(size: int) -> int:
    return (size + 1) // 2


@dataclass(frozen=True)
class WindowShape:
    """How a windowed block cuts its feature map into two by two windows.

    Args:
        height: of the feature map; ``width`` likewise.
    """

    height: int
    width: int

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of one window, half of the feature map's rounded up."""
        return _halved(self.height), _halved(self.width)

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the four windows together: the size to which an odd feature map is resized."""
        rows, columns = self.window
        return 2 * rows, 2 * columns

    @property
    def resized(self) -> bool:
        """Whether the feature map is resized before it is cut, and back afterwards."""
        return self.padded != (self.height, self.width)

    def shift(self, quarters: int) -> tuple[int, int]:
        """Returns rows and columns by which the feature map is rolled before it is cut, for a shift of 0 to 3 quarters.

        As published, windows lower than four rows are not shifted sideways either.
        """
        rows, columns = (side // 4 * quarters for side in self.window)
        return (rows, columns) if rows > 0 else (0, 0)


@dataclass(frozen=True)
class Feature:
    """Name of a UNet module, and the channels, height and width of what it computes (before any pooling of it)."""

    name: str
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class UNetGeometry:
    """Every size that a phase fixes.

    Args:
        kind: of the phase.
        latent_height: of the UNet's input and output; ``latent_width`` likewise.
        skips: channels, height and width of each skip connection, in the order the UNet makes them. A ControlNet's
            residuals are resized to these.
        mid: channels, height and width of the middle block.
        restore: height and width that the restored attention's output is brought back to; None without pooling.
        windows: one for each windowed block, in execution order.
        features: every convolution, resnet, attention and sampler in execution order.
    """

    kind: PhaseKind
    latent_height: int
    latent_width: int
    skips: tuple[tuple[int, int, int], ...]
    mid: tuple[int, int, int]
    restore: tuple[int, int] | None
    windows: tuple[WindowShape, ...]
    features: tuple[Feature, ...]

    @classmethod
    def of(
        cls, config: Mapping[str, Any], layout: Layout, phase: Phase, latent_height: int, latent_width: int
    ) -> UNetGeometry:
        """Returns the geometry of ``phase``.

        Args:
            config: of diffusers' ``UNet2DConditionModel``.
            latent_height: in latents, not pixels; ``latent_width`` likewise.

        Raises:
            InputError: the layout names a module that this UNet does not have.
        """
        return _Walk(config, layout, phase.kind, latent_height, latent_width).geometry()

    def size_of(self, name: str) -> tuple[int, int]:
        """Returns height and width of what the module ``name`` computes.

        Raises:
            InputError: there is no such module.
        """
        for feature in self.features:
            if feature.name == name:
                return feature.height, feature.width
        raise InputError(
            f"The UNet has no module {name}.", given=name, advice="Check that the family is the checkpoint's."
        )


class _Walk:
    """Follows a feature map through the UNet."""

    def __init__(
        self, config: Mapping[str, Any], layout: Layout, kind: PhaseKind, latent_height: int, latent_width: int
    ) -> None:
        self.config = config
        self.layout = layout
        self.kind = kind
        self.latent = (latent_height, latent_width)
        self.height, self.width = self.latent
        self.restore: tuple[int, int] | None = None
        self.skips: list[tuple[int, int, int]] = []
        self.features: list[Feature] = []

    def geometry(self) -> UNetGeometry:
        channels = tuple(self.config["block_out_channels"])
        self._compute("conv_in", channels[0])
        self._skip(channels[0])
        self._down(channels)
        mid = (channels[-1], self.height, self.width)
        for name in ("resnets.0", "attentions.0", "resnets.1"):
            self._compute(f"mid_block.{name}", channels[-1])
        made = tuple(self.skips)
        self._up(channels[::-1])
        self._compute("conv_out", self.config.get("out_channels", 4))
        geometry = UNetGeometry(self.kind, *self.latent, made, mid, self.restore, (), tuple(self.features))
        for name in (self.layout.downsampler, self.layout.pooled_attention, self.layout.restored_attention):
            geometry.size_of(name)
        attentions = [block.partition(".transformer_blocks.")[0] for block in self.layout.windowed_blocks]
        return replace(geometry, windows=tuple(WindowShape(*geometry.size_of(name)) for name in attentions))

    def _down(self, channels: tuple[int, ...]) -> None:
        types = self.config["down_block_types"]
        for index, kind in enumerate(types):
            prefix = f"down_blocks.{index}"
            for name in self._layers(prefix, kind, self.config["layers_per_block"], channels[index]):
                if self.kind.pooled and name == self.layout.pooled_attention:
                    self.restore = (self.height, self.width)
                    self._halve()
                self._skip(channels[index])
            if index < len(types) - 1:
                self._downsample(f"{prefix}.downsamplers.0", channels[index])

    def _downsample(self, name: str, channels: int) -> None:
        self._halve()
        if self.kind.strided and name == self.layout.downsampler:
            self._halve()
        self._compute(name, channels)
        self._skip(channels)

    def _up(self, channels: tuple[int, ...]) -> None:
        types = self.config["up_block_types"]
        for index, kind in enumerate(types):
            prefix = f"up_blocks.{index}"
            for name in self._layers(prefix, kind, self.config["layers_per_block"] + 1, channels[index]):
                self.skips.pop()
                if self.restore is not None and name == self.layout.restored_attention:
                    self.height, self.width = self.restore
            if index < len(types) - 1:
                _, self.height, self.width = self.skips[-1]
                self._compute(f"{prefix}.upsamplers.0", channels[index])

    def _layers(self, prefix: str, kind: str, count: int, channels: int) -> Iterator[str]:
        """Computes a block's layers; yields the name of the last module of each."""
        for layer in range(count):
            name = f"{prefix}.resnets.{layer}"
            self._compute(name, channels)
            if kind.startswith("CrossAttn"):
                name = f"{prefix}.attentions.{layer}"
                self._compute(name, channels)
            yield name

    def _compute(self, name: str, channels: int) -> None:
        self.features.append(Feature(name, channels, self.height, self.width))

    def _skip(self, channels: int) -> None:
        self.skips.append((channels, self.height, self.width))

    def _halve(self) -> None:
        self.height, self.width = _halved(self.height), _halved(self.width)


def control_latent(latent_height: int, latent_width: int) -> tuple[int, int]:
    """Returns height and width of the latents that a ControlNet sees, as published: SDXL's own size, multiples of 8.

    The latents are resized to it (nearest), the control image to eight times it.
    """
    factor = max(latent_height / _CONTROL_LATENT, latent_width / _CONTROL_LATENT)
    height = int(latent_height // factor) // _CONTROL_MULTIPLE * _CONTROL_MULTIPLE
    width = int(latent_width // factor) // _CONTROL_MULTIPLE * _CONTROL_MULTIPLE
    return height, width
