"""What the public names of TensorRT, TensorRT-RTX and CUDA's runtime are, and which of them a source file uses.

The lists in ``data/tensorrt_api.json`` were written down from the packages themselves, so that tests know the names
where the packages are not.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LISTS: dict[str, Any] = json.loads((Path(__file__).parent / "data/tensorrt_api.json").read_text())
TRT, RTX, CUDA = "tensorrt", "tensorrt_rtx", "cuda.bindings.runtime"

MODULE = "module"
"""The class that a variable for a library's module has in a map of variables."""

RETURNS = {
    "Builder.create_builder_config": "IBuilderConfig",
    "Builder.create_network": "INetworkDefinition",
    "Builder.build_serialized_network": "IHostMemory",
    "ICudaEngine.create_engine_inspector": "EngineInspector",
    "ICudaEngine.create_execution_context": "IExecutionContext",
    "ICudaEngine.create_runtime_config": "IRuntimeConfig",
    "INetworkDefinition.get_input": "ITensor",
    "INetworkDefinition.get_output": "ITensor",
    "INetworkDefinition.get_layer": "ILayer",
    "IRuntimeConfig.create_runtime_cache": "IRuntimeCache",
    "OnnxParser.get_error": "ParserError",
    "Runtime.deserialize_cuda_engine": "ICudaEngine",
}
"""What methods give, where more is asked of it."""


@dataclass(frozen=True)
class Use:
    """A name of a library's in a source file.

    Args:
        line: in the file.
        owner: the class, ``module``, or ``ILogger.Severity`` for an enumeration inside a class.
        name: that is used.
    """

    line: int
    owner: str
    name: str

    def is_in(self, library: str) -> bool:
        """Whether ``library`` has it."""
        classes = LISTS[library]["classes"]
        if self.owner == MODULE:
            return self.name in classes or self.name == "__version__"
        outer = self.owner.partition(".")[0]
        if self.name in ("__members__", "__init__", "name", "value"):
            return outer in classes
        return self.name in classes.get(outer, ())  # of a nested enumeration the outer class lists the members too


def uses(source: str, variables: Mapping[str, str]) -> Iterator[Use]:
    """The names that ``source`` uses of the objects in its variables.

    Args:
        source: Python.
        variables: names of variables, attributes and parameters to the class of what they hold, ``module`` for the
            library itself. A leading underscore makes no difference.

    Raises:
        AssertionError: what a library gave is kept in a variable that ``variables`` does not know, so that its uses
            would not be seen.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = _class_of(node.value, variables)
            if owner is not None:
                yield Use(node.lineno, owner, node.attr)
        if isinstance(node, ast.Assign):
            made = _class_of(node.value, variables)
            for target in node.targets:
                held = variables.get(_named(target))
                known = made is None or "." in made or made == held or isinstance(node.value, (ast.Name, ast.Attribute))
                assert known, f"line {node.lineno}: {ast.unparse(target)} holds a {made}, which no test follows"


def _named(node: ast.AST) -> str:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.lstrip("_")


def _class_of(node: ast.AST, variables: Mapping[str, str]) -> str | None:
    """The class of what an expression is: of a variable, a class of the module, or what a known method gives."""
    if isinstance(node, ast.Attribute):
        owner = _class_of(node.value, variables)
        if owner == MODULE:
            return node.attr
        if owner is not None and node.attr[0].isupper() and not node.attr.isupper():
            return f"{owner}.{node.attr}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = _class_of(node.func.value, variables)
        if owner == MODULE:
            return node.func.attr
        return RETURNS.get(f"{owner}.{node.func.attr}")
    return variables.get(_named(node))


@dataclass(frozen=True)
class CudaCall:
    """A call of CUDA's runtime in a source file, with how many arguments it passes."""

    line: int
    name: str
    arguments: int


def cuda_calls(source: str, variable: str) -> Iterator[CudaCall]:
    """The functions of CUDA's runtime that ``source`` calls through ``variable``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _named(node.func.value) == variable:
            yield CudaCall(node.lineno, node.func.attr, len(node.args) + len(node.keywords))


def cuda_values(source: str, variable: str) -> Iterator[str]:
    """The constants and members of enumerations of CUDA's runtime that ``source`` names."""
    tree = ast.parse(source)
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in functions:
            continue
        if _named(node.value) == variable and id(node) not in inner:
            yield node.attr
        elif isinstance(node.value, ast.Attribute) and _named(node.value.value) == variable:
            yield f"{node.value.attr}.{node.attr}"
