"""Compose, Prometheus and Grafana: taken by their own parsers, and every metric they name is one that there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hidiff_runtime.serving.metrics import METRICS
from tests.deploy.metrics import OURS, TRITON, metrics_in

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "helm/hidiff/files/alerts.yaml"
DASHBOARD = DEPLOY / "helm/hidiff/files/dashboard.json"
ADDED = {"instance", "job", "namespace", "pod", "model", "worker", "version", "reason", "gpu_uuid", "le"}
"""Labels of Prometheus, of Triton and of its sink."""
ENVIRONMENT = {
    "REPOSITORY": "/srv/model_repository",
    "GRAFANA_PASSWORD": "secret",
    "TRITON_DIGEST": "sha256:" + "a" * 64,
}


class Reset(yaml.YAMLObject):
    """Compose's ``!reset``: what stands under it in the file before is taken away."""

    yaml_tag = "!reset"
    yaml_loader = yaml.SafeLoader

    @classmethod
    def from_yaml(cls, _loader: yaml.SafeLoader, _node: yaml.Node) -> Reset:
        return cls()


def interpolated(text: str) -> str:
    """A Compose file's text with `ENVIRONMENT` in it."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        assert kind == ":-" or name in ENVIRONMENT, name
        return ENVIRONMENT.get(name, rest)

    return re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, text)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Two Compose files as Compose puts them together."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Reset):
            result.pop(key)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def compose(*names: str) -> dict[str, Any]:
    """What the Compose files come to."""
    result: dict[str, Any] = {}
    for name in names:
        result = merged(result, yaml.safe_load(interpolated((DEPLOY / "compose" / name).read_text())))
    return result


def expressions() -> Iterator[tuple[str, str]]:
    """Every query in alerts, dashboard and chart: where it stands, and its text with Grafana's variables filled in."""
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
    chart = (DEPLOY / "helm/hidiff/templates/inferenceservice.yaml").read_text()
    (query,) = re.findall(r"query: (.*)", chart)
    yield "autoscaling", re.sub(r"\{\{.*?\}\}", "name", query)


def unknown(query: str) -> set[str]:
    """Metrics and labels in a query that there are not. Raises ValueError where it does not parse."""
    import promql_parser

    parsed = promql_parser.parse(query)
    found = ungrouped(parsed)
    for name, selected in selectors(parsed):
        if name not in OURS and name not in TRITON:
            found.add(name)
        found |= {label for label in selected if label not in ADDED | OURS.get(name, set())}
    return found


def ungrouped(node: Any) -> set[str]:
    """Labels that a parsed query sums by and that none of the metrics below has."""
    import promql_parser

    found: set[str] = set()
    if isinstance(node, promql_parser.BinaryExpr):
        return ungrouped(node.lhs) | ungrouped(node.rhs)
    if isinstance(node, promql_parser.Call):
        return found.union(*map(ungrouped, node.args))
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        there = {label for name, _ in selectors(node.expr) for label in OURS.get(name, set())}
        found = {label for label in node.modifier.labels if label not in ADDED | there}
    return found | (ungrouped(node.expr) if hasattr(node, "expr") else set())


def selectors(node: Any) -> Iterator[tuple[str, list[str]]]:
    """The metrics in a parsed query, with the labels they are selected by."""
    import promql_parser

    if isinstance(node, promql_parser.MatrixSelector):
        yield from selectors(node.vector_selector)
    elif isinstance(node, promql_parser.VectorSelector):
        yield node.name, [matcher.name for matcher in node.matchers.matchers]
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from selectors(node.lhs)
        yield from selectors(node.rhs)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from selectors(argument)
    elif hasattr(node, "expr"):
        yield from selectors(node.expr)


@pytest.mark.needs("deploy-tools")
@pytest.mark.parametrize("names", [("compose.yaml",), ("compose.yaml", "cpu.yaml")])
def test_compose_takes_the_files(names: tuple[str, ...]) -> None:
    from compose_spec import PyCompose

    whole = compose(*names)
    parsed = PyCompose.from_yaml(yaml.safe_dump(whole))
    parsed.validate()
    assert set(parsed.service_names()) == {"triton", "prometheus", "grafana"}
    assert ("deploy" in whole["services"]["triton"]) is (names == ("compose.yaml",))


@pytest.mark.needs("deploy-tools")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"shm_siz": "1g"}, "shm_siz"),
        ({"networks": ["nowhere"]}, "nowhere"),
        ({"mem_limit": "lots"}, "lots"),
        ({"healthcheck": {"test": ["CMD", "a"], "interval": "10q"}}, "interval"),
    ],
)
def test_the_parser_of_compose_catches_what_is_wrong(wrong: dict[str, Any], words: str) -> None:
    from compose_spec import PyCompose

    with pytest.raises(ValueError, match=words):
        PyCompose.from_yaml(yaml.safe_dump(merged(compose("compose.yaml"), {"services": {"triton": wrong}}))).validate()


def test_containers_may_write_nothing_but_their_own() -> None:
    services = compose("compose.yaml")["services"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "mem_limit" in service, name
    assert all(volume["read_only"] for volume in services["triton"]["volumes"])
    assert not any(port.endswith(":8002") for port in services["triton"]["ports"])


def test_mounted_files_are_there() -> None:
    for service in compose("compose.yaml")["services"].values():
        for volume in service["volumes"]:
            if isinstance(volume, str) and volume.startswith("."):
                assert (DEPLOY / "compose" / volume.split(":")[0]).exists(), volume
    build = compose("compose.yaml")["services"]["triton"]["build"]
    assert (DEPLOY / "compose" / build["context"] / build["dockerfile"]).is_file()


@pytest.mark.needs("promtool")
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    text = (DEPLOY / "prometheus/prometheus.yaml").read_text()
    assert "/etc/prometheus/alerts.yaml" in text
    (tmp_path / "good.yaml").write_text(text.replace("/etc/prometheus/alerts.yaml", str(ALERTS)))
    (tmp_path / "wrong.yaml").write_text(text.replace("scrape_interval", "scrape_intervals"))
    for name, code in (("good", 0), ("wrong", 1)):
        done = subprocess.run(
            ["promtool", "check", "config", tmp_path / f"{name}.yaml"], capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr


@pytest.mark.needs("promtool")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("hidiff_heartbeat_seconds > 30", "hidiff_heartbeat_seconds > 300"),
        ("> 0.05 *", "> 0.5 *"),
        ('reason="REJECTED"', 'reason="OTHER"'),
        ("unless on (instance)", "or"),
        ("count by (bundle, backend, parity)", "count by (bundle, backend, instance)"),
    ],
)
def test_alerts_fire_when_they_should(tmp_path: Path, old: str, new: str) -> None:
    text = ALERTS.read_text()
    assert old in text
    (tmp_path / "alerts.yaml").write_text(text.replace(old, new))
    shutil.copy(Path(__file__).with_name("alerts_test.yaml"), tmp_path)
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "alerts_test.yaml"], capture_output=True, text=True)
    assert (done.returncode == 0) is (old == new), done.stdout + done.stderr


@pytest.mark.needs("deploy-tools")
@pytest.mark.parametrize(("place", "query"), list(expressions()))
def test_queries_ask_for_metrics_that_there_are(place: str, query: str) -> None:
    assert unknown(query) == set(), place


@pytest.mark.needs("deploy-tools")
def test_unknown_metrics_and_labels_are_caught() -> None:
    assert unknown('sum by (phase) (rate(hidiff_step_seconds_total{phase="a"}[5m]))') == {
        "hidiff_step_seconds_total",
        "phase",
    }
    assert unknown('1 - max(hidiff_pictures_total{kind="a"} / on (instance) nv_other)') == {"kind", "nv_other"}
    assert unknown("max(sum by (phase, size) (rate(hidiff_step_seconds_sum[5m])))") == set()
    assert unknown("max(60 * sum by (phase, size) (rate(hidiff_pictures_total[5m])))") == {"phase"}
    with pytest.raises(ValueError, match=r"."):
        unknown("sum by (")


def test_notes_name_metrics_that_there_are() -> None:
    assert metrics_in(DEPLOY / "helm/hidiff/templates/NOTES.txt") == {"hidiff_parity_info"}


def test_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        rows, columns = range(place["y"], place["y"] + place["h"]), range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
    shown = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert [metric.name for metric in METRICS if metric.name not in shown] == []
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    services = compose("compose.yaml")["services"]
    assert source["url"].split("/")[2].split(":")[0] in services
    (provider,) = yaml.safe_load((provisioning / "dashboards/hidiff.yaml").read_text())["providers"]
    places = [volume.split(":")[1] for volume in services["grafana"]["volumes"] if "dashboard.json" in volume]
    assert [str(Path(place).parent) for place in places] == [provider["options"]["path"]]
