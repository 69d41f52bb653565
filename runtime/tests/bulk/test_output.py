"""What a bulk job leaves, and what a second one finds to do: nothing lost, nothing taken for finished that is not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from hidiff_runtime.bulk.output import DEAD, INDEX, PARTS, RUN, ImageEntry, Output
from hidiff_runtime.bulk.resume import CHANGED, MISSING, SPOILT, ResumePlan, plan_resume
from hidiff_runtime.bulk.rows import DeadLetter, Row, find_rows
from hidiff_runtime.bulk.storage import Location, Store
from hidiff_runtime.errors import InputError, StorageError
from hidiff_runtime.prompt_files.raw_rows import Raw

pytestmark = pytest.mark.needs("pyarrow")

HASH = "b" * 64
SETTINGS = {"seed": 0, "set": {}}


@pytest.fixture
def place(tmp_path: Path) -> Location:
    return Location(str(tmp_path / "out"))


def opened(place: Location) -> Output:
    output = Output(Store(place))
    output.begin(HASH, SETTINGS, {"prompts": "here"})
    return output


def rows(*prompts: str) -> list[Row]:
    found, _ = find_rows([Raw(n, f"line {n}", {"prompt": text}) for n, text in enumerate(prompts)], seed=0, defaults={})
    return found


def made(output: Output, row: Row, index: int = 0, content: bytes = b"a picture") -> ImageEntry:
    """A picture of a row, written."""
    file = f"pictures/{row.id}.{index}.png"
    output.store.write(file, content)
    return ImageEntry(
        id=row.id,
        row=row.number,
        picture=index,
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        seed=3,
        seconds=0.5,
        parameters="{}",
        fingerprint=row.fingerprint(HASH),
        bundle=HASH,
        parity="p",
    )


def plan(place: Location, asked: list[Row], **options: object) -> ResumePlan:
    output = Output(Store(place))
    output.look(HASH, SETTINGS)
    return plan_resume(asked, [], output, HASH, **{"batch": 1, **options})  # type: ignore[arg-type]


def test_the_index_is_read_back_and_has_each_picture_once(place: Location) -> None:
    output = opened(place)
    first, second = rows("x", "y")
    output.add([made(output, second, 0), made(output, second, 1)])
    output.flush(now=True)
    output.add([made(output, first)])
    output.finish({})
    assert output.store.sizes(PARTS) == {}
    again = Output(Store(place))
    again.look(HASH, SETTINGS)
    assert again.index == output.index
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(Path(place.url) / INDEX).to_pylist()
    assert [(row["id"], row["picture"]) for row in table] == [("000000", 0), ("000001", 0), ("000001", 1)]


def test_what_was_flushed_outlives_a_job_that_is_cut_off(place: Location) -> None:
    output = opened(place)
    first, second = rows("x", "y")
    output.add([made(output, first)])
    output.add_dead_letter(DeadLetter.of(second, InputError("No."), HASH))
    output.flush(now=True)
    found = plan(place, [first, second])
    assert (found.todo, found.finished, [letter.id for letter in found.failed]) == ((), 1, ["000001"])
    assert plan(place, [first, second], retry_failed=True).todo == (second,)


def test_a_row_that_is_made_again_replaces_itself_in_the_index(place: Location) -> None:
    output = opened(place)
    (old,), (new,) = rows("x"), rows("y")
    output.add([made(output, old)])
    output.finish({})
    output.add([made(output, new, content=b"another")])
    output.flush(now=True)
    found = plan(place, [new])
    assert (found.todo, found.finished) == ((), 1)
    assert plan(place, [old]).again == {CHANGED: 1}


def test_only_whole_pictures_of_the_same_row_count(place: Location) -> None:
    output = opened(place)
    asked = rows("same", "changed", "missing", "short", "spoilt", "new")
    for row in asked[:5]:
        output.add([made(output, row)])
    output.finish({})
    pictures = Path(place.url) / "pictures"
    (pictures / "000002.0.png").unlink()
    (pictures / "000003.0.png").write_bytes(b"a pict")
    (pictures / "000004.0.png").write_bytes(b"A picture")
    asked[1] = dataclasses.replace(asked[1], values={"prompt": "other", "seed": 1})
    found = plan(place, asked)
    assert found.finished == 1
    assert [row.id for row in found.todo] == ["000001", "000002", "000003", "000004", "000005"]
    assert found.again == {CHANGED: 1, MISSING: 2, SPOILT: 1}
    assert plan(place, asked, recheck="size").again == {CHANGED: 1, MISSING: 2}
    assert plan(place, asked[:1], batch=2).again == {MISSING: 1}


def test_a_row_that_failed_is_tried_again_once_it_changed(place: Location) -> None:
    output = opened(place)
    (row,) = rows("x")
    output.add_dead_letter(DeadLetter.of(row, InputError("No.", given="x", advice="Mend it."), HASH))
    output.finish({})
    assert plan(place, [row]).todo == ()
    mended = dataclasses.replace(row, values={**row.values, "prompt": "y"})
    assert plan(place, [mended]).todo == (mended,)
    (line,) = (Path(place.url) / DEAD).read_text().splitlines()
    told = json.loads(line)
    assert (told["reason"], told["given"], told["advice"], told["kind"]) == ("No.", "x", "Mend it.", "input")


def test_an_output_belongs_to_one_bundle_and_its_settings(place: Location) -> None:
    output = opened(place)
    assert json.loads((Path(place.url) / RUN).read_text())["bundle"] == HASH
    for bundle, settings, message in (
        ("c" * 64, SETTINGS, "another bundle"),
        (HASH, {"seed": 1, "set": {}}, "other settings"),
        (HASH, {"seed": 0, "set": {"steps": 3}}, "other settings"),
    ):
        with pytest.raises(InputError, match=message):
            output.begin(bundle, settings, {})
    output.begin(HASH, SETTINGS, {})


def test_a_folder_of_something_else_is_left_alone(place: Location) -> None:
    folder = Path(place.url)
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not from a bulk job"):
        opened(place)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_dead_letters_are_read_back_whatever_text_they_hold(place: Location) -> None:
    output = opened(place)
    texts = ["a\u2028b\u2029c\u0085d\x0be\x1cf", "a \ud800 boat", "\r\n\t\x00\x1b", "é \U0001f600", "]"]
    letters = [
        DeadLetter(text, n, "line 1", text, text, text, "input", text, {text: text, "seed": 2**64, "eta": 0.5})
        for n, text in enumerate(texts)
    ]
    for letter in letters:
        output.add_dead_letter(letter)
    output.finish({"output": "\udcff"})
    again = opened(place)
    assert again.dead == letters
    again.keep(again.dead)
    before = (Path(place.url) / DEAD).read_bytes()
    again.flush(now=True)
    assert (Path(place.url) / DEAD).read_bytes() == before
    assert len(before.split(b"\n")) == len(texts) + 1
    for line in before.decode().split("\n")[:-1]:
        json.loads(line, parse_constant=pytest.fail)


def test_facts_that_cannot_be_encoded_are_noted_all_the_same(place: Location) -> None:
    Output(Store(place)).begin(HASH, SETTINGS, {"prompts": "\udcff.txt"})
    assert json.loads((Path(place.url) / RUN).read_bytes())["prompts"] == "\udcff.txt"


LETTER = dataclasses.asdict(DeadLetter("a", 0, "line 1", "No.", "x", "Mend it.", "input"))

BROKEN = {
    "no JSON": (RUN, b"no\n", "Choose another output"),
    "an empty run": (RUN, b"", "Choose another output"),
    "an index that is none": (INDEX, b"no\n", "found again"),
    "a part that is none": (f"{PARTS}/part-x.parquet", b"no\n", "found again"),
    "letters that are none": (DEAD, b"no\n", "Remove it: rows that failed are tried again"),
    "letters that are no text": (DEAD, b"\xff\n", "Remove it: rows that failed are tried again"),
    "letters of another version": (DEAD, b'{"id": "a"}\n', "Remove it: rows that failed are tried again"),
    "letters with other types": (
        DEAD,
        json.dumps({**LETTER, "row": None}).encode(),
        "rows that failed are tried again",
    ),
    "letters with other keys": (DEAD, json.dumps({**LETTER, "fingerprint": []}).encode(), "are tried again"),
    "letters with a number that is no text": (DEAD, json.dumps({**LETTER, "id": 1}).encode(), "are tried again"),
    "letters that are lists": (DEAD, b"[]\n", "Remove it: rows that failed are tried again"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_of_an_earlier_job_is_named_with_what_to_do(place: Location, case: str) -> None:
    name, content, advice = BROKEN[case]
    opened(place).finish({})
    path = Path(place.url) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(StorageError) as caught:
        opened(place)
    assert str(caught.value.given).startswith(f"{name}: ")
    assert advice in caught.value.advice


def test_an_index_of_other_types_is_named(place: Location) -> None:
    import pyarrow
    from pyarrow import parquet

    output = opened(place)
    (row,) = rows("x")
    found = dataclasses.asdict(made(output, row))
    for changes in ({"row": "first"}, {"id": None}, {"picture": 0.5}, {"more": 1}):
        path = Path(place.url) / PARTS / "part-x.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([{**found, **changes}]), path)
        with pytest.raises(StorageError) as caught:
            opened(place)
        assert str(caught.value.given).startswith(f"{PARTS}/part-x.parquet: ")
        assert next(iter(changes)) in str(caught.value.given)
        parquet.write_table(pyarrow.Table.from_pylist([found]), path)
        assert list(opened(place).index) == [row.id]


def test_what_is_no_part_of_the_index_is_left_alone(place: Location) -> None:
    output = opened(place)
    (row,) = rows("x")
    output.add([made(output, row)])
    output.flush(now=True)
    notes = Path(place.url) / PARTS / "notes.txt"
    notes.write_text("mine")
    again = opened(place)
    assert again.index == output.index
    again.finish({})
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]
    assert notes.read_text() == "mine"


@pytest.mark.parametrize(
    "value",
    [float("inf"), float("-inf"), float("nan"), 1e308, 10**400, 10**5000],
    ids=["inf", "-inf", "nan", "large", "whole", "long"],
)
def test_dead_letters_are_json_whatever_number_was_given(place: Location, value: float) -> None:
    output = opened(place)
    _, (letter,) = find_rows([Raw(0, "line 1", {"prompt": "x", "steps": value, "eta": value})], seed=0, defaults={})
    output.add_dead_letter(letter)
    output.add_dead_letter(DeadLetter.of(rows("y")[0], InputError("No.", given=value), HASH))
    output.finish({})
    for line in (Path(place.url) / DEAD).read_text().split("\n")[:-1]:
        json.loads(line, parse_constant=pytest.fail)
    assert opened(place).dead == output.dead


def test_letters_of_earlier_versions_may_give_numbers(place: Location) -> None:
    opened(place).finish({})
    (Path(place.url) / DEAD).write_text(json.dumps({**LETTER, "given": 2**64}) + "\n")
    assert opened(place).dead == [DeadLetter("a", 0, "line 1", "No.", str(2**64), "Mend it.", "input")]


def test_two_jobs_do_not_write_into_one_folder(place: Location) -> None:
    with Store(place).locked(), pytest.raises(StorageError, match="Another job"), Store(place).locked():
        pass
    with Store(place).locked():
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = Store(Location(str(tmp_path / "file/out")))
    with pytest.raises(StorageError, match="cannot be written"), store.locked():
        pass
    with pytest.raises(StorageError):
        store.write("a.png", b"x")
