"""What a request comes to, in words and as JSON: for looking at before anything runs."""

from __future__ import annotations

from typing import Any

from hidiff_runtime.format.left_out import left_out, left_out_lines
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.prompt_encoding import TokenCounter
from hidiff_runtime.pipeline.request import Request

FIRST = 5
"""Requests that are shown of many."""


def describe_request(manifest: Manifest, counter: TokenCounter, request: Request) -> dict[str, Any]:
    """Returns a run's prompts with their tokens, its settings and its phases, as JSON values.

    Raises:
        InputError: a prompt does not fit the bundle.
    """
    settings = request.settings
    prompts = []
    for text in (*request.prompts, *(request.negative_prompts or ())):
        tokens, cut = counter.count(text, long_prompt=settings.long_prompt)
        prompts.append({"text": text, "tokens": tokens, "cut": cut})
    spans = request.phases(manifest).spans
    told = ("width", "height", "seed", "sampler", "steps", "strength", "guidance_scale", "guidance_rescale")
    return {
        "prompts": prompts,
        "negative_prompts": list(request.negative_prompts or ()),
        **{name: getattr(settings, name) for name in told},
        "phases": [{"phase": span.phase.name, "first": span.first, "last": span.last} for span in spans],
        "left_out": [] if settings.full_run else list(left_out_lines(left_out(manifest)).values()),
        "given": list(request.given),
    }


def request_lines(facts: dict[str, Any]) -> list[str]:
    """Returns what `describe_request` found as lines for a terminal."""
    lines = []
    negative = len(facts["prompts"]) - len(facts["negative_prompts"])
    for number, prompt in enumerate(facts["prompts"]):
        cut = f", of which is cut: {prompt['cut']!r}" if prompt["cut"] else ""
        label = "prompt   " if number < negative else "negative "
        lines.append(f"{label} {prompt['text']!r}, {prompt['tokens']} tokens{cut}")
    guidance = "none" if facts["guidance_scale"] is None else f"{facts['guidance_scale']:g}"
    guidance += f" rescaled by {facts['guidance_rescale']:g}" if facts["guidance_rescale"] else ""
    strength = "" if facts["strength"] is None else f", strength {facts['strength']:g}"
    size, steps = f"{facts['width']}x{facts['height']}", f"{facts['steps']} steps of {facts['sampler']}"
    lines.append(f"  run     {size}, seed {facts['seed']}, {steps}, guidance {guidance}{strength}")
    spans = ", ".join(f"{span['phase']} {span['first']}-{span['last']}" for span in facts["phases"])
    lines.append(f"  phases  {spans}")
    lines += [f"  {line}" for line in facts["left_out"]]
    if facts["given"]:
        lines.append(f"  from    {', '.join(facts['given'])}")
    return lines
