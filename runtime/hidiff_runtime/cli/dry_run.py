"""What a command would run, without running it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from hidiff_runtime.bundle import Bundle
from hidiff_runtime.cli.output_paths import OutputPaths
from hidiff_runtime.cli.prompt_options import Prompt
from hidiff_runtime.pipeline.prompt_encoding import TokenCounter
from hidiff_runtime.pipeline.request import Request
from hidiff_runtime.pipeline.request_summary import FIRST, describe_request, request_lines


def describe_runs(
    bundle: Bundle,
    asked: Sequence[Prompt],
    requests: Sequence[Request],
    outputs: OutputPaths,
    *,
    as_json: bool,
    warned: Sequence[str],
) -> str:
    """Returns every run with its prompts' tokens, its phases and its files; in words the first runs alone.

    JSON also has what was ``warned`` of on standard error.

    Raises:
        InputError: a prompt does not fit the bundle.
    """
    counter = TokenCounter(bundle)
    files = map(str, outputs.pictures)
    runs = [
        {
            **describe_request(bundle.sized(*request.size).manifest, counter, request),
            "where": prompt.where or None,
            "files": list(itertools.islice(files, len(request.prompts))),
        }
        for prompt, request in zip(asked, requests, strict=True)
    ]
    extra = [str(path) for path in outputs.extra]
    if as_json:
        return json.dumps({"backend": bundle.backend, "runs": runs, "sheets": extra, "warnings": warned}, indent=2)
    lines = [line for facts in runs[:FIRST] for line in _lines(facts)]
    if len(runs) > FIRST:
        lines.append(f"and {len(runs) - FIRST} more runs, which --json shows")
    count = len(outputs.pictures) + len(extra)
    tail = [f"would write {count} file{'s' * (count > 1)}, running on {bundle.backend}; nothing was run"]
    return "\n".join([*lines, *(f"sheet     {path}" for path in extra), *tail])


def _lines(facts: dict[str, Any]) -> list[str]:
    where = [f"{facts['where']}:"] if facts["where"] else []
    return [*where, *request_lines(facts), *(f"  file    {path}" for path in facts["files"])]
