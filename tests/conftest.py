"""What many tests share: small bundles with real engines, built once however many processes run the tests."""

import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from filelock import FileLock
from needs import pytest_runtest_setup

from hidiff_runtime.format.manifest import MANIFEST

# Before a test imports PyTorch: processes with a thread for each core would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tracing allocates by the million beside what PyTorch's import leaves: collecting seldom saves a tenth of it.
gc.set_threshold(50_000, 20, 50)

__all__ = [
    "half_bundle",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_runtest_setup",
    "sd15_bundle",
    "tensorrt_bundle",
    "vae_folder",
]


HALF_CHANGES = ("precision=float16", "width=128", "height=128", "sampler=ddim", "steps=[3]", "vae=false")
"""What `half_bundle` changes in the tiny recipe."""

TENSORRT_CHANGES = (
    *("task=controlnet", "controlnet=random:1", "hidiffusion.thresholds={strided: 0.5, control: 1.0}"),
    *("width=256", "height=256", "steps=[3]", "precision=float16"),
    *("backend=[tensorrt-rtx, onnxruntime]", "targets=[sm89, sm120, cpu]"),
)
"""What `tensorrt_bundle` changes in the tiny recipe: two phases come up, both with a ControlNet's residuals."""


LONG = (
    "test_verify.py",
    "test_rebase.py",
    "test_bundle_unet.py",
    "test_apply_hidiffusion.py",
    "test_magnitudes.py",
    "test_vae.py",
)
"""Files without a slow test that take long as a whole."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first, then `LONG` ones: a worker that comes to one last would leave the others idle.

    Of these, one that needs `sd15_bundle` builds it at once, and the others that do come last, lest they wait for it.
    """
    slow = {item.path: None for item in items if item.get_closest_marker("slow")}
    users = {item.path for item in items if "sd15_bundle" in getattr(item, "fixturenames", ())}
    builder = next((path for path in slow if path in users), None)

    def rank(item: pytest.Item) -> int:
        if item.path not in slow:
            return 3 if item.path.name in LONG else 4
        return 0 if item.path == builder else 1 + (item.path in users)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Lets the garbage collector pass over the libraries, which stay, and look less often.

    Tracing a network makes millions of objects that need no collector; it would take an eighth of the time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


class NoDisplay:
    """Shows nothing of a build."""

    @contextmanager
    def stage(self, _title: str, *, reused: bool) -> Iterator[object]:  # noqa: ARG002 - the protocol's
        yield lambda _done, _total, _note: None

    def notice(self, _text: str) -> None:
        pass


@pytest.fixture(scope="session", autouse=True)
def _shapes_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """The shapes of a network's tensors, asked for in every test that loads one, are found once for all processes.

    Diffusers has to make all modules for them, which for SDXL at full width takes seconds.
    """
    from hidiff_export.checkpoints.component import Component

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shapes"
    folder.mkdir(exist_ok=True)
    find, known = Component.shapes, dict[str, dict[str, tuple[int, ...]]]()

    def shapes(self: Component, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        key = hashlib.sha256(json.dumps([self.value, dict(config)], sort_keys=True, default=repr).encode()).hexdigest()
        path = folder / f"{key}.json"
        if key not in known and path.is_file():
            known[key] = {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
        if key not in known:
            known[key] = find(self, config)
            part = path.with_suffix(f".{worker_id}")
            part.write_text(json.dumps(known[key]))
            part.replace(path)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Component, "shapes", shapes)
        yield


@pytest.fixture(scope="session")
def sd15_bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A tiny SD1.5 bundle for ONNX Runtime, 128 pixels, 3 steps of Euler ancestral; copy it before changing it."""
    from hidiff_export.compiler.compile import build
    from hidiff_export.recipe import Recipe

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "sd15-bundle"
    recipe = Recipe.from_dict(
        {
            "name": "tiny",
            "family": "sd15",
            "source": "random:0",
            "unet_width": "tiny",
            "width": 128,
            "height": 128,
            "sampler": "euler_ancestral",
            "steps": [3],
            "example_prompts": ["a boat on a lake", "a lighthouse at dusk"],
        }
    )
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            build(recipe, folder, NoDisplay())
    return folder


@pytest.fixture(scope="session")
def half_bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The tiny recipe's bundle in float16, by the command; copy it before changing it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "half-bundle"
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            _build_tiny(folder, HALF_CHANGES)
    return folder


def _build_tiny(folder: Path, changes: tuple[str, ...]) -> None:
    from hidiff_export.cli import main

    words = [word for change in changes for word in ("--set", change)]
    result = CliRunner().invoke(main, ["build", "tiny", "-o", str(folder), *words, "--json"])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="session")
def tensorrt_bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The tiny recipe's bundle with a ControlNet, for TensorRT-RTX and ONNX Runtime, by the command; copy it before
    changing it."""
    pytest.importorskip("tensorrt_rtx")
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "tensorrt-bundle"
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            _build_tiny(folder, TENSORRT_CHANGES)
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A tiny SDXL VAE with its graphs and engines, as `tests.vaes` writes it; copy it before changing it."""
    from tests.vaes import write_vae

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "vae"
    with FileLock(f"{folder}.lock"):
        if not (folder / "encoder.onnxruntime.onnx").is_file():
            write_vae(folder)
    return folder
