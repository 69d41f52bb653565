"""The profile that ONNX Runtime writes of a session, summed up by operator."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path


def seconds_by_operator(profile: Path) -> dict[str, float]:
    """Returns the seconds of each kind of operator in a session's last evaluation, the longest first."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    began = max(event["ts"] for event in events if event["name"] == "model_run")
    found: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["ts"] >= began and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]] += event["dur"]
    return {name: microseconds / 1e6 for name, microseconds in found.most_common()}
