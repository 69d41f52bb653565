"""A new field is one line of the table: Python, commands, prompts' files, servers and bulk jobs all have it then."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hidiff_runtime

END = "    # fmt: on\n"
LINE = '    warmth: float = _setting(0.5, "number", "how warm the colors are (default: 0.5)", bounds=(0, 2))\n'

PROGRAM = """
import contextlib, importlib.util, io, json
from pathlib import Path

import toy_pictures
from hidiff_runtime import InputError, Pipeline, Settings
from hidiff_runtime.bulk.rows import find_rows
from hidiff_runtime.cli import main
from hidiff_runtime.cli.prompt_options import read_prompts
from hidiff_runtime.pipeline.request_values import Limits, read_request
from hidiff_runtime.prompt_files.raw_rows import Raw
from hidiff_runtime.serving.triton.schema import INPUTS

def attempt(work):
    try:
        return work()
    except InputError as error:
        return error.summary

def help_of(command):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return text.getvalue()

found = {"python": Settings.__doc__, "generate": help_of("generate"), "bulk": help_of("bulk")}
Path("prompts.csv").write_text("prompt,warmth\\na lighthouse,1.5\\n")
found["file"] = attempt(lambda: read_prompts(Path("prompts.csv"))[0].settings)
rows, refused = find_rows([Raw(0, "line 1", {"prompt": "a", "warmth": "1.5"}, text=True)], seed=0, defaults={})
found["row"] = rows[0].values["warmth"] if rows else refused[0].reason
found["triton"] = [[tensor.datatype, tensor.optional] for tensor in INPUTS if tensor.name == "warmth"]
with Pipeline.open(toy_pictures.make(Path("bundle")), backend=toy_pictures.Backend()) as pipe:
    found["run"] = [
        attempt(lambda: read_request(pipe, {"prompt": "a", "warmth": value}, Limits()).settings.warmth)
        for value in (1.5, "hot")
    ]
if importlib.util.find_spec("fastapi"):
    from hidiff_runtime.serving.http.edit_models import _plain
    from hidiff_runtime.serving.http.errors import ApiError
    from hidiff_runtime.serving.http.request_models import GenerationRequest

    found["schema"] = GenerationRequest.model_json_schema()["properties"].get("warmth")
    found["form"] = _plain("warmth", "1.5")
    try:
        found["body"] = GenerationRequest.model_validate({"prompt": "a", "warmth": 1.5}).given(None)
    except ApiError as error:
        found["body"] = error.body["error"]["code"]
print(json.dumps(found))
"""


def answers(folder: Path, line: str) -> dict[str, Any]:
    """What each way into a request says, of a copy of the package with a line more in its table."""
    original = Path(hidiff_runtime.__file__).parent
    shutil.copytree(original, folder / "hidiff_runtime", ignore=shutil.ignore_patterns("__pycache__"))
    table = folder / "hidiff_runtime/pipeline/request_fields.py"
    text = table.read_text("utf-8")
    assert text.count(END) == 1
    table.write_text(text.replace(END, line + END), "utf-8")
    paths = os.pathsep.join((str(folder), str(Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "500"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With the field."""
    return answers(tmp_path_factory.mktemp("with"), LINE)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without it."""
    return answers(tmp_path_factory.mktemp("without"), "")


def test_python_takes_and_explains_it(found: dict[str, Any]) -> None:
    assert "    warmth: how warm the colors are (default: 0.5)." in found["python"].splitlines()
    assert found["run"] == [1.5, "warmth must be a number."]


def test_generate_has_an_option_for_it(found: dict[str, Any]) -> None:
    words = [line.split() for line in found["generate"].splitlines()]
    assert ["--warmth", "WARMTH", "how", "warm", "the", "colors", "are", "(default:", "0.5)"] in words


def test_prompts_files_and_bulk_jobs_have_a_column_for_it(found: dict[str, Any]) -> None:
    assert found["file"] == {"warmth": 1.5}
    assert found["row"] == 1.5
    assert ", warmth" in found["bulk"]


def test_http_requests_have_it(found: dict[str, Any]) -> None:
    if "schema" not in found:
        pytest.skip("FastAPI is not installed")
    told = {"type": ["number", "null"], "description": "how warm the colors are (default: 0.5)"}
    assert found["schema"] == {**told, "minimum": 0, "maximum": 2}
    assert (found["body"], found["form"]) == ({"prompt": "a", "warmth": 1.5}, 1.5)


def test_triton_models_have_an_input_for_it(found: dict[str, Any]) -> None:
    assert found["triton"] == [["TYPE_FP64", True]]


def test_nothing_has_it_without_the_line(without: dict[str, Any]) -> None:
    assert not any("warmth" in without[name] for name in ("python", "generate", "bulk"))
    assert without["file"] == "The prompts have columns that are no fields of a request."
    assert without["row"] == "There is no such field."
    assert without["run"] == ["There is no such field."] * 2
    assert without["triton"] == []
    if "schema" in without:
        assert (without["schema"], without["form"], without["body"]) == (None, "1.5", "unknown_parameter")
