"""Prompts from tables and lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hidiff_runtime.bulk.rows import find_rows, read_prompts
from hidiff_runtime.bulk.storage import Location
from hidiff_runtime.errors import InputError

pytestmark = pytest.mark.needs("pyarrow")

ROWS = [
    {"id": "a", "prompt": "a boat, at sea", "seed": 3, "strength": 0.5},
    {"id": "b", "prompt": 'a "tree"\nin fog', "seed": None, "strength": None},
]


def write(folder: Path, kind: str) -> Path:
    import pyarrow
    from pyarrow import parquet

    path = folder / f"prompts.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "csv":
        path.write_text('id,prompt,seed,strength\r\na,"a boat, at sea",3,0.5\r\n\r\nb,"a ""tree""\nin fog",,\r\n')
    else:
        path.write_text("\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "txt"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    raws = read_prompts(Location.of(str(write(tmp_path, kind))))
    rows, refused = find_rows(raws, seed=0, defaults={})
    assert refused == []
    assert [row.id for row in rows] == ["a", "b"]
    assert rows[0].values == {"prompt": "a boat, at sea", "seed": 3, "strength": 0.5}
    assert rows[1].values["prompt"] == 'a "tree"\nin fog'
    assert set(rows[1].values) == {"prompt", "seed"}


def test_lines_are_text_or_json_and_a_bad_one_stops_none(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a boat\n\n{"prompt": "a tree", "seed": 3}\n{"prompt": \n{"prompt": "x", "seed": "y"}\n["a"]\n')
    rows, refused = find_rows(read_prompts(Location.of(str(path))), seed=0, defaults={})
    assert [(row.number, row.where, row.values["prompt"]) for row in rows] == [
        (0, "line 1", "a boat"),
        (1, "line 3", "a tree"),
        (4, "line 6", '["a"]'),
    ]
    assert [(letter.id, letter.where, letter.reason) for letter in refused] == [
        ("000002", "line 4", "The line is not JSON."),
        ("000003", "line 5", "seed must be a whole number."),
    ]


def test_a_csv_row_with_too_few_values_is_refused_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,seed\na boat\na tree,1\n")
    rows, refused = find_rows(read_prompts(Location.of(str(path))), seed=0, defaults={})
    assert [row.values["prompt"] for row in rows] == ["a tree"]
    assert "1 values, 2 columns" in refused[0].given


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "cannot be read"),
        ("a.csv", "prompt,sead\nx,1\n", "columns that are no fields"),
        ("a.csv", "seed\n1\n", "one column called prompt"),
        ("a.csv", "prompt,prompt\nx,y\n", "one column called prompt"),
        ("a.csv", 'prompt\n"x\n', "no CSV file"),
        ("a.csv", "prompt\n", "no prompts in the file"),
        ("a.txt", " \n\n", "no prompts in the file"),
        ("a.txt", b"\xff\xfe\x00", "UTF-16"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.prompts", "a boat\n", "ending of the prompts' file"),
        ("none", None, "ending of the prompts' file"),
        ("a.txt", "prompt,seed\nx,1\n", "a table with a header row"),
        ("a.parquet", "no table", "no Parquet file"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_prompts(Location.of(str(path)))


def test_a_column_may_be_passed_over_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,author\nx,me\n")
    assert len(read_prompts(Location.of(str(path)), ["author"])) == 1


def test_places_are_paths_or_buckets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://here:9000")
    bucket = Location.of("s3://bucket/some/prompts.csv")
    assert bucket.endpoint == "http://here:9000"
    assert Location.of("s3://bucket/x", "http://there").endpoint == "http://there"
    assert bucket.parent.joined("a.png").url == "s3://bucket/some/a.png"
    assert bucket.parent.joined("s3://other/a.png") == Location("s3://other/a.png", "http://here:9000")
    folder = Location.of(str(tmp_path / "prompts.csv")).parent
    assert folder.joined("a/b.png").url == str(tmp_path / "a/b.png")
    assert folder.joined("/c.png").url == "/c.png"
    assert bucket.parent.joined("/c.png").is_local
    for wrong in ("gs://bucket/x", "s3://", "s3:///"):
        with pytest.raises(InputError):
            Location.of(wrong)
