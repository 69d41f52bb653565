"""The diffusers scheduler that a sampler's name and a checkpoint's configuration stand for, as pipelines make it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers

from hidiff_export.errors import ExportError
from hidiff_export.families.family import Family, Task
from hidiff_export.scheduler_tables.names import find_sampler, has_edm_schedule, samplers_for

TCD_ETA = 0.3
"""What diffusers' ``TCDScheduler.step`` takes where nobody says (gamma of arXiv 2402.19159)."""


def build_scheduler(
    sampler: str, config: Mapping[str, Any], *, timesteps: Sequence[int] | None = None, tcd_eta: float = TCD_ETA
) -> Any:
    """Returns the diffusers scheduler of that name with a checkpoint's configuration, as its ``from_config`` reads it.

    Keys of other scheduler classes are passed over, so that a checkpoint's configuration serves every sampler; but not
    those that say what the model was trained with.

    Args:
        sampler: a name of `hidiff_export.scheduler_tables.names.SAMPLERS`.
        config: the checkpoint's scheduler configuration, of whatever scheduler class.
        timesteps: of the one run there is, falling; left out, those that the scheduler chooses.
        tcd_eta: of the sampler ``tcd``, whose timesteps depend on it, so that it is not chosen for each run.

    Raises:
        InputError: there is no such sampler.
        ExportError: the scheduler refuses the configuration or the timesteps, or cannot draw such a noise schedule.
    """
    spec = find_sampler(sampler)
    if sampler not in samplers_for(config):
        what = "an EDM noise schedule" if has_edm_schedule(config) else "zero terminal SNR (rescale_betas_zero_snr)"
        raise ExportError(
            f"The sampler {sampler} cannot draw {what}.",
            given=f"diffusers' {spec.scheduler} takes none",
            advice=f"Use {', '.join(samplers_for(config))}.",
        )
    kind = getattr(diffusers, spec.edm if has_edm_schedule(config) else spec.scheduler)
    known = inspect.signature(kind.__init__).parameters
    given = {key: value for key, value in config.items() if key in known or key == "_use_default_values"}
    options = {key: value for key, value in spec.options.items() if key in known}
    overrides = _fixed_timesteps(kind, timesteps) | (_fixed_eta(kind, tcd_eta) if sampler == "tcd" else {})
    if sampler == "dpmpp_2m_karras" and not overrides:
        overrides = _begun_at_the_first(kind)
    if overrides:
        kind = type(kind.__name__, (kind,), {"__module__": kind.__module__, **overrides})
    try:
        scheduler = kind.from_config(given, **options)
        if timesteps is not None:
            scheduler.set_timesteps(len(timesteps))
            scheduler = kind.from_config(given, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ExportError(
            f"{kind.__name__} refuses this configuration.",
            given=error,
            advice="Choose another sampler, leave timesteps out, or correct the scheduler's configuration.",
        ) from error
    return scheduler


def corrected(config: Mapping[str, Any], family: Family, task: Task) -> dict[str, Any]:
    """Returns a checkpoint's scheduler configuration as diffusers' pipeline of this family and task runs it.

    Early checkpoints left settings out whose defaults are wrong for them. The pipelines of Stable Diffusion 1.5 and 2
    put them right whenever they are made, those of SDXL and those with a ControlNet do not.
    """
    if family.is_sdxl or task.has_control:
        return dict(config)
    if task is Task.INPAINTING:
        return {**config, "steps_offset": 1, "skip_prk_steps": True}
    return {**config, "steps_offset": 1, "clip_sample": False}


def _fixed_timesteps(kind: Any, timesteps: Sequence[int] | None) -> dict[str, Any]:
    """Returns the method by which pipelines lay out a run, with the timesteps settled beforehand."""
    if timesteps is None:
        return {}
    if "timesteps" not in inspect.signature(kind.set_timesteps).parameters:
        raise ExportError(
            f"{kind.__name__} takes no timesteps of one's own.",
            given=list(timesteps),
            advice="Leave timesteps out, or use one of the samplers ddpm, euler, dpmpp_2m, heun, lcm and tcd.",
        )

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None, *rest: Any) -> None:
        if rest:  # Heun's constructor, which lays out the training timesteps
            kind.set_timesteps(self, num_inference_steps, device, *rest)
            return
        if num_inference_steps != len(timesteps):
            raise ValueError(f"there are timesteps for {len(timesteps)} steps")
        kind.set_timesteps(self, timesteps=list(timesteps), device=device)

    return {"set_timesteps": set_timesteps}


def _begun_at_the_first(kind: Any) -> dict[str, Any]:
    """Returns the layout of a run that begins with its first sigma, also where two sigmas round to one timestep.

    Diffusers looks a run's first timestep up, takes the second of two that are alike, and steps past the end. Karras'
    sigmas come so close where many steps meet a schedule that is steep at its end, as with zero terminal SNR.
    """

    def set_timesteps(self: Any, num_inference_steps: int | None = None, *rest: Any, **options: Any) -> None:
        kind.set_timesteps(self, num_inference_steps, *rest, **options)
        if len(self.timesteps) > 1 and self.timesteps[0] == self.timesteps[1]:
            self.set_begin_index(0)

    return {"set_timesteps": set_timesteps}


def _fixed_eta(kind: Any, eta: float) -> dict[str, Any]:
    """TCD's step with its eta settled beforehand; without one in its signature, pipelines hand it none."""

    def step(
        self: Any, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        return kind.step(self, model_output, timestep, sample, eta=eta, generator=generator, return_dict=return_dict)

    return {"step": step}
