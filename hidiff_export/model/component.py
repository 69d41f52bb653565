"""The networks that are loaded, fabricated and stored: the UNet and the ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

import torch

from hidiff_export.errors import CheckpointError
from hidiff_export.families import Family, Task, Width, controlnet_config, unet_config
from hidiff_export.model.state_dict import Shapes


class Component(str, Enum):
    """A network of the pipeline; the value is its folder's name in a diffusers checkpoint."""

    UNET = "unet"
    CONTROLNET = "controlnet"

    @property
    def class_name(self) -> str:
        """The network's class in diffusers."""
        return {"unet": "UNet2DConditionModel", "controlnet": "ControlNetModel"}[self.value]

    def config(self, family: Family, task: Task, width: Width) -> dict[str, Any]:
        """The published configuration: what a checkpoint of this family has to have."""
        return unet_config(family, task, width) if self is Component.UNET else controlnet_config(family, width)

    def empty(self, config: Mapping[str, Any]) -> torch.nn.Module:
        """The network on the meta device: all modules and shapes, no memory for weights, in evaluation mode.

        Raises CheckpointError for a configuration that diffusers cannot build.
        """
        try:
            with torch.device("meta"):
                model = self._class().from_config(dict(config))
        except (ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
            raise CheckpointError(
                f"diffusers cannot build a {self.class_name} from this configuration.",
                given=str(error),
                advice="Take the config.json that the checkpoint was published with.",
            ) from error
        return cast(torch.nn.Module, model.requires_grad_(False).eval())

    def full_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with the class defaults filled in, as a network built from it reports it."""
        return dict(cast(Any, self.empty(config)).config)

    def shapes(self, config: Mapping[str, Any]) -> Shapes:
        """Names and shapes of the network's tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.empty(config).state_dict().items()}

    def _class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.class_name)
