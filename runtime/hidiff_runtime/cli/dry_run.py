"""What a command would run, without running it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hidiff_runtime.bundle import Bundle
from hidiff_runtime.cli.outputs import Outputs
from hidiff_runtime.request import Request
from hidiff_runtime.text.encoding import TokenCounter


def describe_runs(bundle: Bundle, requests: Sequence[Request], outputs: Outputs, *, as_json: bool) -> str:
    """Every run with its prompts' tokens, its phases and its files.

    Raises:
        InputError: a prompt does not fit the bundle.
    """
    batch = bundle.manifest.batch
    counter = TokenCounter(bundle)
    files = [str(path) for path in outputs.pictures]
    runs = [
        _facts(bundle, counter, request, files[number * batch : (number + 1) * batch])
        for number, request in enumerate(requests)
    ]
    extra = [str(path) for path in outputs.extra]
    if as_json:
        return json.dumps({"backend": bundle.backend, "runs": runs, "sheets": extra}, indent=2)
    lines = [line for facts in runs for line in _lines(facts)]
    count = len(outputs.pictures) + len(extra)
    tail = [f"would write {count} file{'s' * (count > 1)}, running on {bundle.backend}; nothing was run"]
    return "\n".join([*lines, *(f"sheet     {path}" for path in extra), *tail])


def _facts(bundle: Bundle, counter: TokenCounter, request: Request, files: list[str]) -> dict[str, Any]:
    settings = request.settings
    prompts = []
    for text in (*request.prompts, *(request.negative_prompts or ())):
        tokens, cut = counter.count(text, long_prompt=settings.long_prompt)
        prompts.append({"text": text, "tokens": tokens, "cut": cut})
    spans = request.phases(bundle.manifest).spans
    return {
        "prompts": prompts,
        "seed": settings.seed,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "strength": settings.strength,
        "guidance_scale": settings.guidance_scale,
        "guidance_rescale": settings.guidance_rescale,
        "phases": [{"phase": span.phase.name, "first": span.first, "last": span.last} for span in spans],
        "given": list(request.given),
        "files": files,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for prompt in facts["prompts"]:
        cut = f", of which is cut: {prompt['cut']!r}" if prompt["cut"] else ""
        lines.append(f"prompt    {prompt['text']!r}, {prompt['tokens']} tokens{cut}")
    guidance = "none" if facts["guidance_scale"] is None else f"{facts['guidance_scale']:g}"
    guidance += f" rescaled by {facts['guidance_rescale']:g}" if facts["guidance_rescale"] else ""
    strength = "" if facts["strength"] is None else f", strength {facts['strength']:g}"
    lines.append(
        f"  run     seed {facts['seed']}, {facts['steps']} steps of {facts['sampler']}, guidance {guidance}{strength}"
    )
    spans = ", ".join(f"{span['phase']} {span['first']}-{span['last']}" for span in facts["phases"])
    lines.append(f"  phases  {spans}")
    if facts["given"]:
        lines.append(f"  from    {', '.join(facts['given'])}")
    return [*lines, *(f"  file    {path}" for path in facts["files"])]
