"""What a bulk job leaves, and what a second one finds to do: nothing lost, nothing taken for finished that is not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from hidiff_runtime.bulk.output import DEAD, INDEX, PARTS, RUN, Output, Picture
from hidiff_runtime.bulk.plan import CHANGED, MISSING, SPOILT, Plan, make_plan
from hidiff_runtime.bulk.rows import DeadLetter, Raw, Row, find_rows
from hidiff_runtime.bulk.storage import Place, Store
from hidiff_runtime.errors import InputError, StorageError

pytestmark = pytest.mark.needs("pyarrow")

HASH = "b" * 64
SETTINGS = {"seed": 0, "set": {}}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "out"))


def opened(place: Place) -> Output:
    output = Output(Store(place))
    output.begin(HASH, SETTINGS, {"prompts": "here"})
    return output


def rows(*prompts: str) -> list[Row]:
    found, _ = find_rows([Raw(n, f"line {n}", {"prompt": text}) for n, text in enumerate(prompts)], seed=0, defaults={})
    return found


def made(output: Output, row: Row, index: int = 0, content: bytes = b"a picture") -> Picture:
    """A picture of a row, written."""
    file = f"pictures/{row.id}.{index}.png"
    output.store.write(file, content)
    return Picture(
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


def plan(place: Place, asked: list[Row], **options: object) -> Plan:
    output = Output(Store(place))
    output.look(HASH, SETTINGS)
    return make_plan(asked, [], output, HASH, **{"batch": 1, **options})  # type: ignore[arg-type]


def test_the_index_is_read_back_and_has_each_picture_once(place: Place) -> None:
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


def test_what_was_flushed_outlives_a_job_that_is_cut_off(place: Place) -> None:
    output = opened(place)
    first, second = rows("x", "y")
    output.add([made(output, first)])
    output.bury(DeadLetter.of(second, InputError("No."), HASH))
    output.flush(now=True)
    found = plan(place, [first, second])
    assert (found.todo, found.finished, [letter.id for letter in found.failed]) == ((), 1, ["000001"])
    assert plan(place, [first, second], retry_failed=True).todo == (second,)


def test_a_row_that_is_made_again_replaces_itself_in_the_index(place: Place) -> None:
    output = opened(place)
    (old,), (new,) = rows("x"), rows("y")
    output.add([made(output, old)])
    output.finish({})
    output.add([made(output, new, content=b"another")])
    output.flush(now=True)
    found = plan(place, [new])
    assert (found.todo, found.finished) == ((), 1)
    assert plan(place, [old]).again == {CHANGED: 1}


def test_only_whole_pictures_of_the_same_row_count(place: Place) -> None:
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


def test_a_row_that_failed_is_tried_again_once_it_changed(place: Place) -> None:
    output = opened(place)
    (row,) = rows("x")
    output.bury(DeadLetter.of(row, InputError("No.", given="x", advice="Mend it."), HASH))
    output.finish({})
    assert plan(place, [row]).todo == ()
    mended = dataclasses.replace(row, values={**row.values, "prompt": "y"})
    assert plan(place, [mended]).todo == (mended,)
    (line,) = (Path(place.url) / DEAD).read_text().splitlines()
    told = json.loads(line)
    assert (told["reason"], told["given"], told["advice"], told["kind"]) == ("No.", "x", "Mend it.", "input")


def test_an_output_belongs_to_one_bundle_and_its_settings(place: Place) -> None:
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


def test_a_folder_of_something_else_is_left_alone(place: Place) -> None:
    folder = Path(place.url)
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not from a bulk job"):
        opened(place)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", [RUN, INDEX, DEAD])
def test_a_broken_file_of_an_earlier_job_is_named(place: Place, name: str) -> None:
    output = opened(place)
    output.add([made(output, rows("x")[0])])
    output.finish({})
    (Path(place.url) / name).write_text("no\n")
    with pytest.raises(StorageError) as caught:
        opened(place)
    assert name in str(caught.value)


def test_two_jobs_do_not_write_into_one_folder(place: Place) -> None:
    with Store(place).locked(), pytest.raises(StorageError, match="Another job"), Store(place).locked():
        pass
    with Store(place).locked():
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = Store(Place(str(tmp_path / "file/out")))
    with pytest.raises(StorageError, match="cannot be written"), store.locked():
        pass
    with pytest.raises(StorageError):
        store.write("a.png", b"x")
