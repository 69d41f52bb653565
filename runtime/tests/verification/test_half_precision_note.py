"""What a check on a CPU says of the half-precision arithmetic that it cannot see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy

from hidiff_runtime import BundleError, check
from hidiff_runtime.format.manifest import MANIFEST, Manifest

REPORT = "parity/report.json"
OPEN = "do not say whether numbers overflow or lose digits in a GPU's {} arithmetic"


@dataclass
class Device(toy.ToyDevice):
    """A device that keeps arrays."""

    memory: Any = None


@dataclass
class Backend(toy.ToyBackend):
    """Toy engines on the CPU, or on a GPU."""

    on_host: bool = True

    def device(self, _options: Mapping[str, Any]) -> toy.ToyDevice:
        return Device(self, SimpleNamespace(on_host=self.on_host))


def make(folder: Path, precision: str, graphs: object = None) -> Path:
    """A toy that calls itself a bundle of this precision; its parity report, if any, has ``graphs``."""
    toy.make(folder)
    manifest = replace(Manifest.read(folder), precision=precision)
    if graphs is not None:
        (folder / REPORT).parent.mkdir()
        (folder / REPORT).write_text(json.dumps({"ok": True} if graphs == "older" else {"graphs": graphs}))
        manifest = replace(
            manifest, report=REPORT, files={**manifest.files, REPORT: next(iter(manifest.files.values()))}
        )
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))
    toy.seal(folder)
    return folder


@pytest.mark.parametrize(
    ("precision", "half"),
    [("float16", "float16"), ("bfloat16", "bfloat16"), ("int8", "float16"), ("fp8", "float16")],
)
@pytest.mark.parametrize(("ok", "outcome"), [(True, "arithmetic: within bounds."), (False, "arithmetic: FAILED.")])
def test_engines_on_the_cpu_leave_it_to_the_report(
    tmp_path: Path, precision: str, half: str, ok: bool, outcome: str
) -> None:
    folder = make(tmp_path / "bundle", precision, {"arithmetic": half, "ok": ok, "notes": ["of old"]})

    report = check(folder, backend=Backend(), loop="host", runs=False)

    assert report.ok
    assert OPEN.format(half) in report.half_precision
    assert report.half_precision.endswith(f"By the bundle's parity report its graphs in {half} {outcome}")
    assert report.half_precision in report.render()
    assert report.to_dict()["half_precision"] == report.half_precision


@pytest.mark.parametrize("graphs", [None, "older", {"arithmetic": "float32", "ok": True, "notes": []}])
def test_without_such_a_report_it_says_how_to_get_one(tmp_path: Path, graphs: object) -> None:
    report = check(make(tmp_path / "bundle", "float16", graphs), backend=Backend(), loop="host", runs=False)

    assert report.half_precision.endswith(
        "holds no verdict on that: 'hidiff-export verify' judges its graphs in float16 arithmetic."
    )


@pytest.mark.parametrize(("precision", "on_host"), [("float32", True), ("float16", False)])
def test_nothing_is_left_open_in_float32_or_on_a_gpu(tmp_path: Path, precision: str, on_host: bool) -> None:
    folder = make(tmp_path / "bundle", precision)

    report = check(folder, backend=Backend(on_host=on_host), loop="host", runs=False)

    assert report.half_precision == ""
    assert "arithmetic" not in report.render()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not whole JSON"),
        (b"\xff", "is not whole JSON"),
        (b'{"graphs": []}', "must be an object"),
        (b'{"graphs": {"arithmetic": "float16", "ok": "yes"}}', "graphs.ok"),
    ],
)
def test_a_broken_report_is_an_error_of_the_bundle(tmp_path: Path, content: bytes, message: str) -> None:
    folder = make(tmp_path / "bundle", "float16", {})
    (folder / REPORT).write_bytes(content)
    toy.seal(folder)

    with pytest.raises(BundleError, match=message):
        check(folder, backend=Backend(), loop="host", runs=False)
