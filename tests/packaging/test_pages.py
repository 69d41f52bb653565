"""README, CONTRIBUTING and docs name what there is: links, files, Python names, commands, options and recipes."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from pathlib import Path

import click
import pytest

import hidiff_runtime
from hidiff_export.cli import main
from hidiff_export.errors import HidiffError
from hidiff_export.recipe import Recipe
from hidiff_runtime import cli
from hidiff_runtime.cli import serve
from tests.packaging.spelling import BRITISH

ROOT = Path(__file__).parents[2]
PAGES = [*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "runtime/README.md")), *sorted(ROOT.glob("docs/*.md"))]
ARCHITECTURE = ROOT / "docs/architecture.md"
PACKAGES = {"hidiff_runtime": ROOT / "runtime/hidiff_runtime", "hidiff_export": ROOT / "hidiff_export"}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    """Returns a page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Returns the headings of a page as links name them; one that is there again ends in a number."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        again = sum(other == name or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in found)
        found.add(f"{name}-{again}" if again else name)
    return found


def broken_links(page: Path) -> list[str]:
    """Returns the links of a page that lead to no file, or to no heading in one."""
    broken = []
    for _text, link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"https?://|mailto:", link):
            continue
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            broken.append(link)
    return broken


@cache
def files() -> tuple[str, ...]:
    """Returns the files and folders of the project, each with a slash before it and a folder with one after it."""
    skipped = {".git", ".venv", ".venv-triton", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    paths = (path for top in ROOT.iterdir() if top.name not in skipped for path in (top, *top.rglob("*")))
    return tuple(f"/{path.relative_to(ROOT).as_posix()}{'/' if path.is_dir() else ''}" for path in paths)


def missing_files(page: Path) -> list[str]:
    """Returns the Python files, and the folders of both packages, that a page names and that are not there."""
    named = {code for code in CODE.findall(prose(page)) if re.fullmatch(r"[\w./-]+\.py", code)}
    named |= {code for code in CODE.findall(prose(page)) if re.fullmatch(r"(runtime/)?hidiff_\w+/[\w/]*", code)}
    return sorted(name for name in named if not any(path.endswith(f"/{name}") for path in files()))


def missing_names(page: Path) -> list[str]:
    """Returns the dotted names in the two packages that a page has and the packages have not."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])hidiff_(?:runtime|export)(?:\.[A-Za-z]\w*)+", text))
    for module, imported in re.findall(r"^from (hidiff_[\w.]+) import (.+)$", text, re.MULTILINE):
        named |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    return sorted(name for name in named if not resolves(name))


def resolves(name: str) -> bool:
    """Says whether a dotted name is a module, or leads to something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            if find_spec(".".join(parts[:end])) is None:
                continue
        except ModuleNotFoundError:
            continue
        if end == len(parts):
            return True
        found: object = import_module(".".join(parts[:end]))
        if end == len(parts) - 1 and parts[-1] in getattr(found, "__all__", ()):  # imported on use, with PyTorch
            return True
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def undefined(page: Path) -> list[str]:
    """Returns the names that a page links to a Python file which does not define them."""
    found = []
    for text, link in LINK.findall(prose(page)):
        name = re.fullmatch(r"`([A-Za-z_]\w*)(?:\(\))?`", text)
        source = (page.parent / link).resolve()
        if name and source.suffix == ".py" and source.is_file():
            here = rf"^(?:class|def) {name[1]}\b|^{name[1]}(?:: [^=]+)? = "
            if name[1] != source.stem and not re.search(here, source.read_text(encoding="utf-8"), re.MULTILINE):
                found.append(text)
    return found


def shell_lines(page: Path) -> list[str]:
    """Returns the lines of a page's blocks of shell commands, continued ones joined."""
    blocks = (block for _, kind, block in FENCE.findall(page.read_text(encoding="utf-8")) if kind == "sh")
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def commands(page: Path) -> Iterator[list[str]]:
    """Yields this project's commands on a page, in blocks and in the text, as lists of words."""
    for line in (*shell_lines(page), *(code.replace("\n", " ") for code in CODE.findall(prose(page)))):
        words = shlex.split(line.replace("…", ""), comments=True) if line.startswith("hidiff-") else []
        if words and words[0] in ("hidiff-export", "hidiff-run", "hidiff-serve"):
            yield words


@cache
def options_of(program: str, command: str) -> frozenset[str] | None:
    """Returns the options that a command shows, without ``--help``; None if there is no such command."""
    if program == "hidiff-serve":
        return frozenset(re.findall(r"--?[a-z][\w-]*", serve._parser().format_help()))
    if program == "hidiff-run" or command in ("generate", "bulk"):
        if command not in cli.COMMANDS:
            return None
        parser = argparse.ArgumentParser()
        cli.COMMANDS[command].add_options(parser)
        return frozenset(name for action in parser._actions for name in action.option_strings)
    found = main.get_command(click.Context(main), command)
    if found is None:
        return None
    shown = (parameter for parameter in found.params if not getattr(parameter, "hidden", False))
    return frozenset(name for parameter in shown for name in parameter.opts)


def wrong_commands(page: Path) -> list[str]:
    """Returns the commands on a page that are none, and those with an option that there is not."""
    wrong = []
    for program, *words in commands(page):
        named = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)} - {"--help", "--version"}
        known = options_of(program, words[0] if words else "")
        if words and (known is None or not named <= known):
            wrong.append(shlex.join((program, *words)))
    return wrong


def wrong_recipes(page: Path) -> list[str]:
    """Returns the commands on a page whose recipe, with what they set, is refused."""
    wrong = []
    for program, *words in commands(page):
        if program == "hidiff-export" and len(words) > 1 and words[0] in ("plan", "build") and words[1].islower():
            changes = [value for option, value in pairwise(words) if option == "--set"]
            try:
                Recipe.load(words[1], changes)
            except HidiffError:
                wrong.append(shlex.join((program, *words)))
    return wrong


def folder_map(page: Path) -> list[Path]:
    """Returns the folders and files that the map at the top of a page links to, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    section = text[text.index("## Folder map") : text.index("\n## ", text.index("## Folder map") + 1)]
    return [(page.parent / link).resolve() for _text, link in LINK.findall(section)]


def unmapped(page: Path) -> list[str]:
    """Returns the folders of both packages that the map on a page leaves out."""
    mapped = set(folder_map(page))
    folders = {path.parent for package in PACKAGES.values() for path in package.rglob("*.py")}
    return sorted(folder.relative_to(ROOT).as_posix() for folder in folders - mapped)


def british(page: Path) -> list[str]:
    """Returns API words on a page, outside of code and addresses, that are not spelled as the APIs spell them."""
    text = LINK.sub(r"\1", CODE.sub("", prose(page)))
    return BRITISH.findall(text)


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page) == []


@each_page
def test_files_and_folders_are_there(page: Path) -> None:
    assert missing_files(page) == []


@each_page
def test_names_are_in_the_packages(page: Path) -> None:
    assert missing_names(page) == []
    assert undefined(page) == []


@each_page
def test_commands_options_and_recipes_are_there(page: Path) -> None:
    assert wrong_commands(page) == []
    assert wrong_recipes(page) == []


def test_every_way_to_open_a_bundle_is_told() -> None:
    told = (ROOT / "runtime/README.md").read_text(encoding="utf-8")
    ways = [way.name for way in signature(hidiff_runtime.open).parameters.values() if way.kind is way.KEYWORD_ONLY]
    assert "memory_limit" in ways
    assert [name for name in ways if f"{name}=" not in told] == []


def test_every_option_of_the_server_has_a_row() -> None:
    page = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    options = options_of("hidiff-serve", "") or frozenset()
    named = {name for name in options if name.startswith("--")} - {"--help", "--version"}
    assert "--memory-limit" in named
    assert sorted(name for name in named if not re.search(rf"`{name}\b(?!-)", rows)) == []


@each_page
def test_api_words_are_spelled_as_in_the_apis(page: Path) -> None:
    assert british(page) == []


def test_the_first_screen_leads_from_a_checkpoint_to_a_picture(tmp_path: Path) -> None:
    page = tmp_path / "first_screen.md"
    page.write_text("\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40]), encoding="utf-8")
    shown = FENCE.findall(page.read_text(encoding="utf-8"))
    assert "pip install ./runtime '.[cpu]'" in shown[0][2]
    build, generate = (shlex.split(line, comments=True) for line in shell_lines(page) if line.startswith("hidiff-"))
    assert build[:4] == ["hidiff-export", "build", "sd15-1024", "--source"]
    assert generate[:2] == ["hidiff-run", "generate"]
    assert generate[2] == build[build.index("-o") + 1]
    assert shown[1][1] == "python"


def test_every_folder_is_on_the_map() -> None:
    assert unmapped(ARCHITECTURE) == []


@pytest.mark.parametrize(("package", "folder"), PACKAGES.items())
def test_the_map_has_the_order_of_the_layers(package: str, folder: Path) -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contract = re.search(rf'containers = \["{package}"\].*?layers = \[(.*?)\]', settings, re.DOTALL)
    assert contract is not None
    layers = [name for layer in re.findall(r'"([^"]+)"', contract[1]) for name in layer.split(" : ")]
    below = [name for name in reversed(layers) if (folder / name).is_dir()]
    assert [path.name for path in folder_map(ARCHITECTURE) if path.parent == folder and path.name in below] == below


def test_what_is_not_there_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One (two)\n\n# One two\n\n"
        "[there](#one-two) [again](#one-two-1) [page](page.md#one-two) [web](https://example.com/none)\n"
        "[gone](gone.md) [no heading](#three) [neither](page.md#three) [`Gone`](code.py) [`There`](code.py)\n"
        "`families.py` `family.py` `hidiff_export/build/` `hidiff_export/graph/`\n"
        "`hidiff_runtime.open` `hidiff_runtime.close` quantised `quantised` Normalisation [quantized](quantised.md)\n"
        "`hidiff_runtime.proof.verdict` `hidiff-export plan sd15-1024 --step 3` `hidiff-export plan sd15-1025`\n\n"
        "```python\nfrom hidiff_runtime.bulk.storage import Location, Nowhere\n# [not a link](none)\n```\n\n"
        "```sh\n# Three\nhidiff-run draw bundle\nhidiff-export build sd15-1024 -o bundle --set widht=3  # note\n"
        "hidiff-export triton bundle -o repository --layout per-phase\n"
        "hidiff-serve bundle --hosts 0.0.0.0\nhidiff-export generate bundle -p there -o there.png\n```\n",
        encoding="utf-8",
    )
    (tmp_path / "code.py").write_text("class There: ...\n", encoding="utf-8")
    assert broken_links(page) == ["gone.md", "#three", "page.md#three", "quantised.md"]
    assert british(page) == ["quantised", "Normalisation"]
    assert undefined(page) == ["`Gone`"]
    assert missing_files(page) == ["families.py", "hidiff_export/build/"]
    assert missing_names(page) == [
        "hidiff_runtime.bulk.storage.Nowhere",
        "hidiff_runtime.close",
        "hidiff_runtime.proof.verdict",
    ]
    assert wrong_commands(page) == [
        "hidiff-run draw bundle",
        "hidiff-export triton bundle -o repository --layout per-phase",
        "hidiff-serve bundle --hosts 0.0.0.0",
        "hidiff-export plan sd15-1024 --step 3",
    ]
    assert wrong_recipes(page) == [
        "hidiff-export build sd15-1024 -o bundle --set widht=3",
        "hidiff-export plan sd15-1025",
    ]


def test_a_folder_that_the_map_leaves_out_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shown = [folder for folder in PACKAGES.values() for folder in (folder, *folder.rglob("*")) if folder.name != "http"]
    page.write_text("## Folder map\n" + "".join(f"[x]({path})\n" for path in shown) + "\n## Next\n", encoding="utf-8")
    assert unmapped(page) == ["runtime/hidiff_runtime/serving/http"]
