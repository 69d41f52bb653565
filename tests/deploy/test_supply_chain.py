"""What images are made of is named by digest and hash, and what starts them gives them no more than they need."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

from tests.deploy.helm import render
from tests.deploy.test_docker import DOCKERFILE, ROOT, instructions
from tests.deploy.test_monitoring import compose

REQUIREMENTS = ROOT / "deploy/docker/requirements"
CHART = ROOT / "deploy/helm/hidiff"
PYTHON = {
    "python_version": "3.12",
    "python_full_version": "3.12.14",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
}
EXTRAS = ("cpu", "openvino", "tensorrt", "tensorrt-rtx", "gpu")
IMAGES = {"runtime": ("hidiff-runtime[{}]",), "serve": ("hidiff-runtime[{},serve]",), "build": ("hidiff-export[{}]",)}
"""What the Dockerfile's stages install besides our own wheels, by the names of deploy/docker/requirements."""


def name_of(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(requirement: str) -> list[Requirement]:
    """What a requirement of one of our packages wants from others."""
    parsed = Requirement(requirement)
    if name_of(parsed.name) not in ("hidiff-export", "hidiff-runtime"):
        return [parsed]
    lines = [Requirement(line) for line in requires(parsed.name) or []]
    chosen = [
        line
        for line in lines
        if line.marker is None or any(line.marker.evaluate({**PYTHON, "extra": extra}) for extra in parsed.extras)
    ]
    return [found for line in chosen for found in wanted(str(line).split(";")[0])]


def locked(path: Path) -> dict[str, tuple[Version, int]]:
    """A lock's packages for Linux: version and number of hashes. Raises AssertionError for lines of any other kind."""
    found: dict[str, tuple[Version, int]] = {}
    for entry in re.sub(r"\\\n\s*", "", path.read_text()).splitlines():
        if entry.startswith("#"):
            continue
        pinned, _, hashes = entry.partition(" --hash=")
        match = re.fullmatch(r"([\w.-]+)==([\w.+!]+)( ; (.*))?", pinned.strip())
        assert match is not None, entry[:80]
        digests = f"--hash={hashes}".split()
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in digests), entry[:80]
        if match[4] is None or Marker(match[4]).evaluate(dict(PYTHON)):
            found[name_of(match[1])] = Version(match[2]), len(digests)
    return found


def constraints() -> dict[str, Version]:
    """The versions that the tests run."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {name_of(found.name): Version(str(found.specifier).removeprefix("==")) for found in pinned}


def unmet(requirements: list[Requirement], packages: dict[str, tuple[Version, int]]) -> list[str]:
    """The requirements that a lock does not meet."""
    return [
        str(requirement)
        for requirement in requirements
        if name_of(requirement.name) not in packages
        or not requirement.specifier.contains(packages[name_of(requirement.name)][0])
    ]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("image", IMAGES)
def test_a_lock_has_all_that_its_image_wants_at_the_versions_that_are_tested(image: str, extra: str) -> None:
    packages = locked(REQUIREMENTS / f"{image}-{extra}.txt")
    requirements = [found for line in IMAGES[image] for found in wanted(line.format(extra))]
    assert len(requirements) > 3
    assert unmet(requirements, packages) == []
    tested = constraints()
    assert {name: version for name, (version, _) in packages.items() if tested.get(name, version) != version} == {}
    assert packages["numpy"][1] > 10
    unwanted = {"torch", "diffusers", "transformers", "onnx"}
    assert (unwanted <= packages.keys()) if image == "build" else not (unwanted & packages.keys())


def test_a_lock_that_lacks_something_is_noticed(tmp_path: Path) -> None:
    text = (REQUIREMENTS / "serve-cpu.txt").read_text()
    without = tmp_path / "lock.txt"
    without.write_text(re.sub(r"^uvicorn==.*\\\n(    --hash.*\n)+", "", text, flags=re.MULTILINE))
    requirements = wanted("hidiff-runtime[cpu,serve]")
    assert [name.split(">")[0] for name in unmet(requirements, locked(without))] == ["uvicorn"]
    without.write_text(text.replace("uvicorn==0.", "uvicorn==0.0."))
    assert [name.split(">")[0] for name in unmet(requirements, locked(without))] == ["uvicorn"]
    without.write_text(re.sub(r" *--hash=sha256:\w+", " --hash=md5:0", text, count=1))
    with pytest.raises(AssertionError):
        locked(without)


def test_the_dockerfile_installs_nothing_without_a_hash() -> None:
    commands = [
        command
        for line in instructions(DOCKERFILE.read_text())
        if line.startswith("RUN")
        for command in line.split("&&")
        if re.search(r"pip .*\b(install|wheel|download)\b", command)
    ]
    assert len(commands) == 8
    for command in commands:
        ours = "/wheels/" in command and "--no-index" in command and "--no-deps" in command
        source = "pip wheel" in command and "--no-build-isolation" in command and "--no-deps" in command
        locks = "--require-hashes --no-deps" in command and "/requirements" in command
        assert ours or source or locks, command
    assert {path.name for path in REQUIREMENTS.iterdir()} == {
        "wheels.txt",
        *(f"{image}-{extra}.txt" for image in IMAGES for extra in EXTRAS),
    }


def test_images_are_named_by_digest() -> None:
    text = DOCKERFILE.read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE))
    bases = [line.split()[1] for line in instructions(text) if line.startswith("FROM")]
    assert len(bases) == 4
    for base in bases:
        whole = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], base)
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", whole), base
    assert "# syntax" not in text, "a frontend is an image too"
    services = compose("compose.yaml")["services"]
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[\w./-]+@sha256:[0-9a-f]{64}", services[name]["image"]), name


@pytest.mark.needs("deploy-tools")
def test_the_chart_names_an_image_by_its_digest() -> None:
    digest = "sha256:" + "b" * 64
    for image, named in (
        ({"digest": digest}, f"hidiff-runtime@{digest}"),
        ({"digest": digest, "tag": "1"}, f"hidiff-runtime@{digest}"),
        ({"tag": "1"}, "hidiff-runtime:1"),
        ({"repository": f"a/b@{digest}"}, f"a/b@{digest}"),
        ({}, f"hidiff-runtime:{yaml.safe_load((CHART / 'Chart.yaml').read_text())['appVersion']}"),
    ):
        files = render(CHART, {"image": image, "mode": "deployment"})
        (deployment,) = [
            found for found in yaml.safe_load_all(files["deployment.yaml"]) if found["kind"] == "Deployment"
        ]
        assert [found["image"] for found in deployment["spec"]["template"]["spec"]["containers"]] == [named]
    with pytest.raises(ValueError, match="digest"):
        render(CHART, {"image": {"digest": "sha256:abc"}})


def commands(text: str) -> list[str]:
    """The ``docker run`` commands of a page, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if re.match(r"\s*(\$ )?docker run\b", line)]


def test_every_command_that_starts_a_container_bounds_it() -> None:
    pages = [ROOT / "README.md", ROOT / "runtime/README.md", *(ROOT / "docs").glob("*.md")]
    shown = [command for page in pages for command in commands(page.read_text())]
    assert len(shown) == 2
    for command in shown:
        for option in ("--cap-drop ALL", "--security-opt no-new-privileges", "--memory ", "--pids-limit ", "--rm"):
            assert option in command, (option, command)
