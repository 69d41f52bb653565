"""What `quality` and `showcase` draw and see with: prompts of a file or of the bundle's own model, and features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidiff_export.demo_model import DEMO_SOURCE, demo_classifier, demo_prompts
from hidiff_export.errors import InputError
from hidiff_runtime.format.manifest import Manifest

if TYPE_CHECKING:
    from hidiff_export.quality.contenders import Shot
    from hidiff_export.quality.features import FeatureModel

Prompts = list[tuple[str, dict[str, Any]]]
"""Each prompt with what it settles for itself."""


def read_prompts(file: Path | None, manifest: Manifest) -> Prompts:
    """Returns the prompts of a file; without one, those that a bundle of the demo model is scored with.

    Raises:
        InputError: the file has none, or a row has several; or there is no file, for another model.
    """
    from hidiff_runtime.cli import prompt_options

    if file is None:
        if manifest.recipe.get("source") != DEMO_SOURCE:
            raise InputError(
                "There are no prompts to draw.",
                given=f"a bundle of {manifest.recipe.get('source')}",
                advice="Give --prompts FILE, a text file with a prompt in each line.",
            )
        file = demo_prompts()
    found = prompt_options.read_prompts(file)
    several = [prompt for prompt in found if not isinstance(prompt.text, str)]
    if several:
        raise InputError(
            "Pictures are compared one by one, so each row has one prompt.",
            given=f"{file}, {several[0].where}: a list",
            advice="Write a row for each of them.",
        )
    return [(str(prompt.text), prompt.settings) for prompt in found]


def shots_of(prompts: Prompts, count: int, seed: int, settings: dict[str, Any]) -> list[Shot]:
    """Returns at most ``count`` of the prompts, evenly spread, with seeds counted up from ``seed``."""
    from hidiff_export.quality.contenders import Shot
    from hidiff_runtime.pipeline.contact_sheet import spread
    from hidiff_runtime.pipeline.request_values import RANDOM

    shots = []
    for index, (text, own) in enumerate(prompts[place] for place in spread(len(prompts), count)):
        told = own.get("seed", RANDOM)
        shots.append(Shot(text, seed + index if told == RANDOM else told, {**own, **settings}))
    return shots


def features_for(model: Path | None, manifest: Manifest) -> FeatureModel | None:
    """Returns the feature model at a path; without one, the demo model's classifier for its bundles, else None.

    Raises:
        InputError: there is none at this path.
        CheckpointError: the demo model is damaged.
    """
    from hidiff_export.quality.features import open_features

    if model is None and manifest.recipe.get("source") == DEMO_SOURCE:
        model = demo_classifier()
    return None if model is None else open_features(model)
