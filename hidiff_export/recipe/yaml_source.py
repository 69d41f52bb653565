"""Reads a recipe's YAML so that every refusal can name the file, the line, the key and the value given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hidiff_export.errors import RecipeError

Key = tuple[str | int, ...]
"""Where a value sits: keys and list positions from the top."""

_PREFIX = "tag:yaml.org,2002:"
_DATE = f"{_PREFIX}timestamp"  # a date is no value of a recipe, so it stays text until it is refused by its key
_TAGS = {_DATE, *(_PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq"))}
_DEEPEST = 20
_ONE_A_LINE = "Write one `key: value` a line."


def dotted(key: Key) -> str:
    """Returns the key as people write it: ``hidiffusion.thresholds.control``."""
    return ".".join(str(part) for part in key)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Returns ``Did you mean …?`` where ``word`` is close to a valid one, else nothing."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}? " if close else ""


@dataclass(frozen=True)
class RecipeSource:
    """A recipe's values as written, and where each was written.

    Args:
        data: plain mappings, lists and scalars.
        origin: the file, or what else the values came from.
        lines: line number, from 1, by key; a key that is not there was not written in the file.
        overrides: keys whose values were set on the command line.
    """

    data: dict[str, Any]
    origin: str
    lines: Mapping[Key, int]
    overrides: Mapping[Key, object]

    @classmethod
    def read(cls, path: Path) -> RecipeSource:
        """Reads a YAML file.

        Raises:
            RecipeError: the file is missing, is not YAML, or uses more of YAML than recipes do.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                "The recipe cannot be read.",
                given=f"{path} ({_reason(error)})",
                advice="Give the path of a YAML file, or the name of a recipe that `hidiff-export recipes list` shows.",
            ) from error
        lines: dict[Key, int] = {}
        data = _Reader(str(path), lines).mapping(text)
        return cls(data, str(path), lines, {})

    @classmethod
    def of(cls, data: Mapping[str, Any], origin: str) -> RecipeSource:
        """Values that were not written in a file of their own."""
        return cls(_plain(data), origin, {}, {})

    def overridden(self, assignments: Iterable[str]) -> RecipeSource:
        """Returns these values with some replaced.

        Args:
            assignments: ``KEY=VALUE`` texts; the key dotted, the value as YAML would read it.

        Raises:
            RecipeError: a text is not of that form.
        """
        data = _plain(self.data)
        overrides = dict(_assignment(text) for text in assignments)
        for key, value in overrides.items():
            inner = data
            for part in key[:-1]:
                if not isinstance(inner.get(part), dict):
                    inner[part] = {}
                inner = inner[part]
            inner[key[-1]] = value
        return RecipeSource(data, self.origin, self.lines, overrides)

    def position(self, key: Key) -> int:
        """Returns a number by which values sort as they were written: command line first, then by line."""
        lines = [self.lines.get(key[:end], 0) for end in range(len(key), 0, -1) if key[:end] not in self.overrides]
        return next(filter(None, lines), 0) if len(lines) == len(key) else -1

    def place(self, key: Key) -> str:
        """Returns where the value of ``key``, or the nearest one around it, was written."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.overrides:
                return f"--set {dotted(key[:end])}"
            if end and key[:end] in self.lines:
                return f"{self.origin}, line {self.lines[key[:end]]}"
        return self.origin


def _assignment(text: str) -> tuple[Key, Any]:
    name, equals, value = text.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise RecipeError(
            "A setting is not KEY=VALUE.",
            given=text,
            advice="Write for example --set width=1024 or --set hidiffusion.windows=false.",
        )
    value = value.strip()
    if value[:1] in tuple("[{'\""):
        return key, _Reader(f"--set {name}", {}).value(value)
    return key, _Reader(f"--set {name}", {}).scalar(value)


class _Reader:
    """Builds values from YAML's node tree and notes the line of each key.

    Recipes are plain data: anchors, aliases, merge keys and tags of one's own are refused, which also keeps a hostile
    file from unfolding into something huge.
    """

    def __init__(self, origin: str, lines: dict[Key, int]) -> None:
        self.origin = origin
        self.lines = lines
        self.scalars = yaml.SafeLoader("")

    def mapping(self, text: str) -> dict[str, Any]:
        """Returns the values of a whole recipe."""
        node = self._tree(text)
        if not isinstance(node, yaml.MappingNode):
            mark = None if node is None else node.start_mark
            self._refuse(mark, "a recipe is a mapping", "nothing" if node is None else _shown(node), _ONE_A_LINE)
        return self._mapping(node, ())

    def value(self, text: str) -> Any:
        """Returns one value."""
        node = self._tree(text)
        return None if node is None else self._value(node, ())

    def scalar(self, text: str) -> Any:
        """Returns one plain scalar, also where YAML would see a comment or a mapping in it (a path, ``random:0``)."""
        resolved: Any = self.scalars
        tag = resolved.resolve(yaml.ScalarNode, text, (True, False))
        return self._value(yaml.ScalarNode(tag, text), ())

    def _tree(self, text: str) -> yaml.Node | None:
        try:
            depth = 0
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > _DEEPEST:
                    self._refuse(event.start_mark, "values are nested too deeply", None, _ONE_A_LINE)
                if isinstance(event, yaml.AliasEvent):
                    advice = "Write the value out."
                    self._refuse(event.start_mark, "recipes use no YAML aliases", f"*{event.anchor}", advice)
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            self._refuse(error.problem_mark, f"this is not YAML: {error.problem}", None, _ONE_A_LINE)
        except yaml.YAMLError as error:
            self._refuse(None, f"this is not YAML: {_reason(error)}", None, _ONE_A_LINE)

    def _value(self, node: yaml.Node, key: Key) -> Any:
        if node.tag not in _TAGS:
            tag = node.tag.replace(_PREFIX, "!!")
            self._refuse(node.start_mark, "recipes hold plain values only", tag, "Drop the tag.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            values = []
            for position, item in enumerate(node.value):
                inner = (*key, position)
                self.lines[inner] = item.start_mark.line + 1
                values.append(self._value(item, inner))
            return values
        return node.value if node.tag == _DATE else self.scalars.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            if not isinstance(name_node, yaml.ScalarNode) or name_node.tag == f"{_PREFIX}merge":
                self._refuse(name_node.start_mark, "a key is not a plain word", _shown(name_node), "Name a key.")
            inner = (*key, name)
            if name in values:
                self._refuse(
                    name_node.start_mark,
                    f"`{dotted(inner)}` is given twice",
                    _shown(value_node),
                    f"Keep one; the first is on line {self.lines[inner]}.",
                )
            self.lines[inner] = name_node.start_mark.line + 1
            values[name] = self._value(value_node, inner)
        return values

    def _refuse(self, mark: Any, what: str, given: str | None, advice: str) -> NoReturn:
        line = "" if mark is None else f", line {mark.line + 1}"
        raise RecipeError(f"{self.origin}{line}: {what}.", given=given, advice=advice)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return f"a {type(node).__name__.removesuffix('Node').lower()}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).replace("\n", " ")
