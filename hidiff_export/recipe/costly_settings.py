"""Settings that leave so much out that a picture is as far from the full run's as one of another seed.

Measured on the demo model, 8 pictures at 256x256, ddim, PSNR in dB beside full runs; other seeds are at 15.9:

- features reused for 4 % of a run (every 2 of 50 steps) 34.9, 6 % 30.4, 10 % 27.7, 16 % 24.9, 24 % 22.9, 40 % 18.8; of
  10 steps for 20 % 25.8, 30 % 22.0, half 17.9, where other seeds are at 16.6;
- of 50 steps 22 computed and the others forecast 31.1, 19 29.7, 16 27.1, 14 23.0, 8 19.2, 6 8.4;
- guided until 60 % of a run 28.0, 50 % 25.2, 40 % 22.5, 30 % 21.2, 2 % 19.9: no end of guidance makes it another
  picture.
"""

from __future__ import annotations

from hidiff_export.recipe.recipe import Recipe

_REUSED = 0.5
"""Part of a run for which features serve."""

_COMPUTED = 0.14
"""Part of a run that is computed where the rest is forecast: between 6 and 8 of 50 steps."""


def costly_settings(recipe: Recipe) -> tuple[str, ...]:
    """Returns what to tell of a recipe's settings, a line each; the longest run is what they do least harm to."""
    steps, found = max(recipe.steps), []
    if recipe.reuse is not None and recipe.reuse.every >= _REUSED * steps:
        found.append(f"reuse: features serve for up to {recipe.reuse.every} of {steps} steps")
    forecast = recipe.forecast_record
    if forecast is not None and sum(forecast.computed(steps)) <= _COMPUTED * steps:
        found.append(f"forecast: {sum(forecast.computed(steps))} of {steps} steps are computed")
    told = "which may change a picture as much as another seed does (docs/less-work.md)"
    return tuple(f"{line}, {told}." for line in found)
