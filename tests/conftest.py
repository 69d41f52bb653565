"""What many tests share: small bundles with real engines, built once however many processes run the tests."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock
from needs import pytest_runtest_setup

from hidiff_runtime.format.manifest import MANIFEST

__all__ = [
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_runtest_setup",
    "sd15_bundle",
    "tensorrt_bundle",
    "vae_folder",
]


TENSORRT_CHANGES = (
    *("task=controlnet", "controlnet=random:1", "hidiffusion.thresholds={strided: 0.5, control: 1.0}"),
    *("width=256", "height=256", "steps=[3]", "precision=float16"),
    *("backend=[tensorrt-rtx, onnxruntime]", "targets=[sm89, sm120, cpu]"),
)
"""What `tensorrt_bundle` changes in the demo recipe: two phases come up, both with a ControlNet's residuals."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: a worker that comes to one last would leave the others idle.

    Of these, one that needs `sd15_bundle` builds it at once, and the others that do come last, lest they wait for it.
    """
    slow = {item.path: None for item in items if item.get_closest_marker("slow")}
    users = {item.path for item in items if "sd15_bundle" in getattr(item, "fixturenames", ())}
    builder = next((path for path in slow if path in users), None)

    def rank(item: pytest.Item) -> int:
        if item.path not in slow:
            return 3
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
        }
    )
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            build(recipe, folder, NoDisplay())
    return folder


@pytest.fixture(scope="session")
def tensorrt_bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The demo recipe's bundle with a ControlNet, for TensorRT-RTX and ONNX Runtime, by the command; copy it before
    changing it."""
    from hidiff_export.cli import main

    pytest.importorskip("tensorrt_rtx")
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "tensorrt-bundle"
    with FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).is_file():
            changes = [word for change in TENSORRT_CHANGES for word in ("--set", change)]
            result = CliRunner().invoke(main, ["build", "demo", "-o", str(folder), *changes, "--json"])
            assert result.exit_code == 0, result.output
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
