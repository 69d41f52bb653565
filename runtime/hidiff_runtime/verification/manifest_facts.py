"""What a manifest says that no engine, weight or table shows, compared with what it said when samples were recorded.

Sizes, batch and inputs are compared with the engines', and sampler tables with diffusers; but nothing computes a
default, or the steps at which phases change. The samples keep them a second time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from hidiff_runtime.format.left_out import left_out
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.phases import PhasePlan, PhaseRule
from hidiff_runtime.verification.comparison import Verdict, compare
from hidiff_runtime.verification.reference_samples import ReferenceSamples
from hidiff_runtime.verification.replay_components import EXACT

FACTS = "manifest against its recording"

_PLAIN = (
    *("family", "task", "width", "height", "batch", "guidance", "precision", "default_sampler", "guidance_rescale"),
    *("force_zeros_for_empty_prompt",),
)


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """Returns the facts as JSON values; the phases of each step for every number of steps up to the most there are."""
    vae = manifest.vae
    return {
        **{name: getattr(manifest, name) for name in _PLAIN},
        **left_out(manifest),
        "latent": list(manifest.latent),
        "windowed_blocks": list(manifest.windowed_blocks),
        "samplers": sorted(manifest.samplers),
        "steps": list(manifest.steps),
        "clip_skip": {record.name: record.clip_skip for record in manifest.text_encoders},
        "scaling_factor": None if vae is None else vae.scaling_factor,
        "overlap": None if vae is None else vae.overlap,
        "preview": None if vae is None else [list(row) for row in vae.preview],
        "phases": [_phases(manifest.rule, steps) for steps in range(1, max(manifest.steps) + 2)],
    }


def _phases(rule: PhaseRule, steps: int) -> list[list[Any]]:
    """Returns the phases of a run and how many steps each takes; asked step by step, as a run does."""
    plan = PhasePlan(rule, steps)
    names = (plan.phase_at(step).name for step in range(steps))
    return [[name, len(list(those))] for name, those in itertools.groupby(names)]


def replay_facts(manifest: Manifest, samples: ReferenceSamples) -> Verdict | None:
    """Returns the verdict on what the manifest says; None for samples from before it was recorded."""
    if not samples.facts:
        return None
    return compare_facts(FACTS, samples.facts, facts_of(manifest))


def compare_facts(boundary: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Verdict:
    """Compares facts; a fact that only one of them has differs."""
    names = sorted(expected.keys() | found.keys())
    differing = [name for name in names if expected.get(name) != found.get(name)]
    if differing:
        text = "; ".join(_difference(name, expected.get(name), found.get(name)) for name in differing[:3])
        return Verdict(boundary, EXACT, None, fault=text)
    agreed = np.ones(len(names))
    return compare(boundary, agreed, agreed, EXACT)


def _difference(name: str, expected: object, found: object) -> str:
    if name == "phases" and isinstance(expected, list) and isinstance(found, list):
        pairs = itertools.zip_longest(expected, found)
        steps = next(number for number, (one, other) in enumerate(pairs, start=1) if one != other)
        ends = [runs[steps - 1] if steps <= len(runs) else None for runs in (expected, found)]
        return f"phases of {steps} steps: expected {ends[0]}, got {ends[1]}"
    return f"{name}: expected {str(expected)[:80]}, got {str(found)[:80]}"
