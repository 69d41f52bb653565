"""The machine and its software, and the test-suite's part for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.work import Missing, Work

ROOT = Path(__file__).parents[2]
_PACKAGES = (
    *("torch", "diffusers", "hidiffusion", "hidiff-export", "hidiff-runtime", "onnx", "numpy", "cuda-python"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    *("onnxruntime", "onnxruntime-gpu", "polygraphy"),
)
_QUERY = "name,driver_version,memory.total,compute_cap,clocks.max.sm,power.limit"
_NO_TESTS = 5


def commit() -> str:
    """The checkout's commit, marked where files differ from it; empty where there is none."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(work: Work) -> None:
    """Adds the GPU as the driver describes it, the processor, and the versions of what takes part."""
    work.add({"what": "versions", **versions(), "python": platform.python_version(), "system": platform.platform()})
    processors = len(os.sched_getaffinity(0))
    work.add({"what": "processor", "cores": processors, "name": _processor()})
    if work.rehearse:
        work.add({"what": "GPU", "reason": "a rehearsal"}, "cannot run")
        return
    work.add({"what": "GPU", **_gpu()})


def fault_of_gpu() -> str:
    """Why PyTorch has no GPU here; empty if it has one. In a process of its own, so that this one keeps no context."""
    program = """if True:
        import torch
        print("" if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device")
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"torch does not import: {done.stderr.strip()[-300:]}"


def versions() -> dict[str, str]:
    """By package, of those installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    told: dict[str, Any] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return {**told, "nvidia_smi": f"failed: {error}"}
    return told | dict(zip(_QUERY.split(","), (value.strip() for value in line.split(",")), strict=True))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def suite(work: Work) -> None:
    """The tests that need a device, which fail here instead of skipping; in a rehearsal they may skip.

    Raises:
        Missing: no test carries the marker.
    """
    names = {name: value for name, value in os.environ.items() if name != "HIDIFF_REQUIRE"}
    required = {} if work.rehearse else {"HIDIFF_REQUIRE": "cuda"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "needs",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        code = subprocess.run(command, cwd=ROOT, env={**names, **required}).returncode
        if code == _NO_TESTS:
            raise Missing("No test is marked needs.")
        cases = list(ElementTree.parse(report).iter("testcase"))
    ends = {f"{case.get('classname')}::{case.get('name')}": _end(case) for case in cases}
    counts = {end: sum(found == end for found, _ in ends.values()) for end in ("passed", "failed", "skipped")}
    others = {name: f"{end}: {text}" for name, (end, text) in ends.items() if end != "passed"}
    work.add({"what": "tests", "code": code, **counts, "not_passed": others, "ok": code == 0})


def _end(case: ElementTree.Element) -> tuple[str, str]:
    for tag, end in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return end, (found.get("message") or "").splitlines()[0][:300] if found.get("message") else ""
    return "passed", ""
