"""The samplers by name: which diffusers scheduler each one is, and what its name settles in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hidiff_export.errors import InputError


@dataclass(frozen=True)
class Sampler:
    """A sampler as users name it.

    Attributes:
        scheduler: the diffusers class.
        options: configuration that the name stands for, whatever the checkpoint's own says.
    """

    scheduler: str
    options: Mapping[str, object] = field(default_factory=dict)


_MULTISTEP = "DPMSolverMultistepScheduler"

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "ddpm": Sampler("DDPMScheduler"),
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler_ancestral": Sampler("EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": Sampler(_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}),
    "dpmpp_2m_karras": Sampler(
        _MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}
    ),
    "dpmpp_2m_sde": Sampler(_MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": Sampler("UniPCMultistepScheduler"),
    "deis": Sampler("DEISMultistepScheduler"),
    "pndm": Sampler("PNDMScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),
    "lcm": Sampler("LCMScheduler"),
}
"""Every sampler there is a table for."""


def find_sampler(name: str) -> Sampler:
    """The sampler of that name.

    Raises:
        InputError: there is none.
    """
    try:
        return SAMPLERS[name]
    except KeyError:
        raise InputError(
            "There is no sampler of that name.", given=name, advice=f"Use {', '.join(SAMPLERS)}."
        ) from None


def sampler_of(scheduler: str) -> str:
    """The name of the sampler that a checkpoint's scheduler class is.

    Raises:
        InputError: none of them is.
    """
    for name, sampler in SAMPLERS.items():
        if sampler.scheduler == scheduler:
            return name
    raise InputError(
        "No sampler is made from this scheduler class.",
        given=scheduler,
        advice=f"Name one of {', '.join(SAMPLERS)} in the recipe; the checkpoint's noise schedule is kept.",
    )
