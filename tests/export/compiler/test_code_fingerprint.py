"""What a stage's fingerprint holds of the sources: what the stage runs, and no more."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

import hidiff_export
import hidiff_runtime
from hidiff_export.compiler import compile
from hidiff_export.compiler.code_fingerprint import Sources, own_sources
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage
from hidiff_export.compiler.stages.stage import Report
from hidiff_export.errors import Cancelled
from hidiff_export.recipe import Recipe
from tests.conftest import NoDisplay

PACKAGES = {
    "hidiff_export": Path(str(hidiff_export.__file__)).parent,
    "hidiff_runtime": Path(str(hidiff_runtime.__file__)).parent,
}
STAGES = {
    name: f"hidiff_export.compiler.stages.{name}"
    for name in ("weights", "scheduler_tables", "graphs", "engines", "reference", "quantization", "reuse")
}


def small(root: Path, files: dict[str, str]) -> Sources:
    """Two packages of a few modules."""
    for name, text in {"one/__init__.py": "", "two/__init__.py": "", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Sources({name: root / name for name in ("one", "two")})


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of both packages."""
    root = tmp_path_factory.mktemp("copies")
    for name, folder in PACKAGES.items():
        shutil.copytree(folder, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture
def edited(copies: Path) -> Iterator[Callable[[str, str], set[str]]]:
    """Which stages' fingerprints another line at the end of a file changes: ``edited(file, line)``."""
    originals: dict[Path, str] = {}

    def edit(file: str, line: str) -> set[str]:
        path, before = copies / file, fingerprints(copies)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        originals.setdefault(path, text)
        path.write_text(f"{text}\n{line}\n", encoding="utf-8")
        after = fingerprints(copies)
        return {name for name in STAGES if before[name] != after[name]}

    yield edit
    for path, text in originals.items():
        path.write_text(text, encoding="utf-8")


def fingerprints(root: Path) -> dict[str, str]:
    """Each stage's, by sources that are read anew."""
    sources = Sources({name: root / name for name in PACKAGES})
    return {name: sources.fingerprint(module) for name, module in STAGES.items()}


@pytest.mark.parametrize(
    "file",
    [
        "hidiff_runtime/serving/public_errors.py",
        "hidiff_runtime/serving/http/server.py",
        "hidiff_runtime/serving/triton/decoupled_model.py",
        "hidiff_runtime/bulk/job.py",
        "hidiff_runtime/cli/generate.py",
        "hidiff_runtime/pipeline/pipeline.py",
        "hidiff_export/cli/inspect.py",
        "hidiff_export/compiler/compile.py",
        "hidiff_export/triton/repository.py",
        "hidiff_export/verification/report.py",
        "hidiff_export/diffusers_api/bundle_unet.py",
    ],
)
def test_no_stage_runs_servers_commands_or_what_writes_reports(
    file: str, edited: Callable[[str, str], set[str]]
) -> None:
    assert edited(file, "# another line") == set()


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("hidiff_runtime/errors.py", {*STAGES}),
        ("hidiff_export/__init__.py", {*STAGES}),
        ("hidiff_export/compiler/stages/stage.py", {*STAGES}),
        ("hidiff_export/graph/passes/nearest_to_gather.py", {"graphs", "engines", "quantization", "reuse"}),
        ("hidiff_export/graph/passes/split_gemm.py", {"engines"}),
        (
            "hidiff_export/scheduler_tables/scheduler_probe.py",
            {"scheduler_tables", "graphs", "engines", "reference", "reuse"},
        ),
        ("hidiff_export/reference/diffusers_run.py", {"reference"}),
        ("hidiff_export/compiler/stages/reuse.py", {"reuse"}),
        ("hidiff_export/engines/tensorrt/worker.py", {"engines"}),
        ("hidiff_export/quantization/worker.py", {"quantization"}),
        ("hidiff_runtime/backends/tensorrt/plans.py", {"engines", "reference"}),
    ],
)
def test_stages_run_what_they_import_and_what_runs_in_a_process_of_its_own(
    file: str, stages: set[str], edited: Callable[[str, str], set[str]]
) -> None:
    assert edited(file, "# another line") == stages


def test_a_new_import_is_followed_and_one_for_type_checkers_is_not(edited: Callable[[str, str], set[str]]) -> None:
    """In a function, of a module that nothing imported before."""
    edited("hidiff_export/graph/added.py", "NEW = 1\n")
    assert edited("hidiff_export/graph/added.py", "NEW = 2") == set()
    late = "def late():\n    from hidiff_export.graph import added\n    return added"
    assert edited("hidiff_export/reference/reference.py", late) == {"reference"}
    assert edited("hidiff_export/graph/added.py", "NEW = 3") == {"reference"}
    unseen = "if TYPE_CHECKING:\n    from hidiff_export.graph import added"
    assert edited("hidiff_export/graph/passes/split_gemm.py", unseen) == {"engines"}
    assert edited("hidiff_export/graph/added.py", "NEW = 4") == {"reference"}


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("import two.part", {"two", "two.part"}),
        ("import two.part as short, one.other", {"two", "two.part", "one.other"}),
        ("from two import part", {"two", "two.part"}),
        ("from two import (\n    any,\n    part,\n)", {"two", "two.part"}),
        ("from two.part import name", {"two", "two.part"}),
        ("from two.part import *", {"two", "two.part"}),
        ("from . import near", {"one.sub.near"}),
        ("from .near import name", {"one.sub.near"}),
        ("from .. import other", {"one.other"}),
        ("from ..other import name", {"one.other"}),
        ("def late():\n    import two.part", {"two", "two.part"}),
        ("try:\n    from two.part import name\nexcept ImportError:\n    pass", {"two", "two.part"}),
        ("if True:\n    import two.part\nelse:\n    import one.other", {"two", "two.part", "one.other"}),
        ('COMMAND = ["-m", "two.part"]', {"two", "two.part"}),
        ("if TYPE_CHECKING:\n    import two.part\n\nimport one.other", {"one.other"}),
        ("if typing.TYPE_CHECKING:\n    from two import (\n        part,\n    )\n", set()),
        ("# import two.part", set()),
        ('"""What goes\nfrom two to part."""', set()),
        ("import twofold.part", set()),
        ("from two import used", {"two", "two.home"}),
        ("import two\n\ntwo.used()", {"two", "two.home"}),
        ("import two\n\ntwo.unknown()", {"two"}),
        ("from one.late import any", {"one.late", "one.late.first", "one.late.second"}),
    ],
)
def test_every_way_to_name_a_module_is_followed(line: str, runs: set[str], tmp_path: Path) -> None:
    lazy = (
        "if TYPE_CHECKING:\n    from two.home import used\n\n\n"
        "def __getattr__(name):\n    from two.home import used\n\n    return used\n"
    )
    sources = small(
        tmp_path,
        {
            "one/sub/__init__.py": "",
            "one/sub/start.py": line,
            "one/sub/near.py": "",
            "one/other.py": "",
            "one/late/__init__.py": 'def any(name):\n    return import_module(f"{__name__}.{name}")\n',
            "one/late/first.py": "",
            "one/late/second.py": "",
            "two/__init__.py": lazy,
            "two/home.py": "",
            "two/part.py": "",
        },
    )
    assert sources.closure("one.sub.start") == {"one", "one.sub", "one.sub.start"} | runs


def test_modules_that_import_each_other_have_the_same_sources(tmp_path: Path) -> None:
    sources = small(tmp_path, {"one/a.py": "import two.b", "two/b.py": "import one.a"})
    assert sources.closure("one.a") == sources.closure("two.b") == {"one", "one.a", "two", "two.b"}


def test_a_module_outside_of_the_packages_counts_with_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = ModuleType("outside")
    outside.__file__ = str(tmp_path / "outside.py")
    monkeypatch.setitem(sys.modules, "outside", outside)
    before = []
    for line in ("from hidiff_export import errors", "import hidiff_export.errors"):
        Path(outside.__file__).write_text(line, encoding="utf-8")
        sources = Sources(PACKAGES)
        assert sources.closure("outside") == {
            *("outside", "hidiff_export", "hidiff_export.errors"),
            *("hidiff_runtime", "hidiff_runtime.errors", "hidiff_runtime.version"),
        }
        before.append(sources.fingerprint("outside"))
    assert before[0] != before[1]


class Reusing(NoDisplay):
    """Keeps what is reused, and stops at the sampler tables."""

    def __init__(self) -> None:
        self.reused: list[str] = []

    @contextmanager
    def stage(self, title: str, *, reused: bool) -> Iterator[Report]:
        if reused:
            self.reused.append(title)
        if title == SchedulerTablesStage.title:
            raise KeyboardInterrupt
        yield lambda _done, _total, _note: None


def test_a_half_built_bundle_goes_on_after_an_edit_elsewhere_and_not_after_one_of_its_code(
    copies: Path, edited: Callable[[str, str], set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "own_sources", lambda: Sources({name: copies / name for name in PACKAGES}))
    recipe = Recipe.load("tiny", ("width=64", "height=64", "text=false", "vae=false"))

    def reused() -> list[str]:
        display = Reusing()
        with pytest.raises(Cancelled):
            compile.build(recipe, tmp_path / "bundle", display)
        return display.reused

    assert reused() == []
    edited("hidiff_runtime/serving/public_errors.py", 'ADDED = "another message"')
    edited("hidiff_export/graph/passes/split_gemm.py", "# another line")
    assert reused() == ["weights"]
    edited("hidiff_export/checkpoints/load.py", "# another line")
    assert reused() == []


@pytest.mark.parametrize("name", PACKAGES)
def test_what_is_cut_out_of_the_sources_is_what_pythons_parser_finds(name: str) -> None:
    for path in PACKAGES[name].rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        module = ".".join((name, *path.relative_to(PACKAGES[name]).with_suffix("").parts)).removesuffix(".__init__")
        assert "\\\n" not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL), f"{path}: a statement may go on unseen"
        missing = {found for found in imported(ast.parse(text)) if found.partition(".")[0] in PACKAGES}
        missing -= own_sources().closure(module)
        assert not missing, path


def imported(tree: ast.Module) -> set[str]:
    """Modules whose import statements Python's parser finds, but for those of type checkers and of ``__getattr__``."""
    found: set[str] = set()
    left: list[ast.AST] = [node for node in tree.body if getattr(node, "name", "") != "__getattr__"]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            found.add(str(node.module))
        left += ast.iter_child_nodes(node)
    return found


def test_nothing_is_imported_with_the_stages_that_was_not_found() -> None:
    """In an interpreter of its own, by what Python itself says that it imported."""
    asked = "import json, sys, hidiff_export.compiler.stages.order; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    loaded = {name for name in json.loads(done.stdout.splitlines()[-1]) if name.partition(".")[0] in PACKAGES}
    assert len(loaded) > 100
    assert loaded <= own_sources().closure("hidiff_export.compiler.stages.order")


def test_modules_imported_by_names_that_are_known_later_are_none_of_ours() -> None:
    """A new one has to be found too: see what `hidiff_export.compiler.code_fingerprint` follows."""
    unfollowed = {
        "hidiff_export.engines.tensorrt.worker",  # TensorRT
        "hidiff_export.quantization.worker",  # ModelOpt
        "hidiff_runtime.backends.openvino.quiet_import",  # OpenVINO
        "hidiff_runtime.backends.tensorrt.runtime_library",  # TensorRT
    }
    stages = set().union(*(own_sources().closure(module) for module in STAGES.values()))
    dynamic = set()
    for module in stages:
        text = own_sources()._source(module).decode()
        if re.search(r"\b(?:import_module|__import__|run_module|spec_from_\w+)\(", text) and module != "hidiff_runtime":
            dynamic.add(module)
    assert dynamic == unfollowed


def test_no_stage_reads_a_file_of_a_package_that_is_no_source() -> None:
    others = {
        path.name
        for folder in PACKAGES.values()
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix not in (".py", ".pyc")
        # A checkpoint like any other: what stages read of it is hashed as their recipe's source.
        and not path.is_relative_to(PACKAGES["hidiff_export"] / "demo_model")
    }
    assert others == {"py.typed", "page.html", "recipe.schema.json"}
    stages = set().union(*(own_sources().closure(module) for module in STAGES.values()))
    assert not stages & {"hidiff_runtime.serving.http.page", "hidiff_export.recipe.json_schema"}
