"""Tensors that lie in checkpoints and change no result: which of a file's a network needs, and which are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.contents import CONTROL_PREFIX, UNET_PREFIX, listed

MARKERS = frozenset({"v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"})
"""By these a single file says what its UNet predicts; they are no weights, and are read with the noise schedule."""

VAE_PREFIXES = ("first_stage_model.", "vae.")
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
ROOTS = {
    Component.UNET: (UNET_PREFIX,),
    Component.CONTROLNET: (CONTROL_PREFIX,),
    Component.TEXT_ENCODER: ("cond_stage_model.", "conditioner.embedders.0."),
    Component.TEXT_ENCODER_2: ("conditioner.embedders.1.",),
    Component.VAE: VAE_PREFIXES,
}
"""What whole checkpoints put before a network's names."""

_NETWORKS = tuple(root for part, roots in ROOTS.items() if part is not Component.CONTROLNET for root in roots)

_SPARE = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked)$"  # buffers of integers
    r"|^(model_ema|ema_model|ema)\."  # a second copy of the weights, averaged over training
    r"|(^|\.)loss\."  # the VAE's discriminator
    r"|^(global_step|iteration|epoch|step|optimizer(_states)?|lr_schedulers?|loops|callbacks)(\.|$)"
    r"|^(alphas|betas|posterior|sqrt|log_one_minus|ddim|lvlb)(_\w+)?$|^(log_)?sigmas$|^denoiser\.(log_)?sigmas$"
    r"|^(logvar|scale_factor|pytorch-lightning_version)$"
    r"|^safety_checker\."
)
"""Of any network: what its training left, and what is computed anew from the noise schedule."""

_SPARE_TEXT = re.compile(
    r"(^|\.)(logit_scale|logit_bias|attn_mask|visual_projection\.weight)$|(^|\.)(vision_model|visual)\."
)
"""Of a text encoder: the half of CLIP that looks at pictures, and what compares it with the other."""

_PROJECTION = re.compile(r"(^|\.)text_projection(\.weight)?$")
_RESBLOCK = re.compile(r"\.transformer\.resblocks\.(\d+)\.")


class SortedNames(NamedTuple):
    """A file's tensors: those of the network, those of it that change no result, and those of nothing known."""

    own: tuple[str, ...]
    left_out: tuple[str, ...]
    stray: tuple[str, ...]


def sort_names(component: Component, names: Sequence[str], config: Mapping[str, Any]) -> SortedNames:
    """Sorts a file's tensors; those of a whole checkpoint's other networks are in none of the three.

    What belongs to no network at all (schedules, averaged weights, counters) is told of the UNet or ControlNet.

    Args:
        component: the network wanted.
        names: of all tensors.
        config: the network's.
    """
    known = [name for name in names if name not in MARKERS]
    roots = ROOTS[component]
    inside = [name for name in known if name.startswith(roots)]
    outside = [name for name in known if not name.startswith((*roots, *_NETWORKS))]
    if not inside:
        others = () if component in (Component.UNET, Component.CONTROLNET) else _NETWORKS
        inside, outside = [name for name in known if not name.startswith(others)], []
        if component is Component.VAE and not any(name.startswith(VAE_PARTS) for name in inside):
            inside = []
    spare = [name for name in inside if _is_spare(component, name, config)]
    own = tuple(name for name in inside if name not in set(spare))
    if component not in (Component.UNET, Component.CONTROLNET):
        return SortedNames(own, tuple(spare), ())
    beside = [name for name in outside if _SPARE.search(name)]
    return SortedNames(own, (*spare, *beside), tuple(name for name in outside if name not in set(beside)))


def left_out_notices(component: Component, names: SortedNames) -> tuple[str, ...]:
    """Returns one line for what is left out of a network, and one for what belongs to none, where there is any."""
    groups = (
        (names.left_out, "change no result", "changes no result"),
        (names.stray, "belong to no network built here", "belongs to no network built here"),
    )
    return tuple(
        f"{component.value}: {len(group)} {f'tensors that {many} are' if len(group) > 1 else f'tensor that {one} is'} "
        f"left out: {listed(sorted(group))}"
        for group, many, one in groups
        if group
    )


def _is_spare(component: Component, name: str, config: Mapping[str, Any]) -> bool:
    if _SPARE.search(name):
        return True
    if not component.is_text:
        return False
    if _SPARE_TEXT.search(name):
        return True
    if component is Component.TEXT_ENCODER_2:
        return False
    # SD2.1's prompts are what the last layer but one gives: whole checkpoints have the last one too.
    layer = _RESBLOCK.search(name)
    return bool(_PROJECTION.search(name)) or (layer is not None and int(layer[1]) >= config["num_hidden_layers"])
