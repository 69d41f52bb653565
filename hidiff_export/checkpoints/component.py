"""The networks that are loaded, fabricated and stored: UNet, ControlNet, text encoders and VAE."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError

from hidiff_export.checkpoints.state_dict import Shapes
from hidiff_export.errors import CheckpointError
from hidiff_export.families.family import (
    Family,
    Task,
    Width,
    controlnet_config,
    text_encoder_configs,
    unet_config,
    vae_config,
)


class Component(str, Enum):
    """A network of the pipeline; the value is its folder's name in a diffusers checkpoint."""

    UNET = "unet"
    CONTROLNET = "controlnet"
    TEXT_ENCODER = "text_encoder"
    TEXT_ENCODER_2 = "text_encoder_2"
    VAE = "vae"

    @property
    def class_name(self) -> str:
        """The network's class in diffusers or transformers."""
        return _CLASSES[self.value]

    @property
    def is_text(self) -> bool:
        """Whether it is a text encoder, and so transformers' and not diffusers'."""
        return self in (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2)

    @property
    def written_as(self) -> dict[str, Any]:
        """How a configuration names its class: diffusers' way or transformers'."""
        return {"architectures": [self.class_name]} if self.is_text else {"_class_name": self.class_name}

    @property
    def free_keys(self) -> frozenset[str]:
        """What fine-tunes may set as they like: none of it changes a tensor or the graph's operators."""
        if self is Component.TEXT_ENCODER:
            return frozenset({"eos_token_id", "projection_dim"})  # it has no projection, whatever its file says
        if self is Component.TEXT_ENCODER_2:
            return frozenset({"eos_token_id"})
        if self is Component.VAE:
            return frozenset({"sample_size", "scaling_factor", "force_upcast"})
        return frozenset({"sample_size", "upcast_attention"})

    def config(self, family: Family, task: Task, width: Width) -> dict[str, Any]:
        """Returns the published configuration: what a checkpoint of this family has to have."""
        if self.is_text:
            return text_encoder_configs(family, width)[self.value]
        if self is Component.VAE:
            return vae_config(family, width)
        return unet_config(family, task, width) if self is Component.UNET else controlnet_config(family, width)

    def empty(self, config: Mapping[str, Any]) -> torch.nn.Module:
        """Returns the network on the meta device: all modules and shapes, no memory for weights, in evaluation mode.

        Raises CheckpointError for a configuration that its library cannot build.
        """
        try:
            with torch.device("meta"):
                model = self._from_config(config)
        except (*_UNBUILDABLE, StrictDataclassError) as error:
            raise CheckpointError(
                f"{'transformers' if self.is_text else 'diffusers'} cannot build a {self.class_name} from this "
                "configuration.",
                given=" ".join(str(error).split()),
                advice="Take the config.json that the checkpoint was published with.",
            ) from error
        return cast(torch.nn.Module, model.requires_grad_(False).eval())

    def full_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a configuration with the class defaults filled in, as a network built from it reports it."""
        if self.is_text:
            # The rest is how transformers is to run it (attention kernels, types, quantization), which is not ours.
            known = (*self.config(Family.SDXL, Task.TEXT_TO_IMAGE, Width.FULL), _EPSILON)
            network: Any = self.empty({key: config[key] for key in known if key in config})
            full = network.config.to_dict()
            return {key: full[key] for key in known if key not in _UNUSED_TOKENS}
        return dict(cast(Any, self.empty(config)).config)

    def shapes(self, config: Mapping[str, Any]) -> Shapes:
        """Names and shapes of the network's tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.empty(config).state_dict().items()}

    def _from_config(self, config: Mapping[str, Any]) -> Any:
        if self.is_text:
            import transformers

            return getattr(transformers, self.class_name)(transformers.CLIPTextConfig(**config))
        import diffusers

        return getattr(diffusers, self.class_name).from_config(dict(config))


_CLASSES = {
    "unet": "UNet2DConditionModel",
    "controlnet": "ControlNetModel",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "vae": "AutoencoderKL",
}
_UNBUILDABLE = (ValueError, TypeError, KeyError, IndexError, NotImplementedError, ArithmeticError)
"""What diffusers and transformers raise for a configuration beside transformers' own validation errors."""

_EPSILON = "layer_norm_eps"
"""Of a text encoder's normalizations: no family sets it, and a checkpoint that does is another network."""

_UNUSED_TOKENS = ("bos_token_id", "pad_token_id")
"""Keys of a text encoder's configuration that change nothing it computes."""
