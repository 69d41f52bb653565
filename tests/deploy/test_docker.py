"""The Dockerfile without Docker: linted, and its commands run as they stand."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import metadata
from pathlib import Path

import pytest
from needs import hadolint, triton_folder

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
SCRIPT = ROOT / "deploy/docker/hidiff-triton"


def instructions(text: str) -> list[str]:
    """Those of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines() if line.strip()]


def stage(name: str) -> list[str]:
    """The instructions of one stage."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in instructions(DOCKERFILE.read_text()):
        if line.startswith("FROM "):
            current = found[line.split()[-1]] = []
        current.append(line)
    return found[name]


def sources(text: str) -> set[str]:
    """What a Dockerfile takes from its context, by COPY and by bind mounts."""
    found: set[str] = set()
    for line in instructions(text):
        words = shlex.split(line)
        if words[0] == "COPY":
            found.update(word for word in words[1:-1] if not word.startswith("--"))
        for mount in (word.removeprefix("--mount=") for word in words if word.startswith("--mount=")):
            options = dict(option.split("=", 1) for option in mount.split(",") if "=" in option)
            if "from" not in options:
                found.add(options["source"])
    return found


def kept(path: str) -> bool:
    """Whether the ignore file leaves a path in the context: the last pattern that matches decides."""
    answer = True
    for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if (
            line
            and not line.startswith("#")
            and any(fnmatch.fnmatch(str(part), pattern) for part in (Path(path), *Path(path).parents[:-1]))
        ):
            answer = line.startswith("!")
    return answer


@pytest.mark.needs("deploy-tools")
def test_dockerfile_is_lint_free() -> None:
    done = subprocess.run([str(hadolint()), str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.needs("deploy-tools")
def test_the_linter_catches_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text() + "RUN cd /tmp && sudo ls $1\n")
    done = subprocess.run([str(hadolint()), str(wrong)], capture_output=True, text=True)
    assert done.returncode == 1
    assert {"DL3004", "SC2086"} <= set(re.findall(r"[A-Z]{2}\d{4}", done.stdout))


def test_all_that_is_copied_exists_and_is_in_the_context() -> None:
    found = sources(DOCKERFILE.read_text())
    assert found >= {"runtime", "hidiff_export", "deploy/docker/requirements", "deploy/docker/hidiff-triton"}
    assert [path for path in found if not (ROOT / path).exists()] == []
    assert [path for path in found if not kept(path)] == []


def test_the_context_leaves_out_all_else() -> None:
    assert sources("FROM a\nCOPY --chmod=0555 nowhere /x\n") == {"nowhere"}
    for path in ("demo-bundle", ".git", ".venv", "tests", "runtime/tests", "hidiff_export/__pycache__", "deploy/helm"):
        assert not kept(path), path


def test_every_extra_is_one_that_the_packages_have() -> None:
    text = DOCKERFILE.read_text()
    offered = re.search(r"EXTRA is the backend: ([\w, -]+?) or (\w+)\.", text)
    assert offered is not None
    backends = {*offered[1].split(", "), offered[2]}
    assert set(re.findall(r"ARG EXTRA=(\S+)", text)) <= backends
    for package, names in (("hidiff-runtime", backends | {"serve"}), ("hidiff-export", backends)):
        assert names <= set(metadata(package).get_all("Provides-Extra") or []), package


def test_images_run_unprivileged_and_are_watched() -> None:
    for name in ("build", "runtime", "serve"):
        assert [line for line in stage(name) if line.startswith("USER")] == ["USER 1000:1000"]
    for name, question in (("runtime", "serving.probe"), ("serve", "/health/ready")):
        (check,) = [line for line in stage(name) if line.startswith("HEALTHCHECK")]
        assert question in check


def test_runtime_installs_without_pytorch(tmp_path: Path) -> None:
    """Runs the stage's own commands, with Python's and folders' names replaced, for the CPU."""
    wheels, environment = tmp_path / "wheels", tmp_path / "hidiff"
    (install,) = [line for line in stage("runtime") if line.startswith("RUN")]
    names = {
        "/source/runtime /source": str(ROOT / "runtime"),
        "/wheels": str(wheels),
        "/opt/hidiff": str(environment),
        "/requirements/": f"{ROOT}/deploy/docker/requirements/",
        "python3 ": f"{sys.executable} ",
        "pip wheel": f"{sys.executable} -m pip wheel",
        " --no-build-isolation": "",  # the image has hatchling; here pip brings it
        " --no-cache-dir": "",
    }
    for line in (stage("wheels")[-1], install):
        command = re.sub(r"--mount=\S+\s+", "", line.removeprefix("RUN "))
        for name, replaced in names.items():
            command = command.replace(name, replaced)
        environ = {**os.environ, "EXTRA": "cpu", "PIP_NO_COMPILE": "1", "PIP_QUIET": "1"}
        done = subprocess.run(["sh", "-euc", command], capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stderr
    python = environment / "bin/python"
    program = """
import importlib.util
import hidiff_runtime.serving.service, onnxruntime, PIL, tokenizers
unwanted = "torch", "diffusers", "transformers", "onnx", "hidiff_export", "pip"
print([name for name in unwanted if importlib.util.find_spec(name)])
try:
    import hidiff_runtime.serving.triton.decoupled_model
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, env={}, cwd=tmp_path)
    assert (done.stdout.split("\n"), done.stderr) == (["[]", "triton_python_backend_utils", ""], "")
    assert subprocess.run([python, "-m", "hidiff_runtime.serving.probe", "--help"], capture_output=True).returncode == 0


def test_the_wheels_stage_copies_all_that_the_compiler_is_made_of(tmp_path: Path) -> None:
    for line in stage("wheels"):
        if line.startswith("COPY"):
            *paths, target = line.split()[1:]
            if not target.startswith("/source"):
                continue
            place = tmp_path / target.removeprefix("/source").strip("/")
            for path in paths:
                if (ROOT / path).is_dir():
                    shutil.copytree(ROOT / path, place, ignore=shutil.ignore_patterns("tests", "__pycache__"))
                else:
                    shutil.copy(ROOT / path, place)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("hidiff_export-*.whl"))) == 1


def test_the_script_wants_a_repository(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "MODEL_REPOSITORY": str(tmp_path / "nowhere"), "TRITONSERVER": "/bin/true"}
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "there is no model repository" in done.stderr


def test_the_script_loads_models_once_and_closes_what_pictures_do_not_need(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "MODEL_REPOSITORY": str(tmp_path), "TRITONSERVER": "/bin/echo"}
    done = subprocess.run([SCRIPT, "--log-verbose=1"], capture_output=True, text=True, check=True, env=environment)
    said = done.stdout.split()
    assert "--model-control-mode=none" in said
    closed = [word for word in said if word.startswith(("--http-restricted-api=", "--grpc-restricted-protocol="))]
    assert len(closed) == 2
    assert all("model-repository" in word for word in closed)
    assert "--log-verbose=1" in said


@contextmanager
def triton(program: str, *options: str) -> Iterator[str]:
    """A Triton without models, started by ``program``; gives the address of its HTTP endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        "PATH": "/usr/bin:/bin",
        "TRITONSERVER": str(triton_folder() / "bin/tritonserver"),
        "LD_LIBRARY_PATH": str(triton_folder().parents[1] / "nvidia_pytriton.libs"),
    }
    address = ("--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false")
    process = subprocess.Popen(
        [program, *address, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{port}/v2"
        deadline = time.monotonic() + 300
        while asked(f"{url}/health/ready") != 200:
            assert process.poll() is None, process.communicate()[1][-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=300)


def asked(url: str, method: str = "GET") -> int:
    """The status of the answer; 0 where there is none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=300) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


CLOSED = [
    ("POST", "repository/index"),
    ("POST", "repository/models/hidiff/load"),
    ("GET", "systemsharedmemory/status"),
    ("GET", "cudasharedmemory/status"),
    ("GET", "models/hidiff/config"),
    ("GET", "trace/setting"),
    ("GET", "logging"),
]


@pytest.mark.needs("tritonserver")
def test_the_script_closes_what_pictures_do_not_need(tmp_path: Path) -> None:
    wrapper = tmp_path / "start"
    wrapper.write_text(f'#!/bin/sh\nMODEL_REPOSITORY="{tmp_path}" exec "{SCRIPT}" "$@"\n')
    wrapper.chmod(0o755)
    with triton(str(wrapper)) as url:
        assert {path: asked(f"{url}/{path}", method) for method, path in CLOSED} == {path: 403 for _, path in CLOSED}
        assert asked(url) == 200
    with triton(str(triton_folder() / "bin/tritonserver"), f"--model-repository={tmp_path}") as url:
        assert 403 not in [asked(f"{url}/{path}", method) for method, path in CLOSED]
