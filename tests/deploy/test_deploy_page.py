"""docs/deploy.md names files, values, options, metrics and alerts that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hidiff_export.cli.triton import triton
from hidiff_runtime.serving.metrics import METRICS
from tests.deploy.metrics import OURS, TRITON, metrics_in

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/deploy.md"
CHART = ROOT / "deploy/helm/hidiff"


def keys(values: dict[str, Any], before: str = "") -> set[str]:
    """Every value of the chart as ``--set`` names it."""
    found = {before + key for key in values}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= keys(value, f"{before}{key}.")
    return found


def test_files_are_there() -> None:
    named = set(re.findall(r"(?<![\w/])deploy/[\w./-]+", PAGE.read_text()))
    assert "deploy/docker/Dockerfile" in named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_values_are_the_charts() -> None:
    values = keys(yaml.safe_load((CHART / "values.yaml").read_text()))
    named = set(re.findall(r"--set ([a-z][\w.]+)=\S", PAGE.read_text())) - {"backend"}
    assert {"image.digest", "storage.repository"} <= named <= values


def test_options_are_the_commands() -> None:
    options = {name for parameter in triton.params for name in parameter.opts}
    text = PAGE.read_text()
    named = set(re.findall(r"`(--(?:queue|max|memory|resident|prefetch|option|bundle|gpus)[\w-]*)", text))
    assert len(named) > 8
    assert named <= options


def test_metrics_and_alerts_are_there() -> None:
    assert metrics_in(PAGE) <= {*OURS, *TRITON, *(metric.name for metric in METRICS)}
    assert {metric.name for metric in METRICS} <= metrics_in(PAGE)
    alerts = {rule["alert"] for rule in yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"][0]["rules"]}
    assert set(re.findall(r"`(Hidiff\w+)`", PAGE.read_text())) == alerts


def test_what_there_is_not_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`hidiff_heartbeat_total` and nv_nothing, hidiff_step_seconds_sum\n")
    assert metrics_in(page) - set(OURS) == {"hidiff_heartbeat_total", "nv_nothing"}
