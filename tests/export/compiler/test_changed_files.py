"""Files that change while a build goes on: what was made from them is made again, or the build ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hidiff_export.compiler.compile import build
from hidiff_export.compiler.stages.stage import Report, StageContext
from hidiff_export.errors import CheckpointError, StorageError
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.bundle_folder import BundleFolder
from hidiff_runtime.format.integrity import verify_files
from hidiff_runtime.format.manifest import Manifest
from tests.conftest import NoDisplay
from tests.export.compiler.killed_commits import manifest


@dataclass
class Writing:
    """A stage that writes one file, from those of the stages that it needs."""

    name: str
    needs: tuple[str, ...] = ()
    meanwhile: Callable[[Path, int], None] = lambda _folder, _run: None
    source: list[str] = field(default_factory=lambda: ["as it was"])
    runs: int = 0
    module: ClassVar[str] = __name__

    @property
    def title(self) -> str:
        return self.name

    def inputs(self, _context: StageContext) -> Any:
        return list(self.source)

    def run(self, context: StageContext, _report: Report) -> tuple[Path, ...]:
        self.runs += 1
        path = context.folder / "unet" / self.name
        path.parent.mkdir(exist_ok=True)
        path.write_text("+".join([self.name, *((context.folder / "unet" / name).read_text() for name in self.needs)]))
        self.meanwhile(context.folder / "unet", self.runs)
        return (path,)


class Noting(NoDisplay):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture(autouse=True)
def _manifests_of_any_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hidiff_export.compiler.stages.order.assemble_contents", lambda _recipe, _context, files: manifest(files)
    )


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load("tiny")


def stages(meanwhile: Callable[[Path, int], None]) -> tuple[Writing, ...]:
    return (Writing("a"), Writing("b", ("a",)), Writing("c"), Writing("d", ("c",), meanwhile))


def once(change: Callable[[Path], object], name: str) -> Callable[[Path, int], None]:
    """Changes a file when a stage runs for the first time."""

    def meanwhile(folder: Path, run: int) -> None:
        if run == 1:
            change(folder / name)

    return meanwhile


def other_content(path: Path) -> None:
    path.write_text("other")


@pytest.mark.parametrize("change", [Path.unlink, other_content])
def test_what_was_made_from_a_changed_file_is_made_again(
    recipe: Recipe, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    made, display = stages(once(change, "a")), Noting()
    result = build(recipe, tmp_path / "bundle", display, stages=made)
    verify_files(BundleFolder(tmp_path / "bundle"), Manifest.read(tmp_path / "bundle").files)
    assert (tmp_path / "bundle" / "unet" / "b").read_text() == "b+a"
    assert [stage.runs for stage in made] == [2, 2, 1, 1]
    assert "unet/a" in display.notices[0]
    assert "run again" in display.notices[0]
    assert [stage.reused for stage in result.stages] == [False] * 4


def test_a_stage_that_fails_for_a_file_that_is_gone_runs_again_with_it(recipe: Recipe, tmp_path: Path) -> None:
    first = Writing("a")
    between = Writing("b", meanwhile=once(Path.unlink, "a"))
    last = Writing("c", ("a",))
    build(recipe, tmp_path / "bundle", NoDisplay(), stages=(first, between, last))
    assert (tmp_path / "bundle" / "unet" / "c").read_text() == "c+a"
    assert [stage.runs for stage in (first, between, last)] == [2, 1, 2]


def test_inputs_that_cannot_be_read_for_a_file_that_is_gone_are_read_again_with_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    class Reading(Writing):
        def inputs(self, context: StageContext) -> Any:
            return (context.folder / "unet" / "a").read_text()

    first, between = Writing("a"), Writing("b", meanwhile=once(Path.unlink, "a"))
    build(recipe, tmp_path / "bundle", NoDisplay(), stages=(first, between, Reading("c")))
    assert [first.runs, between.runs] == [2, 1]


@pytest.mark.parametrize("force", [False, True])
def test_files_that_change_again_end_the_build_and_the_bundle_before_stays(
    recipe: Recipe, tmp_path: Path, force: bool
) -> None:
    output = tmp_path / "bundle"
    if force:
        build(recipe, output, NoDisplay(), stages=(Writing("before"),))
    made = (Writing("a"), Writing("b", ("a",), lambda folder, _run: (folder / "a").unlink()))
    with pytest.raises(StorageError, match="changed while the build went on") as caught:
        build(recipe, output, NoDisplay(), stages=made, force=force)
    assert caught.value.exit_code == 6
    assert caught.value.given == "unet/a is missing"
    assert output.exists() == force
    if force:
        assert (output / "unet" / "before").read_text() == "before"
    # The next run does again what was made from the file, too, though each of its own files is as it was.
    again = (Writing("a"), Writing("b", ("a",)))
    if not force:
        build(recipe, output, NoDisplay(), stages=again)
        assert [stage.runs for stage in again] == [1, 1]


def test_a_failure_that_has_another_reason_stays_what_it_is(recipe: Recipe, tmp_path: Path) -> None:
    def fail(_folder: Path, _run: int) -> None:
        raise FileNotFoundError("elsewhere")

    made = (Writing("a"), Writing("b", meanwhile=fail))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        build(recipe, tmp_path / "bundle", NoDisplay(), stages=made)
    assert [stage.runs for stage in made] == [1, 1]


def test_a_checkpoint_that_changes_while_it_is_read_gives_no_stage(recipe: Recipe, tmp_path: Path) -> None:
    source = ["as it was"]
    made = Writing("a", meanwhile=lambda _folder, run: source.append("more") if run == 1 else None, source=source)
    with pytest.raises(CheckpointError, match="changed while it was read") as caught:
        build(recipe, tmp_path / "bundle", NoDisplay(), stages=(made,))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "bundle").exists()
    build(recipe, tmp_path / "bundle", NoDisplay(), stages=(made,))
    assert made.runs == 2


def test_a_checkpoint_that_changes_after_it_was_read_gives_no_bundle(recipe: Recipe, tmp_path: Path) -> None:
    made = Writing("a")
    later = Writing("b", meanwhile=lambda _folder, run: made.source.append("more") if run == 1 else None)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        build(recipe, tmp_path / "bundle", NoDisplay(), stages=(made, later))
    assert not (tmp_path / "bundle").exists()
    build(recipe, tmp_path / "bundle", NoDisplay(), stages=(made, later))
    assert [made.runs, later.runs] == [2, 1]


def test_what_killed_builds_left_is_named_when_it_goes(recipe: Recipe, tmp_path: Path) -> None:
    made = Writing("a", meanwhile=lambda folder, _run: (folder / "left").touch())
    display = Noting()
    build(recipe, tmp_path / "bundle", display, stages=(made,))
    assert display.notices == ["Deleted what no stage of this build wrote: unet/left."]
