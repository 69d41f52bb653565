"""The floor plan: no import goes round in a circle, and a name says one thing. pyproject.toml has the layers."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"hidiff_runtime": ROOT / "runtime/hidiff_runtime", "hidiff_export": ROOT / "hidiff_export"}

TWO_SIDES = {
    "__init__": "every folder has one",
    "__main__": "each package starts one command",
    "errors": "of the runtime, of the compiler, and as OpenAI's clients read them",
    "protocol": "of backends that open engines, and of builders that make them",
    "onnxruntime": "opens engines, and builds them",
    "controlnet": "runs one, and is exported as one",
    "tokenizer": "reads a file, and writes it",
    "vae": "runs one, and is exported as one",
    "step_graph": "what it takes and gives, and how it is written",
    "reference": "what PyTorch computes, and the stage that records it",
    "worker": "the child processes, one a library",
    "rebase": "the command, and what it does",
    "verify": "the command, and what it does",
}
"""File names that may be there twice, for they are two sides of one thing."""

LAST_RELEASE = ("hidiff_export/integrations", "bulk/cluster.py", "triton/stream.py", "triton/front.py")
"""Names of the last release, which import the new ones."""


@cache
def sources() -> tuple[Path, ...]:
    """Every module that is not a name of the last release alone."""
    paths = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))
    return tuple(path for path in paths if not any(old in path.as_posix() for old in LAST_RELEASE))


@cache
def imports() -> grimp.ImportGraph:
    """Who imports whom, imports for types alone included."""
    return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False)


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Modules that import each other, over however many steps."""
    found, seen = [], set()
    for module in sorted(graph.modules):
        if module in seen:
            continue
        after = graph.find_downstream_modules(module)
        circle = sorted(({module} | after) & ({module} | graph.find_upstream_modules(module)))
        seen.update(circle)
        if len(circle) > 1:
            found.append(circle)
    return found


def test_no_import_goes_round_in_a_circle() -> None:
    assert circles(imports()) == []


def test_a_circle_would_be_found() -> None:
    graph = grimp.ImportGraph()
    for module in ("a", "b", "c", "d"):
        graph.add_module(module)
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")):
        graph.add_import(importer=importer, imported=imported)
    assert circles(graph) == [["a", "b", "c"]]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_library_imports_a_command_line(package: str) -> None:
    graph = imports()
    for module in graph.find_descendants(f"{package}.cli") | {f"{package}.cli"}:
        for importer in graph.find_modules_that_directly_import(module):
            assert ".cli" in importer or importer == f"{package}.__main__", f"{importer} imports {module}"


def test_a_file_name_is_there_once_or_is_two_sides_of_one_thing() -> None:
    places = defaultdict(list)
    for path in sources():
        places[path.stem].append(path.relative_to(ROOT).as_posix())
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert {name: found for name, found in twice.items() if name not in TWO_SIDES} == {}
    assert sorted(set(TWO_SIDES) - set(twice)) == []


def test_no_two_public_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "TritonPythonModel":
                places[node.name].append(path.relative_to(ROOT).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
