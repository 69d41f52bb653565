"""The language of the sources: a function's docstring begins with a verb; API words are spelled as the APIs do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.packaging.spelling import BRITISH

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "runtime/hidiff_runtime", ROOT / "hidiff_export")

NO_VERBS = {"This", "Its", "As", "Whose", "Names,", "Shapes", "Factors", "Others", "Those", "Yes", "Always"}
"""Words that end like a verb and are none."""


def begins_with_a_verb(text: str) -> bool:
    """Whether the first word is one that says what is done, such as *Returns*."""
    word = text.split()[0].rstrip(",:")
    return re.fullmatch(r"[A-Z][a-z]+(?:-[a-z]+)?s", word) is not None and word not in NO_VERBS


def public_functions(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, name and docstring of public functions and methods that are no properties and no commands."""
    bodies: list[list[ast.stmt]] = [tree.body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bodies.append(node.body)
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            marks = " ".join(map(ast.unparse, node.decorator_list))
            if (text := ast.get_docstring(node)) and not re.search(r"property|\.setter|command\(|group\(", marks):
                yield node.lineno, node.name, text


def test_the_docstring_of_a_public_function_begins_with_a_verb() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}: {text.splitlines()[0]}"
        for folder in FOLDERS
        for path in sorted(folder.rglob("*.py"))
        for line, name, text in public_functions(ast.parse(path.read_text(encoding="utf-8")))
        if not begins_with_a_verb(text)
    ]
    assert wrong == []


def test_a_noun_would_be_found() -> None:
    source = 'def size():\n    """The size."""\n\nclass A:\n    def read(self):\n        """Reads it."""\n'
    assert [begins_with_a_verb(text) for _, _, text in public_functions(ast.parse(source))] == [False, True]


def test_api_words_are_spelled_as_the_apis_spell_them() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {word}"
        for folder in (*FOLDERS, ROOT / "benchmarks")
        for path in sorted(folder.rglob("*.py"))
        for word in BRITISH.findall(f"{path.name} {path.read_text(encoding='utf-8')}")
    ]
    assert wrong == []


def test_a_british_word_would_be_found() -> None:
    text = "quantised normalisation optimise, optimistic quantize; deserialised"
    assert BRITISH.findall(text) == ["quantised", "normalisation", "optimise", "deserialised"]
