"""The UNet calls of one pipeline's runs on a bundle's engines, less what the bundle leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from hidiff_export.diffusers_api.apply_hidiffusion import draw_window_shifts
from hidiff_export.diffusers_api.evaluate import evaluate
from hidiff_export.diffusers_api.forecast_calls import ForecastCalls
from hidiff_export.diffusers_api.kept_features import KeptFeatures
from hidiff_export.diffusers_api.run_tracker import RunTracker
from hidiff_export.diffusers_api.unguided_calls import control_of_prompts, has_both_halves, prompts_half
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.denoising.denoiser import OUTPUT
from hidiff_runtime.format.specs import PhaseRecord
from hidiff_runtime.phases import Phase, PhasePlan
from hidiff_runtime.reused_features import DEEP_FEATURES

_RESIDUALS = ("down_residual_", "mid_residual")
"""How the names of inputs for a ControlNet's residuals begin."""


class BundleCalls:
    """Evaluates a pipeline's UNet calls as the bundle's own runs do: some of the prompts alone, some shallow, some
    forecast.

    Args:
        bundle: whose engines compute.
        pipe: that calls.
        tracker: of its runs.
        full_run: whether every call is computed, guided and of all layers, whatever the bundle would leave out.

    Attributes:
        tracker: of the runs.
    """

    def __init__(self, bundle: Bundle, pipe: Any, tracker: RunTracker, *, full_run: bool) -> None:
        manifest = bundle.manifest
        forecast = None if full_run else manifest.forecast
        self._bundle = bundle
        self._pipe = pipe
        self.tracker = tracker
        self._rule = manifest.rule.whole if full_run else manifest.rule
        self._forecast = None if forecast is None else ForecastCalls(forecast, tracker)
        reuse = self._rule.reuse
        self._kept = None if reuse is None else KeptFeatures(reuse, tracker, self._phases_of, forecast)

    @property
    def takes_residuals(self) -> bool:
        """Whether the call at hand is computed, with a ControlNet's residuals."""
        return (self._forecast is None or self._forecast.computed) and self._phase.control

    def asked_of_control(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns what a ControlNet is asked in place of these arguments, by name."""
        return control_of_prompts(arguments) if self._halves(arguments["sample"]) else arguments

    def __call__(self, inputs: Mapping[str, torch.Tensor], timestep: torch.Tensor | float) -> torch.Tensor:
        """Returns the predicted noise, of the latents' batch, type and device.

        Args:
            inputs: by graph input name, batch first; a ControlNet's residuals whether the phase takes them or not.
            timestep: one number.

        Raises:
            InputError: the graphs do not take this, or it is a run in which nothing can be left out as the bundle does.
            EngineError: the engine does not load, failed, or gave NaN.
        """
        blocks = len(self._bundle.manifest.windowed_blocks)
        # Of forecast calls too, so that those after them have the shifts of a run that computes all.
        shifts = draw_window_shifts(self.tracker.generators, blocks) if blocks else None
        latents = inputs["latents"]
        if self._forecast is None:
            return self._computed(inputs, timestep, shifts).to(latents)
        self._forecast.batch = len(latents)
        self._forecast.begin()
        if not self._forecast.computed:
            return self._forecast.sample()
        noise_pred = self._computed(inputs, timestep, shifts).to(latents)
        self._forecast.keep(noise_pred)
        return noise_pred

    @property
    def _phase(self) -> Phase:
        return self._rule.phase_at(*self.tracker.position())

    def _phases_of(self, _latent_height: int, _latent_width: int) -> list[Phase]:
        return [self._rule.phase_at(*position) for position in self.tracker.positions()]

    def _halves(self, latents: torch.Tensor) -> bool:
        return self._phase.unguided and has_both_halves(self._pipe, latents)

    def _computed(
        self, inputs: Mapping[str, torch.Tensor], timestep: torch.Tensor | float, shifts: torch.Tensor | None
    ) -> torch.Tensor:
        """Evaluates the whole batch, or the prompts' half for both."""
        batch = len(inputs["latents"])
        if not self._halves(inputs["latents"]):
            return self._evaluated(inputs, timestep, shifts)
        half = self._evaluated(prompts_half(inputs, batch), prompts_half(timestep, batch), shifts)
        return torch.cat([half] * 2)

    def _evaluated(
        self, inputs: Mapping[str, torch.Tensor], timestep: torch.Tensor | float, shifts: torch.Tensor | None
    ) -> torch.Tensor:
        """Evaluates all layers, or the outermost ones."""
        phase, wanted, latents = self._phase, [OUTPUT], inputs["latents"]
        features = None
        if self._kept is not None:
            self._kept.begin()
            features = self._kept.taken_for(latents)
            if features is None:
                self._kept.forget()
                wanted += [DEEP_FEATURES] if self._kept.wanted_after(latents) else []
            else:
                phase, inputs = replace(phase, shallow=True), {**inputs, DEEP_FEATURES: features}
        step, steps = self.tracker.position()
        plan, record = PhasePlan(self._rule, steps), self._bundle.manifest.phase(phase)
        inputs = _without_other_residuals(inputs, record)
        found = evaluate(self._bundle, record, plan, step, inputs, timestep, shifts, wanted)
        if self._kept is not None:
            self._kept.finish(latents, found.get(DEEP_FEATURES, features))
        return found[OUTPUT]


def _without_other_residuals(inputs: Mapping[str, torch.Tensor], record: PhaseRecord) -> dict[str, torch.Tensor]:
    """Returns the inputs less a ControlNet's residuals that the phase has no use for; a full phase with a ControlNet
    has use for all.
    """
    if record.phase.control and not record.phase.shallow:
        return dict(inputs)
    taken = {spec.name for spec in record.residuals}
    return {name: value for name, value in inputs.items() if name in taken or not name.startswith(_RESIDUALS)}
