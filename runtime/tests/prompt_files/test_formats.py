"""Files of prompts: each ending read as what it is, and each that lies refused with the ending that fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hidiff_runtime.cli.prompt_options import read_prompts
from hidiff_runtime.errors import EngineError, InputError
from hidiff_runtime.prompt_files.formats import ENDINGS, read_rows
from hidiff_runtime.prompt_files.raw_rows import Columns, Raw

pytestmark = pytest.mark.alone

COLUMNS = Columns(("id", "prompt", "seed", "negative_prompt"))


def rows(name: str, content: str | bytes) -> list[Raw]:
    return read_rows(name, content if isinstance(content, bytes) else content.encode(), COLUMNS)


def values(name: str, content: str | bytes) -> list[Any]:
    """What each row says; of one that is refused, why."""
    found = [raw.values for raw in rows(name, content)]
    return [value.summary if isinstance(value, InputError) else dict(value) for value in found]


def refusal(name: str, content: str | bytes) -> str:
    """All that is said of a file that is refused."""
    with pytest.raises(InputError) as caught:
        rows(name, content)
    assert name in str(caught.value)
    return str(caught.value)


def cases(table: Mapping[str, Any], ending: Callable[[str], str]) -> list[Any]:
    """The names of a table's cases, those of YAML where its library is."""
    return [
        pytest.param(case, marks=pytest.mark.needs("yaml") if ending(case).endswith(("yaml", "yml")) else ())
        for case in table
    ]


BOTH = [{"prompt": "a boat, at sea"}, {"prompt": 'a "tree"', "seed": 3}]
SAME = {
    "txt": 'a boat, at sea\n{"prompt": "a \\"tree\\"", "seed": 3}\n',
    "jsonl": '"a boat, at sea"\n{"prompt": "a \\"tree\\"", "seed": 3}\n',
    "ndjson": '{"prompt": "a boat, at sea"}\n{"prompt": "a \\"tree\\"", "seed": 3}\n',
    "json": '["a boat, at sea",\n {"prompt": "a \\"tree\\"", "seed": 3}]\n',
    "yaml": '- a boat, at sea\n- prompt: a "tree"\n  seed: 3\n',
    "yml": "prompts:\n- a boat, at sea\n- {prompt: 'a \"tree\"', seed: 3}\n",
    "csv": 'prompt,seed\n"a boat, at sea",\n"a ""tree""",3\n',
    "tsv": 'prompt\tseed\na boat, at sea\t\n"a ""tree"""\t3\n',
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", cases(SAME, str))
def test_every_ending_says_the_same(ending: str, end: str, marked: bool) -> None:
    text = SAME[ending].replace("\n", end)
    found = values(f"a/b.c/p.{ending.upper()}", text.encode("utf-8-sig" if marked else "utf-8"))
    kept = [{name: value for name, value in row.items() if value != ""} for row in found]
    due = [BOTH[0], {**BOTH[1], "seed": "3"}] if ending in ("csv", "tsv") else BOTH
    assert kept == due
    assert [raw.text for raw in rows(f"p.{ending}", text)] == [ending in ("csv", "tsv")] * 2


def test_all_endings_are_tried_here() -> None:
    assert {f".{ending}" for ending in SAME} | {".parquet"} == set(ENDINGS)


@pytest.mark.parametrize("name", ["prompts", "a.prompts", "a.txt.gz", "a.csv/prompts", ".", "-", "txt", "s3://b/k"])
def test_any_other_ending_is_refused_with_the_list(name: str) -> None:
    said = refusal(name, "a boat\n")
    assert "Expected one of .txt, .jsonl, .ndjson, .json, .csv, .tsv, .yaml, .yml, .parquet" in said


LIES = {
    "an array": ("p.txt", '[\n  {"prompt": "a"}\n]\n', "a JSON document", "p.json"),
    "an array on one line": ("p.txt", '[{"prompt": "a"}, {"prompt": "b"}]', "a JSON document", "p.json"),
    "an array of texts": ("p.txt", '["a", "b"]', "a JSON document", "p.json"),
    "an array that is cut off": ("p.txt", '[\n  {"prompt": "a"},\n', "a JSON document", "p.json"),
    "an object": ("p.txt", '{"prompts": [\n"a"]}', "a JSON document", "p.json"),
    "an object over lines": ("p.txt", '\n{\n  "prompt": "a"\n}\n', "a JSON document", "p.json"),
    "a header": ("p.txt", "prompt,seed\na boat,3\n", "a table", "p.csv"),
    "a header with quotes": ("p.txt", '"seed", "prompt"\n3,"a boat"\n', "a table", "p.csv"),
    "a header of others": ("p.txt", "prompt,author\na boat,me\n", "a table", "p.csv"),
    "a header with semicolons": ("p.txt", "prompt;steps\na boat;3\n", "a table", "p.csv"),
    "a header with tabs": ("p.txt", "id\tprompt\nx\ta boat\n", "a table with tabs", "p.tsv"),
    "a header alone in its row": ("p.txt", "prompt\na boat\n", "a table", "p.csv"),
    "a list": ("p.txt", "- a boat\n- a tree\n", "YAML", "p.yaml"),
    "mappings": ("p.txt", "- prompt: a boat\n", "YAML", "p.yaml"),
    "a mapping": ("p.txt", "prompts:\n  - a boat\n", "YAML", "p.yaml"),
    "an array of lines": ("p.jsonl", '[\n"a"\n]\n', "a JSON document", "p.json"),
    "an array as lines": ("a.b/p.q.jsonl", '[{"prompt": "a"}]', "a JSON document", "Call it p.q.json"),
    "an array as a table": ("p.csv", '[{"prompt": "a"}]', "a JSON document", "p.json"),
    "lines as a document": ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "JSON a line each", "Call the file .jsonl"),
    "a table of semicolons": ("p.csv", "prompt;seed\na;3\n", "divided by semicolons", "expected are commas"),
    "a table of tabs": ("p.csv", "prompt\tseed\na\t3\n", "divided by tabs", "as .tsv"),
    "a table of commas": ("p.tsv", "prompt,seed\na,3\n", "divided by commas", "expected are tabs"),
    "Parquet": ("p.txt", b"PAR1\x15\x04", "a Parquet file", ".parquet"),
    "UTF-16": ("p.txt", "a boat\n".encode("utf-16"), "is UTF-16", "Save it as UTF-8"),
    "UTF-16 without its mark": ("p.csv", "prompt\na boat\n".encode("utf-16-le"), "is UTF-16", "Save it as UTF-8"),
    "UTF-16 of the other order": ("p.json", '["a boat"]'.encode("utf-16-be"), "is UTF-16", "Save it as UTF-8"),
    "UTF-32": ("p.txt", "a boat\n".encode("utf-32"), "is UTF-32", "Save it as UTF-8"),
    "Latin-1": ("p.txt", "a boat\na café\n".encode("latin-1"), "not UTF-8", "p.txt, line 2: byte 0xE9"),
    "comments alone": ("p.txt", "# mine\n\n#\n  # more\n", "no prompts in the file", "p.txt"),
    "nothing": ("p.jsonl", b"", "no prompts in the file", "p.jsonl"),
    "a mark alone": ("p.txt", b"\xef\xbb\xbf", "no prompts in the file", "p.txt"),
    "an empty list": ("p.json", "[]", "no prompts in the file", "p.json"),
    "an empty YAML": ("p.yaml", "# none\n", "no prompts in the file", "p.yaml"),
    "no list": ("p.json", '{"a": 1, "b": ["x"]}', "no list of prompts", "p.json: an object"),
    "a text of YAML": ("p.yaml", "a boat\n", "no list of prompts", "p.yaml: text"),
    "a name twice in all": ("p.json", '{"prompt": "a", "prompt": "b"}', "one name twice", "'prompt'"),
    "a name twice in YAML": ("p.yaml", "- prompt: a\n  prompt: b\n", "'prompt' is there twice", "line 2"),
    "no JSON": ("p.json", '["a",]', "not JSON", "line 1 column"),
    "depth": ("p.json", "[" * 100_000, "not JSON", "recursion"),
    "depth of YAML": ("p.yaml", "[" * 1500, "not YAML", "recursion"),
    "an object of Python": ("p.yaml", "- !!python/object/apply:time.sleep [9]\n", "not YAML", "could not determine"),
    "two colons": ("p.yaml", "- prompt: a boat: at sea\n", "not YAML", "colon"),
    "a quote that never ends": (
        "p.csv",
        'prompt,seed\na,3\n"b,4\nc,5\n',
        "line 3: a quote opens",
        "a quote in it twice",
    ),
    "a quote in the middle": ("p.csv", 'prompt,seed\n"a" boat,3\n', "line 2: ','", "a quote in it twice"),
    "no prompt": ("p.csv", "seed\n3\n", "one column called prompt", "p.csv: seed"),
    "a column twice": ("p.csv", "prompt,prompt\na,b\n", "no column twice", "p.csv"),
    "a column that is no field": ("p.csv", "prompt,sead\na,3\n", "no fields", "p.csv: sead"),
}


@pytest.mark.parametrize("case", cases(LIES, lambda case: LIES[case][0]))
def test_a_file_that_is_not_what_its_ending_says_is_refused_by_what_it_is(case: str) -> None:
    name, content, told, advice = LIES[case]
    said = refusal(name, content)
    assert told in said
    assert advice in said


HONEST = [
    "[red|blue] boat",
    "[a boat:a tree:0.5], at sea",
    "(a boat:1.2)",
    "a boat -- at sea",
    "a boat — at sea, --",
    "#cyberpunk city",
    "prompt, a boat with a sail",
    "- a boat",
    'a "boat", 5" long',
    "prompt",
    "Steps: of a stair, in fog",
    "a--seed--pod",
    "one\u2028two\x0bthree",
]


@pytest.mark.parametrize("line", HONEST)
def test_an_honest_prompt_is_not_taken_for_something_else(line: str) -> None:
    assert values("p.txt", f"{line}\n") == [{"prompt": line}]
    assert values("p.jsonl", json.dumps(line)) == [{"prompt": line}]


@pytest.mark.parametrize("line", ["seed: of a flower", '["a"]', "{red|blue} boat", "a boat --seed 5"])
def test_what_is_taken_for_something_else_can_be_said_in_json(line: str) -> None:
    try:
        (found,) = values("p.txt", line)
    except InputError as error:
        found = error.advice
    assert found != {"prompt": line}
    assert values("p.txt", json.dumps({"prompt": line})) == [{"prompt": line}]


def test_comments_and_blank_lines_are_passed_over_and_lines_counted() -> None:
    found = rows("p.txt", "# mine\r\n\r\n  a boat \r# more\na tree")
    assert [(raw.number, raw.where, raw.values) for raw in found] == [
        (0, "line 3", {"prompt": "a boat"}),
        (1, "line 5", {"prompt": "a tree"}),
    ]


ROWS = {
    "text": ("a boat", "The line is not JSON."),
    "a prompt in braces": ("{red|blue}", "The line is not JSON."),
    "NaN": ('{"prompt": "a", "seed": NaN}', "A value is no JSON."),
    "infinity": ('{"prompt": "a", "seed": -Infinity}', "A value is no JSON."),
    "a name twice": ('{"prompt": "a", "seed": 1, "seed": 2}', "An object has one name twice."),
    "a number without end": ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "A whole number is too long."),
    "a number": ("3", "A row must be text, or an object with a prompt."),
    "a list": ("[1]", "A row must be text, or an object with a prompt."),
    "null": ("null", "A row must be text, or an object with a prompt."),
    "depth": ("[" * 100_000, "The line is not JSON."),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_line_that_is_no_row_stops_no_other(case: str) -> None:
    line, reason = ROWS[case]
    assert values("p.jsonl", f'"first"\n{line}\n"last"\n') == [{"prompt": "first"}, reason, {"prompt": "last"}]


def test_a_document_has_faults_of_single_rows_too() -> None:
    assert values("p.json", '["a", {"prompt": "b", "seed": NaN}, 3, null]') == [
        {"prompt": "a"},
        "A value is no JSON.",
        *["A row must be text, or an object with a prompt."] * 2,
    ]
    assert [raw.where for raw in rows("p.json", '["a", "b"]')] == ["item 1", "item 2"]
    assert values("p.json", '{"prompt": "a", "seed": 3}') == [{"prompt": "a", "seed": 3}]
    assert values("p.json", '{"prompt": ["a", "b"]}') == [{"prompt": ["a", "b"]}]
    assert values("p.json", '{"any": ["a"]}') == [{"prompt": "a"}]


@pytest.mark.needs("yaml")
def test_plain_words_of_yaml_are_text_but_for_those_of_json() -> None:
    words = ["no", "on", "1:30", "012", "2024-01-01", "1_000", "0x10"]
    assert values("p.yaml", "".join(f"- {{prompt: {word}}}\n" for word in words)) == [{"prompt": w} for w in words]
    assert values("p.yaml", "- {a: 12, prompt: -0.5, c: 1e3, d: true, e: null, f: ~, g: +7}") == [
        {"a": 12, "prompt": -0.5, "c": 1000.0, "d": True, "e": None, "f": None, "g": 7}
    ]
    assert values("p.yaml", "- &all {prompt: a, seed: 3}\n- {<<: *all, prompt: b}\n") == [
        {"prompt": "a", "seed": 3},
        {"prompt": "b", "seed": 3},
    ]


@pytest.mark.needs("yaml")
def test_yaml_that_reads_text_as_a_mapping_says_so() -> None:
    (found,) = rows("p.yaml", "- a boat: at sea\n")
    assert isinstance(found.values, InputError)
    assert "a mapping without a prompt" in found.values.summary
    assert '- "a boat: at sea"' in found.values.advice
    (found,) = rows("p.yaml", "- 3: at sea\n")
    assert isinstance(found.values, InputError)
    assert "name must be text" in found.values.summary


@pytest.mark.needs("yaml")
def test_pairs_that_json_writes_as_halves_are_joined_in_yaml_and_single_halves_stay() -> None:
    text = json.dumps(["\U0001f600", "\ud800", "\udc00\ud800"])
    assert values("p.json", text) == values("p.yaml", text)
    assert values("p.yaml", text)[0] == {"prompt": "\U0001f600"}


def test_csv_rows_stand_where_they_begin() -> None:
    found = rows("p.csv", ' prompt , seed\n\n"a\nb",3\n\nc\nd,4\n')
    assert [raw.where for raw in found] == ["line 3", "line 6", "line 7"]
    assert found[0].values == {"prompt": "a\nb", "seed": "3"}
    assert isinstance(found[1].values, InputError)
    assert found[1].values.given == "1 values, 2 columns"
    assert found[2].values == {"prompt": "d", "seed": "4"}


@pytest.mark.needs("pyarrow")
def test_a_text_of_parquet_that_is_not_utf8_is_its_rows_fault(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array([b"a", b"\xff", b"b"]).cast(pyarrow.binary())
    data = pyarrow.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    seeds = pyarrow.array([3.0, None, float("nan")])
    parquet.write_table(pyarrow.table({"prompt": data, "seed": seeds}), tmp_path / "p.parquet")
    assert values("p.parquet", (tmp_path / "p.parquet").read_bytes()) == [
        {"prompt": "a", "seed": 3.0},
        "The row has a value that cannot be read.",
        {"prompt": "b", "seed": None},
    ]
    assert "no Parquet file" in refusal("p.parquet", b"PAR1 and more")


@pytest.mark.parametrize(
    ("ending", "module", "told"),
    [("yaml", "yaml", "pip install pyyaml"), ("parquet", "pyarrow", "pip install 'hidiff-runtime[bulk]'")],
)
def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, ending: str, module: str, told: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError) as caught:
        rows(f"p.{ending}", "- a boat\n")
    assert told in caught.value.advice
    assert "not installed" in caught.value.summary


def test_generate_takes_what_bulk_takes_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,seed,crops,image,eta,resize\na,3.0,"4, 5",b.png,.5,TRUE\nb,,,,,\n')
    first, second = read_prompts(tmp_path / "p.csv")
    assert first.settings == {"seed": 3, "crops": [4, 5], "image": tmp_path / "b.png", "eta": 0.5, "resize": True}
    assert (second.settings, second.where) == ({}, "line 3")
    (tmp_path / "p.json").write_text('[{"prompt": ["a", "b"], "negative_prompt": ["c", "d"], "crops": [1, 2]}]')
    (found,) = read_prompts(tmp_path / "p.json")
    assert found.text == ("a", "b")
    assert found.settings == {"negative_prompt": ("c", "d"), "crops": [1, 2]}


OWN = {
    "half a pair": ({"prompt": "a \ud800 boat"}, "line 2: U+D800 at position 3 of 'a \\ud800 boat'"),
    "half a pair in a list": ({"prompt": ["a", "\udfff"]}, "line 2: U+DFFF at position 1"),
    "half a pair in a sampler": ({"prompt": "x", "sampler": "\ud800"}, "A sampler has a half of a surrogate pair"),
    "half a pair in a path": ({"prompt": "x", "image": "\ud800.png"}, "A path (image) has a half"),
    "NUL in a path": ({"prompt": "x", "mask": "a\x00.png"}, "A path (mask) has a control character"),
    "a control character": ({"prompt": "a\x1bb"}, "line 2: U+001B at position 2"),
    "a name with one": ({"prompt": "x", "\x1b": 1}, "given: {path}, line 2: \\x1b"),
    "true": ({"prompt": "x", "seed": True}, "seed must be a whole number"),
    "a rounded seed": ({"prompt": "x", "seed": 1e19}, "lost its last digits"),
    "beyond floats": ({"prompt": "x", "eta": 10**39}, ""),
    "bytes": ({"prompt": "x", "image": "data:;base64,AA=="}, "must be the path of a file"),
    "an id": ({"prompt": "x", "id": "a"}, "hidiff-run bulk has ids"),
    "one size": ({"prompt": "x", "crops": [1]}, "crops must be top and left, two whole numbers"),
    "a text as a size": ({"prompt": "x", "target_size": "1024"}, "height and width, two whole numbers"),
    "a negative size": ({"prompt": "x", "crops": [-1, 0]}, "two whole numbers"),
    "no prompt": ({"seed": 3}, "The prompt is missing"),
    "a prompt of null": ({"prompt": None}, "The prompt is missing"),
}


@pytest.mark.parametrize("case", OWN)
def test_generate_names_the_row_and_what_is_wrong_with_it(tmp_path: Path, case: str) -> None:
    row, told = OWN[case]
    path = tmp_path / "p.jsonl"
    path.write_text(f'"first"\n{json.dumps(row)}\n')
    if not told:
        assert len(read_prompts(path)) == 2
        return
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert told.replace("{path}", str(path)) in str(caught.value)
    assert f"{path}, line 2" in str(caught.value)
    str(caught.value).encode()


def test_a_number_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "eta": 1e999}')
    with pytest.raises(InputError, match="eta must be a number"):
        read_prompts(path)


@pytest.mark.needs("yaml")
def test_a_whole_number_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"- {{prompt: x, eta: {'1' * 400}}}")
    with pytest.raises(InputError, match="eta must be a number"):
        read_prompts(path)
