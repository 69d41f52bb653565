"""Samplers and noise schedules by the names that web UIs for Stable Diffusion know.

A web UI names the sampler and, since 2024, the schedule beside it (``Schedule type``); before, the schedule was the end
of the sampler's name. A schedule is a list of timesteps or of noise levels, so a table's own says what it is called:
diffusers' ``trailing`` is ``SGM Uniform``, and so is its ``linspace`` for DPM++, which leaves out the last timestep.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hidiff_runtime.sampling.scheduler_table import SamplerTable

Timesteps = NDArray[np.float64]

NAMES: Mapping[str, str] = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "deis": "DEIS",
    "pndm": "PLMS",
    "heun": "Heun",
    "lcm": "LCM",
    "tcd": "TCD",
}
"""The web UIs' name of each sampler; those without keep their own."""

AUTOMATIC = "Automatic"
_UNIFORM, _SGM, _DDIM, _KARRAS, _EXPONENTIAL = "Uniform", "SGM Uniform", "DDIM", "Karras", "Exponential"

_SIGMAS = {"use_karras_sigmas": _KARRAS, "use_exponential_sigmas": _EXPONENTIAL, "use_beta_sigmas": "Beta"}
"""Schedules of noise levels: by the key of diffusers' configuration that asks for them."""

_OTHER_SIGMAS = ("use_lu_lambdas", "use_flow_sigmas")
"""Keys that ask for noise levels that web UIs have no word for."""

_TIMESTEPS: Mapping[str, Callable[[int], Timesteps]] = {
    _SGM: lambda steps: np.linspace(999, 0, steps + 1)[:-1],
    _UNIFORM: lambda steps: np.linspace(999, 0, steps),
    _DDIM: lambda steps: np.arange(1, 1000, max(1000 // steps, 1), dtype=np.float64)[::-1],
}
"""Schedules of timesteps, of 1000; what fits first is a table's word."""

_SAME = {"Normal": _UNIFORM, "Simple": _SGM, "Turbo": _SGM, "SGMUniform": _SGM}
"""Other words for what is the same to within `_NEAR`."""

_UNKNOWN = ("Polyexponential", "KL Optimal", "Align Your Steps")
"""Schedules that no table follows."""

_NEAR = 1.5
"""Timesteps, of 1000, between two that are rounded in different ways."""

_OWN_TIMESTEPS = ("DDIM", "PLMS", "UniPC")
"""Samplers for which web UIs take the timesteps of `_DDIM`, whatever schedule is named beside them."""

_USUAL = {"DPM++ 2M": _KARRAS, "DPM++ 2M SDE": _EXPONENTIAL}
"""What ``Automatic`` stands for beside these samplers; `_UNIFORM` beside others."""

_ALIASES = {
    "k_euler_a": "Euler a",
    "k_euler_ancestral": "Euler a",
    "k_euler": "Euler",
    "k_heun": "Heun",
    "k_lcm": "LCM",
    "k_dpmpp_2m": "DPM++ 2M",
    "k_dpmpp_2m_ka": "DPM++ 2M Karras",
    "k_dpmpp_2m_sde": "DPM++ 2M SDE",
    "k_dpmpp_2m_sde_ka": "DPM++ 2M SDE Karras",
    "plms": "PLMS",
    "pndm": "PLMS",
}
"""What APIs and other programs call samplers."""


def sampler_name(table: SamplerTable) -> str:
    """Returns the web UIs' name of a table's sampler; its own where they have none."""
    name = NAMES.get(table.sampler, table.sampler)
    heun = name == "DPM++ 2M SDE" and _config(table).get("solver_type") == "heun"
    return f"{name} Heun" if heun else name


def schedule_name(table: SamplerTable, steps: int) -> str | None:
    """Returns the web UIs' word for the schedule of a table's run; None where they have none that is true.

    Args:
        steps: of the whole run, a tabulated number.
    """
    if table.sampler not in NAMES:
        return None
    config = _config(table)
    if any(config.get(key) for key in _OTHER_SIGMAS):
        return None
    asked = next((name for key, name in _SIGMAS.items() if config.get(key)), None)
    if asked is not None or config.get("num_train_timesteps", 1000) != 1000:
        return asked
    fits = next((name for name in _TIMESTEPS if _follows_timesteps(table, steps, name)), None)
    return None if fits == _DDIM and sampler_name(table) in _OWN_TIMESTEPS else fits


def follows(table: SamplerTable, steps: int, schedule: str) -> bool:
    """Returns whether a table's run of so many steps has the schedule of this name, as `split_name` gives it."""
    named = schedule_name(table, steps)
    if schedule == AUTOMATIC:
        usual = None if sampler_name(table) in _OWN_TIMESTEPS else _USUAL.get(sampler_name(table), _UNIFORM)
        return named == usual
    if sampler_name(table) in _OWN_TIMESTEPS and named is None:
        return True  # web UIs have no other for these
    return named == schedule


def split_name(sampler: str, schedule: str | None) -> tuple[str, str | None]:
    """Returns a sampler and its schedule by the words of this module, from how pictures name them, old and new.

    ``DPM++ 2M Karras`` alone and ``DPM++ 2M`` beside ``Karras`` are the same. A sampler that is not known stays as it
    is; the schedule is None where nothing is said of it.
    """
    name = " ".join(sampler.split())
    name = _ALIASES.get(name.casefold(), name)
    found = None if schedule is None else _schedule(schedule)
    for word in (*_schedules(), *_SAME, "sgm_uniform"):
        if name.casefold().endswith(f" {word.casefold()}"):
            name, found = name[: -len(word) - 1], _schedule(word)
            break
    known = {each.casefold(): each for each in NAMES.values()}
    return NAMES.get(name, known.get(name.casefold(), name)), found


def _schedules() -> tuple[str, ...]:
    return (AUTOMATIC, *_UNKNOWN, *_SIGMAS.values(), *_TIMESTEPS)


def _schedule(word: str) -> str:
    """Returns the word of this module for a schedule; any other as it is."""
    plain = " ".join(word.replace("_", " ").split())
    known = {name.casefold(): name for name in _schedules()} | {name.casefold(): to for name, to in _SAME.items()}
    return known.get(plain.casefold(), plain)


def _follows_timesteps(table: SamplerTable, steps: int, name: str) -> bool:
    """Returns whether the timesteps, those that are evaluated twice counted once, are those of a schedule."""
    taken = list(dict.fromkeys(evaluation.timestep for evaluation in table.schedule(steps).evaluations))
    expected = _TIMESTEPS[name](steps)
    return len(taken) == len(expected) and bool(np.abs(np.array(taken) - expected).max() <= _NEAR)


def _config(table: SamplerTable) -> dict[str, Any]:
    """Returns the scheduler's configuration, as the table was made with it; nothing where it does not say."""
    found: dict[str, Any] = json.loads(table.origin.get("config", "{}"))  # an object, or the table was not read
    return found
