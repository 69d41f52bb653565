"""The chart, rendered by Helm itself and compared with the schemas of Kubernetes and of KServe."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.helm import lint, render

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/hidiff"
KUBERNETES = "1.37"
EVERYTHING = {
    "image": {"pullSecrets": [{"name": "registry"}]},
    "storage": {"bundle": "bundle"},
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"gpu": "h100"},
    "affinity": {"nodeAffinity": {}},
    "extraEnv": [{"name": "LOG", "value": "1"}],
    "monitoring": {"labels": {"release": "kube-prometheus-stack"}},
    "networkPolicy": {"egress": [{"to": [{"podSelector": {}}]}]},
}
CASES: dict[str, dict[str, Any]] = {
    "kserve": {},
    "deployment": {"mode": "deployment"},
    "kserve, everything": {**EVERYTHING, "autoscaling": {"enabled": True}},
    "deployment, everything": {**EVERYTHING, "mode": "deployment", "gpus": 0},
    "kserve, copied": {
        "storage": {"uri": "s3://pictures/sdxl"},
        "networkPolicy": {"egress": [{"ports": [{"port": 443}]}]},
    },
}
# A predictor of KServe is a PodSpec with these beside it, as far as the chart uses them: serving.kserve.io/v1beta1 of
# KServe 0.20, Apache-2.0, config/crd/full/serving.kserve.io_inferenceservices.yaml.
EXTERNAL = {
    "type": "object",
    "required": ["metric", "target"],
    "additionalProperties": False,
    "properties": {
        "metric": {
            "additionalProperties": False,
            "properties": {
                "backend": {"enum": ["prometheus", "graphite"]},
                "serverAddress": {"type": "string"},
                "query": {"type": "string"},
            },
        },
        # The schema has averageValue too, and KServe's code for KEDA passes over it: the threshold would be 0.
        "target": {
            "required": ["type", "value"],
            "additionalProperties": False,
            "properties": {"type": {"const": "Value"}, "value": {"type": ["integer", "string"]}},
        },
    },
}
EXTENSION = {
    "minReplicas": {"type": "integer"},
    "maxReplicas": {"type": "integer"},
    "timeout": {"type": "integer"},
    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    "deploymentStrategy": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "type": {"type": "string"},
            "rollingUpdate": {
                "additionalProperties": False,
                "properties": {
                    "maxSurge": {"type": ["integer", "string"]},
                    "maxUnavailable": {"type": ["integer", "string"]},
                },
            },
        },
    },
    "autoScaling": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "metrics": {
                "type": "array",
                "items": {
                    "required": ["type"],
                    "additionalProperties": False,
                    "properties": {"type": {"enum": ["Resource", "External", "PodMetric"]}, "external": EXTERNAL},
                },
            }
        },
    },
}
MONITORING = {"PodMonitor", "PrometheusRule"}

pytestmark = pytest.mark.needs("deploy-tools")


@cache
def manifests(case: str) -> list[dict[str, Any]]:
    """The objects of a case, but for the notes."""
    files = render(CHART, CASES[case])
    texts = [text for name, text in sorted(files.items()) if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found is not None]


def only(case: str, kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = [manifest for manifest in manifests(case) if manifest["kind"] == kind]
    return found


def pod(case: str) -> dict[str, Any]:
    """The fields of the pod that serves, and the extension's with KServe."""
    if case.startswith("kserve"):
        spec = only(case, "InferenceService")["spec"]
        assert list(spec) == ["predictor"]
        return dict(spec["predictor"])
    return dict(only(case, "Deployment")["spec"]["template"]["spec"])


def check_kubernetes(manifest: dict[str, Any]) -> None:
    """Raises ValidationError where the API would refuse a manifest, or not know one of its fields."""
    import kubernetes_validate

    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def check_predictor(predictor: dict[str, Any]) -> None:
    """Raises ValidationError where KServe's or Kubernetes' schema refuses a predictor."""
    from jsonschema import validate

    extension = {name: value for name, value in predictor.items() if name in EXTENSION}
    validate(extension, {"type": "object", "properties": EXTENSION})
    spec = {name: value for name, value in predictor.items() if name not in EXTENSION}
    check_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec})


def test_linter_finds_nothing() -> None:
    assert lint(CHART) == []


def test_linter_catches_what_is_wrong(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "hidiff")
    with (tmp_path / "hidiff/templates/podmonitor.yaml").open("a") as file:
        file.write("{{ .Values.nowhere.at.all }}\n")
    assert "nil pointer" in " ".join(lint(tmp_path / "hidiff"))


@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_every_object(case: str) -> None:
    kinds = set()
    for manifest in manifests(case):
        kinds.add(manifest["kind"])
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"
        if manifest["kind"] == "InferenceService":
            assert manifest["apiVersion"] == "serving.kserve.io/v1beta1"
            check_predictor(manifest["spec"]["predictor"])
        elif manifest["kind"] not in MONITORING:
            check_kubernetes(manifest)
    serves = {"InferenceService"} if case.startswith("kserve") else {"Deployment", "Service"}
    assert kinds == {*serves, *MONITORING, "PodDisruptionBudget", "NetworkPolicy", "ConfigMap"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("containers", 0, "livenesProbe"), {}),
        (("containers", 0, "startupProbe", "failureThreshold"), "often"),
        (("deploymentStrategy", "rollingUpdate", "maxSurges"), 1),
        (("minReplicas",), "one"),
        (("autoScaling", "metrics", 0, "external", "metric", "backend"), "guess"),
    ],
)
def test_schemas_catch_what_is_wrong(path: tuple[str | int, ...], value: object) -> None:
    predictor = json.loads(json.dumps(pod("kserve, everything")))
    check_predictor(predictor)
    place: Any = predictor
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(Exception, match=r"was unexpected|is not of type|is not one of|is not valid"):
        check_predictor(predictor)


@pytest.mark.parametrize("case", CASES)
def test_pods_may_do_nothing_but_serve(case: str) -> None:
    spec = pod(case)
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    claims = [mount for mount in container["volumeMounts"] if mount["name"] == "models"]
    assert all(mount["readOnly"] is True for mount in claims)
    assert all(volume["persistentVolumeClaim"]["readOnly"] for volume in spec["volumes"] if volume["name"] == "models")
    written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"/dev/shm", "/tmp"}


def test_values_reach_the_pod() -> None:
    container = pod("deployment, everything")["containers"][0]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert pod("deployment")["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "models"] == [
        "/models",
        "/bundle",
    ]
    copied = {entry["name"]: entry["value"] for entry in pod("kserve, copied")["containers"][0]["env"]}
    assert copied == {"STORAGE_URI": "s3://pictures/sdxl", "MODEL_REPOSITORY": "/mnt/models/model_repository"}
    files = render(CHART, {"startupSeconds": 3601, "image": {"repository": "pictures@sha256:0"}})
    container = yaml.safe_load(files["inferenceservice.yaml"])["spec"]["predictor"]["containers"][0]
    assert container["image"] == "pictures@sha256:0"
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 3601


@pytest.mark.parametrize("case", CASES)
def test_what_selects_pods_selects_these(case: str) -> None:
    if case.startswith("kserve"):
        labels = pod(case)["labels"]
    else:
        labels = only(case, "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert only(case, "Service")["spec"]["selector"] == labels
    assert only(case, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert only(case, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert only(case, "PodMonitor")["spec"]["selector"]["matchLabels"] == labels
    ports = {port["name"] for port in pod(case)["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in only(case, "PodMonitor")["spec"]["podMetricsEndpoints"]} <= ports


def test_network_policy_opens_the_three_ports_alone() -> None:
    policy = only("kserve", "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    opened = {port["port"]: rule["from"] for rule in policy["ingress"] for port in rule["ports"]}
    assert set(opened) == {8000, 8001, 8002}
    assert opened[8002] != opened[8000]
    assert all(rule["from"] for rule in policy["ingress"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gpu": 1}, "additional properties 'gpu' not allowed"),
        ({"mode": "knative"}, "mode"),
        ({"extraArgs": ["--model-control-mode=explicit"]}, "extraArgs"),
        ({"networkPolicy": {"clients": []}}, "clients"),
        ({"heartbeatSeconds": 5}, "heartbeatSeconds"),
        ({"storage": {"claim": ""}}, "must say where the model repository is"),
        ({"mode": "deployment", "storage": {"uri": "s3://a/b"}}, "are KServe's"),
        ({"storage": {"uri": "s3://a/b"}}, "what it may reach"),
        ({"mode": "deployment", "autoscaling": {"enabled": True}}, "are KServe's"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render(CHART, values)
