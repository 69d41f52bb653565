"""A real Triton server, and one that serves the small bundle for all tests of a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hidiff_export.triton.repository import RepositoryPlan, write
from tests.deploy.server import TritonServer


@pytest.fixture
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TritonServer]]:
    """Starts servers that end with the test: ``server = triton(repository, **options)``.

    The options are those of `TritonServer`: ``control="explicit"``, ``options=["--log-verbose=1"]``,
    ``environment={...}``, and ``wait=False`` for a server that is not to become ready. Tests that use it, or `served`,
    are marked ``@pytest.mark.needs("tritonserver")``.
    """
    with ExitStack() as stack:

        def start(repository: Path, **options: Any) -> TritonServer:
            return stack.enter_context(TritonServer(repository, tmp_path_factory.mktemp("triton"), **options))

        yield start


@pytest.fixture(scope="session")
def repository(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of the small bundle, as `served` serves it; copy it before changing it.

    All engines stay open: opening them anew would take most of the time of so small a picture. One thread: more would
    wait for each other where several tests run.
    """
    folder = tmp_path_factory.mktemp("repository") / "models"
    write(sd15_bundle, folder, RepositoryPlan(options={"resident": "all", "threads": 1}))
    return folder


@pytest.fixture(scope="session")
def served(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server of `repository` for all tests of a process that do it no harm; others start their own."""
    with TritonServer(repository, tmp_path_factory.mktemp("served")) as server:
        yield server
