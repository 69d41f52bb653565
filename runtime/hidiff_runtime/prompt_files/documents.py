"""Prompts in one document: a list in JSON or YAML."""

from __future__ import annotations

import functools
import re
from types import ModuleType
from typing import Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.optional_libraries import optional_library
from hidiff_runtime.pipeline.request_fields import BY_NAME
from hidiff_runtime.prompt_files.detection import line_ends
from hidiff_runtime.prompt_files.raw_rows import EXAMPLE, Raw, kind_name, row_values, strict_json
from hidiff_runtime.text_safety import printable

_LIST = f'Write a list of texts and objects: ["a boat", {EXAMPLE}], or an object with that list alone.'
_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "-+.0123456789"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "merge": (r"<<", "<"),
}
"""Plain words of YAML that are no text, with the characters that they begin with: those of YAML 1.2's core schema.
PyYAML's own are those of 1.1, where ``no`` is false, ``012`` is ten and ``1:30`` is ninety."""


def read_json(name: str, text: str) -> list[Raw]:
    """Reads a list of texts and objects, or an object that has such a list alone, or that is one prompt.

    Raises:
        InputError: it is not JSON, or holds no list.
    """
    try:
        found = strict_json(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in line_ends(text) if line.strip()]
        many = len(lines) > 1 and "Extra data" in str(error)
        raise InputError(
            "The prompts are JSON a line each, and .json is one document." if many else "The prompts are not JSON.",
            given=f"{name}: {error}",
            advice="Call the file .jsonl." if many else _LIST,
        ) from error
    return _rows(name, found)


def read_yaml(name: str, text: str) -> list[Raw]:
    """Reads a list of texts and mappings, as `read_json` does.

    Raises:
        InputError: it is not YAML, or holds no list.
        EngineError: PyYAML is not installed.
    """
    yaml = optional_library("yaml", "Prompts in YAML need PyYAML", "pip install pyyaml. Or write them as .jsonl.")
    try:
        found = yaml.load(text, Loader=_loader(yaml))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise InputError(
            "The prompts are not YAML.",
            given=f"{name}: {printable(told[:300])}",
            advice="Give each name once, and put text that has a colon or begins with a sign into quotes.",
        ) from error
    return [_hinted(raw) for raw in _rows(name, found)]


def _rows(name: str, found: object) -> list[Raw]:
    if isinstance(found, InputError):
        raise InputError(found.summary, given=f"{name}: {found.given}", advice=found.advice)
    items = _items(found)
    if items is None:
        raise InputError("The file holds no list of prompts.", given=f"{name}: {kind_name(found)}", advice=_LIST)
    return [Raw(number, f"item {number + 1}", row_values(item)) for number, item in enumerate(items)]


def _items(found: object) -> list[object] | None:
    """Returns the list that a document is, or has alone; the one prompt that it is; None where it is neither."""
    if isinstance(found, list):
        return found
    if not found:
        return []
    if not isinstance(found, dict):
        return None
    if "prompt" in found:
        return [found]
    first, *others = found.values()
    return first if isinstance(first, list) and not others else None


def _hinted(raw: Raw) -> Raw:
    """Tells text with a colon, which YAML reads as a name and its value, from fields."""
    if isinstance(raw.values, InputError) or any(name in BY_NAME for name in raw.values):
        return raw
    given = ", ".join(f"{name}: …" for name in list(raw.values)[:3])
    error = InputError(
        "The item is a mapping without a prompt.",
        given=printable(given[:200]),
        advice='Put text that has a colon into quotes: - "a boat: at sea"',
    )
    return Raw(raw.number, raw.where, error)


@functools.cache
def _loader(yaml: ModuleType) -> Any:
    """Returns a safe loader for which plain words are text, but those of JSON, and a name twice is a fault."""
    base: Any = yaml.SafeLoader

    class Loader(base):  # type: ignore[misc]
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            found = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in found:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                found.add(key.value)
            return node

    Loader.yaml_implicit_resolvers = {}
    for kind, (pattern, first) in _PLAIN.items():
        marks = ["" if mark == "\0" else mark for mark in first]
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), marks)
    Loader.add_constructor("tag:yaml.org,2002:str", lambda loader, node: _joined(loader.construct_scalar(node)))
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
    return Loader


def _joined(text: str) -> str:
    r"""Joins the halves of surrogate pairs: ``\ud83d\ude00`` is how JSON writes one character, and YAML takes JSON."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
