"""The samplers by name: which diffusers scheduler each one is, and what its name settles in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hidiff_export.errors import InputError


@dataclass(frozen=True)
class Sampler:
    """A sampler as users name it.

    Attributes:
        scheduler: the diffusers class.
        options: configuration that the name stands for, whatever the checkpoint's own says.
        edm: the diffusers class for checkpoints with an EDM noise schedule; empty where there is none.
    """

    scheduler: str
    options: Mapping[str, object] = field(default_factory=dict)
    edm: str = ""


_MULTISTEP = "DPMSolverMultistepScheduler"
_EDM_EULER, _EDM_MULTISTEP = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "ddpm": Sampler("DDPMScheduler"),
    "euler": Sampler("EulerDiscreteScheduler", edm=_EDM_EULER),
    "euler_ancestral": Sampler("EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": Sampler(
        _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}, _EDM_MULTISTEP
    ),
    "dpmpp_2m_karras": Sampler(
        _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}
    ),
    "dpmpp_2m_sde": Sampler(_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, _EDM_MULTISTEP),
    "unipc": Sampler("UniPCMultistepScheduler"),
    "deis": Sampler("DEISMultistepScheduler"),
    "pndm": Sampler("PNDMScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),
    "lcm": Sampler("LCMScheduler"),
    "tcd": Sampler("TCDScheduler"),
}
"""Every sampler there is a table for."""

EDM_SCHEDULERS = (_EDM_EULER, _EDM_MULTISTEP)
"""Classes of noise schedules without betas that tables are made from all the same."""


def find_sampler(name: str) -> Sampler:
    """Returns the sampler of that name.

    Raises:
        InputError: there is none.
    """
    try:
        return SAMPLERS[name]
    except KeyError:
        raise InputError(
            "There is no sampler of that name.", given=name, advice=f"Use {', '.join(SAMPLERS)}."
        ) from None


def has_edm_schedule(config: Mapping[str, Any]) -> bool:
    """Returns whether a configuration is of an EDM noise schedule (arXiv 2206.00364), which has no betas."""
    return config.get("_class_name") in EDM_SCHEDULERS


def samplers_for(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the samplers that a noise schedule of this configuration can be drawn with."""
    edm = has_edm_schedule(config)
    zero_snr = bool(config.get("rescale_betas_zero_snr")) and not edm
    return tuple(
        name
        for name, sampler in SAMPLERS.items()
        if (sampler.edm or not edm) and not (zero_snr and name in WITHOUT_ZERO_SNR)
    )


WITHOUT_ZERO_SNR = frozenset({"deis", "pndm", "heun"})
"""Samplers whose diffusers class passes over ``rescale_betas_zero_snr``: their timesteps would not be the model's."""
