"""A fingerprint of the sources that a module runs: its own, and those of all that it imports, in both packages.

Nothing is imported to find out. Imports at the top of a module count, and those inside functions, but not those for
type checkers alone. So does what is not an import statement:

- a module's name as a text, for it may be the command of a child process;
- ``import_module(f"{__name__}.{name}")``: any module of that package;
- a name that a package imports in its ``__getattr__``: whoever uses it runs the module that the package's imports for
  type checkers take it from.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import dedent

import hidiff_runtime

_INIT = "__init__"

# Import statements are cut out of the text, and these alone are parsed: all of it takes ten times as long.
_BLOCK = r"(?:(?:[ \t].*)?\n)*"
_FOR_TYPE_CHECKERS = re.compile(rf"^if (?:typing\.)?TYPE_CHECKING:\n({_BLOCK})", re.MULTILINE)
_GETATTR = re.compile(rf"^def __getattr__\(.*\n{_BLOCK}", re.MULTILINE)
_NAMES = r"(?:\([^)]*\)|[^\n;(]+)"
_IMPORT = re.compile(rf"^[ \t]*((?:from[ \t]+[\w.]+[ \t]+)?import[ \t]*{_NAMES})", re.MULTILINE)
_NAMED = re.compile(r"""["']([A-Za-z_]\w*(?:\.\w+)+)["']""")
_ANY_OF_ITS_OWN = re.compile(r"""\bimport_module\(\s*f["']\{__name__\}\.""")


@dataclass
class Imports:
    """What a module names.

    Args:
        names: dotted, of modules or of what is in them.
        lazy: home of each name that the module's ``__getattr__`` imports.
        any_of_its_own: whether it imports modules of its package by names that are known later.
    """

    names: set[str] = field(default_factory=set)
    lazy: dict[str, str] = field(default_factory=dict)
    any_of_its_own: bool = False

    @classmethod
    def of(cls, source: str, package: str, roots: Collection[str]) -> Imports:
        """Returns what the source of a module in ``package`` names; ``roots`` are the packages that matter."""
        lazy: dict[str, str] = {}
        text = _FOR_TYPE_CHECKERS.sub("", source)
        if bare := _GETATTR.search(text):
            text = text.replace(bare.group(), "")
            for block in _FOR_TYPE_CHECKERS.findall(source):
                lazy |= {name.rpartition(".")[2]: name.rpartition(".")[0] for name in _imported(block, package)}
        names = set(_imported(text, package))
        for root in names.intersection(roots):  # ``import hidiff_runtime``, then ``hidiff_runtime.open``
            names |= {f"{root}.{used}" for used in re.findall(rf"\b{root}\.(\w+)", text)}
        names.update(_NAMED.findall(text))
        return cls(names, lazy, "import_module" in text and _ANY_OF_ITS_OWN.search(text) is not None)


def _imported(text: str, package: str) -> Iterator[str]:
    """Yields what the import statements in ``text`` name."""
    for statement in _IMPORT.findall(text):
        try:
            (node,) = ast.parse(dedent(statement)).body
        except (SyntaxError, ValueError):  # a sentence of a docstring that begins like one
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


class Sources:
    """The sources of packages, as they are when this is made.

    Args:
        packages: the folder of each package, by its name.
    """

    def __init__(self, packages: Mapping[str, Path]) -> None:
        self._sources: dict[str, bytes] = {}
        self._packages: set[str] = set()
        self._imports: dict[str, Imports] = {}
        self._next: dict[str, frozenset[str]] = {}
        self._fingerprints: dict[str, str] = {}
        self._roots = frozenset(packages)
        for name, folder in packages.items():
            for path in folder.rglob("*.py"):
                parts = (name, *path.relative_to(folder).with_suffix("").parts)
                module = ".".join(parts[:-1] if parts[-1] == _INIT else parts)
                self._sources[module] = path.read_bytes()
                if parts[-1] == _INIT:
                    self._packages.add(module)

    def fingerprint(self, module: str) -> str:
        """Returns the SHA-256 over the sources that ``module`` runs; it may lie outside of the packages."""
        if module not in self._fingerprints:
            sha = hashlib.sha256()
            for name in sorted(self.closure(module)):
                source = self._source(name)
                sha.update(f"{name} {len(source)}\n".encode())
                sha.update(source)
            self._fingerprints[module] = sha.hexdigest()
        return self._fingerprints[module]

    def closure(self, module: str) -> frozenset[str]:
        """Names of the modules that ``module`` runs: itself, what it imports, what those import, and their packages."""
        found: set[str] = set()
        left = [module]
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                if name not in self._next:
                    self._next[name] = frozenset(self._direct(name))
                left += self._next[name]
        return frozenset(found)

    def _source(self, module: str) -> bytes:
        if module not in self._sources:
            self._sources[module] = Path(str(sys.modules[module].__file__)).read_bytes()
        return self._sources[module]

    def _direct(self, module: str) -> Iterator[str]:
        """Yields the modules that run as soon as ``module`` is imported or one of its functions called."""
        imports = self._imports_of(module)
        for name in imports.names:
            yield from self._modules(name)
        if imports.any_of_its_own:
            yield from (name for name in self._sources if name.rpartition(".")[0] == module)
        yield from self._modules(module.rpartition(".")[0])

    def _modules(self, name: str) -> Iterator[str]:
        """Yields the module of a dotted name, or the one that it comes from, and the packages above it."""
        above, _, last = name.rpartition(".")
        if name in self._sources:
            yield name
        elif above in self._packages and (home := self._imports_of(above).lazy.get(last)):
            yield home
        if above:
            yield from self._modules(above)

    def _imports_of(self, module: str) -> Imports:
        if module not in self._imports:
            package = module if module in self._packages else module.rpartition(".")[0]
            self._imports[module] = Imports.of(self._source(module).decode(), package, self._roots)
        return self._imports[module]


@cache
def own_sources() -> Sources:
    """Returns the sources of both packages, as they were when this was first called."""
    runtime = Path(str(hidiff_runtime.__file__)).parent
    return Sources({"hidiff_export": Path(__file__).parents[1], "hidiff_runtime": runtime})
