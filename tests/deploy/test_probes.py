"""The probe as Dockerfile, Compose and chart spell it, run as it stands against a page of metrics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def commands() -> dict[str, list[str]]:
    """Every probe of the heartbeat, by where it stands."""
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    (text,) = re.findall(r"CMD (\[.*probe.*\])", dockerfile)
    found = {"image": json.loads(text)}
    service = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())["services"]["triton"]
    found["compose"] = service["healthcheck"]["test"][1:]
    template = (DEPLOY / "helm/hidiff/templates/_helpers.tpl").read_text()
    listed = re.search(r"livenessProbe:\n  exec:\n    command:\n((?:      - .*\n)+)", template)
    assert listed is not None
    values = yaml.safe_load((DEPLOY / "helm/hidiff/values.yaml").read_text())
    text = listed[1].replace("{{ .Values.heartbeatSeconds | quote }}", f'"{values["heartbeatSeconds"]}"')
    found["chart"] = yaml.safe_load(text)
    return found


def test_all_places_have_one() -> None:
    assert set(commands()) == {"image", "compose", "chart"}


@pytest.mark.parametrize(("place", "command"), commands().items())
def test_the_probe_as_it_stands(place: str, command: list[str], tmp_path: Path) -> None:
    assert command[0] == "/opt/hidiff/bin/python"
    (url,) = [word for word in command if word.startswith("http://")]
    assert url == "http://127.0.0.1:8002/metrics", place
    assert command[command.index("--older-than") + 1] == "30"
    for age, code in ((-600, 0), (35, 1)):  # a beat of the future, since the command takes what it takes
        page = tmp_path / f"{age}.txt"
        page.write_text(f'hidiff_parity_info{{}} 1\nhidiff_heartbeat_seconds{{model="a"}} {time.time() - age}\n')
        run = [sys.executable, *(page.as_uri() if word == url else word for word in command[1:])]
        done = subprocess.run(run, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, ""), done.stdout
