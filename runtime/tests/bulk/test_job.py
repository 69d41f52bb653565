"""What a bulk job makes of the outcomes that workers send, and what it shows: without Ray."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import toy_pictures

from hidiff_runtime import bundle as bundle_module
from hidiff_runtime import cli
from hidiff_runtime.bulk import job as job_module
from hidiff_runtime.bulk import ray_pool as cluster_module
from hidiff_runtime.bulk.job import Job, run_job
from hidiff_runtime.bulk.job_progress import JobProgress
from hidiff_runtime.bulk.output import ImageEntry, Output
from hidiff_runtime.bulk.ray_pool import Coordinator, Pool
from hidiff_runtime.bulk.row_worker import DIED, FatalError, Outcome, Work
from hidiff_runtime.bulk.rows import DeadLetter, Row
from hidiff_runtime.bulk.storage import Location, Store
from hidiff_runtime.cli.bulk import _default_gpus
from hidiff_runtime.errors import EngineError, InputError, ParityError

pytestmark = pytest.mark.needs("pyarrow")

MADE, FAILED, ENDED, FAULT = "made", "failed", "ended", "fault"


@dataclasses.dataclass
class Scripted:
    """Workers whose outcomes are said beforehand."""

    script: Sequence[str]
    actors: int = 1

    def alive(self) -> int:
        return 1

    def outcomes(self, work: Work, rows: Sequence[Row]) -> Iterator[Outcome]:
        for kind, row in zip(self.script, rows, strict=False):
            yield outcome(kind, work, row)


def outcome(kind: str, work: Work, row: Row) -> Outcome:
    if kind == FAULT:
        return Outcome(row.number, 1, fault=FatalError.of(ParityError("It draws something else.")))
    if kind == MADE:
        content = f"a picture of {row.id}".encode()
        file = f"pictures/{row.id}.png"
        Store(work.output).write(file, content)
        facts: dict[str, Any] = {"sha256": "0" * 64, "bytes": len(content), "seed": 0, "seconds": 1.0, "parity": "p"}
        facts |= {"parameters": "{}", "fingerprint": row.fingerprint(work.bundle), "bundle": work.bundle}
        return Outcome(row.number, 2, (ImageEntry(id=row.id, row=row.number, picture=0, file=file, **facts),))
    letter = DeadLetter.of(row, InputError("No."), work.bundle)
    return Outcome(row.number, 1, letter=dataclasses.replace(letter, kind=DIED) if kind == ENDED else letter)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    bundle = toy_pictures.make(tmp_path / "bundle")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"picture {number}\n" for number in range(6)))
    pool = Pool(actors=1, gpus=0, cpus=1, address=None)
    return Job(bundle, Location(str(prompts)), Location(str(tmp_path / "out")), pool, recheck="size")


def play(monkeypatch: pytest.MonkeyPatch, *script: str) -> None:
    import contextlib

    monkeypatch.setattr(job_module, "connected", lambda _pool: contextlib.nullcontext(Scripted(script)))


def left(job: Job) -> tuple[int, list[str]]:
    """Rows that are finished, and ids of those that failed, as the next job finds them."""
    output = Output(Store(job.output))
    output.look(job_module.Manifest.read(job.folder).digest, job.settings)
    return len(output.index), [letter.id for letter in output.dead]


def test_counts_what_came_of_each_row(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, MADE, FAILED, ENDED, MADE, MADE, ENDED)
    summary = run_job(job)
    assert (summary.rows, summary.made, summary.failed, summary.interrupted) == (6, 3, 3, 3)
    assert summary.parity == ["p"]
    assert left(job) == (3, ["000001", "000002", "000005"])
    play(monkeypatch)
    again = run_job(job)
    assert (again.finished, again.made, again.failed) == (3, 0, 3)
    play(monkeypatch, MADE, MADE, MADE)
    assert run_job(dataclasses.replace(job, retry_failed=True)).done == 6


def test_a_fault_ends_the_job_and_keeps_what_is_done(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, MADE, FAILED, FAULT, MADE)
    with pytest.raises(ParityError, match="something else"):
        run_job(job)
    assert left(job) == (1, ["000001"])


def test_machines_that_end_every_worker_are_not_the_rows_fault(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, MADE, ENDED, ENDED, ENDED, MADE)
    with pytest.raises(EngineError, match="Workers end whatever row"):
        run_job(job)
    assert left(job) == (1, [])  # none is blamed


def test_rows_that_never_come_back_are_missed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, MADE, MADE)
    with pytest.raises(EngineError, match="lost rows"):
        run_job(job)
    assert left(job) == (2, [])


def test_an_interrupt_keeps_what_is_done(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Scripted):
        def outcomes(self, work: Work, rows: Sequence[Row]) -> Iterator[Outcome]:
            yield outcome(MADE, work, rows[0])
            raise KeyboardInterrupt

    import contextlib

    monkeypatch.setattr(job_module, "connected", lambda _pool: contextlib.nullcontext(Interrupted(())))
    with pytest.raises(KeyboardInterrupt):
        run_job(job)
    assert left(job) == (1, [])


def test_the_board_counts_beginnings_and_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(cluster_module.time, "monotonic", lambda: now)
    board = Coordinator()
    assert [board.begin(3), board.begin(3), board.begin(4)] == [1, 2, 1]
    board.beat("one")
    now += 2 * cluster_module.BEAT_SECONDS
    board.beat("two")
    assert board.alive() == 2
    now += 2 * cluster_module.BEAT_SECONDS
    assert board.alive() == 1


def test_the_line_tells_where_a_job_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("hidiff_runtime.bulk.job_progress.time.monotonic", lambda: now)
    shown = JobProgress(total=20, done=3, failed=1, batch=2, actors=4, alive=lambda: 3)
    assert shown.line() == "3/20 rows done, 1 failed, workers open the bundle, 3 of 4 workers alive"
    for failed in (False, True, False):
        now += 6
        shown.count(failed=failed)
    assert shown.line() == "5/20 rows done, 2 failed, 20 pictures/min, 1:18 left, 3 of 4 workers alive"


ODD = [
    {"id": "good", "prompt": "a boat\u2028at sea"},
    {"id": "half", "prompt": "a \ud800 boat"},
    {"id": "\udfff", "prompt": "x"},
    {"id": "sampler", "prompt": "x", "sampler": "\ud800"},
    {"id": "path", "prompt": "x", "image": "\ud800.png"},
    {"id": "name", "prompt": "x", "\ud800": 1},
    {"id": "lines\u2028\u0085", "prompt": "a\u2028\u0085", "steps": "\u2028"},
    {"id": "fails", "prompt": "a\u2028b"},
]


@pytest.mark.parametrize("ending", ["jsonl", "json", pytest.param("yaml", marks=pytest.mark.needs("yaml"))])
def test_text_that_cannot_be_encoded_is_its_rows_fault_now_and_at_every_rerun(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    path = Path(job.prompts.url).with_name(f"odd.{ending}")
    path.write_text("\n".join(map(json.dumps, ODD)) if ending == "jsonl" else json.dumps(ODD))
    command = ["bulk", str(job.folder), "--prompts", str(path), "-o", job.output.url, "--seed", "3"]
    play(monkeypatch, MADE, FAILED)
    real = bundle_module.open
    monkeypatch.setattr(
        bundle_module, "open", lambda folder, **options: real(folder, **{**options, "backend": toy_pictures.Backend()})
    )
    assert cli.main([*command, "--dry-run"]) == 7
    assert "line 3, id \\udfff" in capsys.readouterr().err.replace("item", "line")
    letters = Path(job.output.url) / "dead-letters.jsonl"
    for _ in range(3):
        assert cli.main(command) == 7
        out, err = capsys.readouterr()
        assert "1 of 8 rows done" in out
        assert "7 of 8 rows failed" in err
        told = [json.loads(line) for line in letters.read_bytes().split(b"\n") if line]
        assert [letter["id"] for letter in told] == [row["id"] for row in ODD[1:]]
        assert [letter["row"] for letter in told] == list(range(1, 8))
        assert told[0]["given"] == "U+D800 at position 3 of 'a \\ud800 boat'"
        assert told[0]["values"]["prompt"] == "a \ud800 boat"
    path.write_text("\n".join(map(json.dumps, ODD[:1])) if ending == "jsonl" else json.dumps(ODD[:1]))  # mended
    assert cli.main(command) == 0
    assert letters.read_bytes() == b""


def test_options_that_cannot_be_encoded_are_refused(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bulk", str(job.folder), "--prompts", job.prompts.url, "-o"]
    assert cli.main([*command, job.output.url, "--set", "sampler=\udcff"]) == 2
    assert "A sampler has a half of a surrogate pair" in capsys.readouterr().err
    assert cli.main([*command, f"{job.output.url}\udcff"]) == 2
    assert "bytes that are no text" in capsys.readouterr().err


def test_gpus_are_for_engines_that_need_them(job: Job) -> None:
    options = argparse.Namespace(folder=job.folder, backend="tensorrt-rtx", allow_links=[])
    assert _default_gpus(options) == 1
    options.backend = None
    assert _default_gpus(options) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "sead=3"], 2, "no such field"),
        (["--set", "steps=many"], 2, "steps must be a whole number"),
        (["--set", "prompt=x"], 2, "--set takes NAME=VALUE"),
        (["--s3-endpoint", "nowhere", "--prompts", "s3://bucket/x.csv"], 2, "endpoint must be a URL"),
        (["--prompts", "gs://bucket/x.csv"], 2, "Only s3://"),
        (["--prompts", "none.csv"], 2, "cannot be read"),
        (["--option", "resident=all"], 2, "no option of a backend"),
        (["--option", "memory_limit=1"], 2, "Use --memory-limit"),
        (["--ray", "ray://head:10001"], 2, "--ray auto"),
    ],
)
def test_bad_options_write_nothing(
    job: Job, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    command = ["bulk", str(job.folder), "--prompts", job.prompts.url, "-o", job.output.url, *arguments]
    assert cli.main(command) == code
    assert message in capsys.readouterr().err
    assert not Path(job.output.url).exists()


@pytest.mark.parametrize("library", ["ray", "pyarrow"])
def test_without_a_library_the_command_that_installs_it_is_named(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert cli.main(["bulk", str(job.folder), "--prompts", job.prompts.url, "-o", job.output.url]) == 5
    assert "pip install 'hidiff-runtime[bulk]'" in capsys.readouterr().err


def test_a_dry_run_tells_what_it_found(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = bundle_module.open

    def opened(folder: Path, *, backend: str | None, **options: Any) -> Any:
        assert backend is None
        return real(folder, backend=toy_pictures.Backend(), **options)

    monkeypatch.setattr(bundle_module, "open", opened)
    Path(job.prompts.url).write_text('a boat\n{"prompt": "x", "steps": 99}\n')
    command = ["bulk", str(job.folder), "--prompts", job.prompts.url, "-o", job.output.url, "--dry-run"]
    assert cli.main(command) == 7
    out, err = capsys.readouterr()
    first = (
        "line 1, id 000000:\nprompt    'a boat', 5 tokens\n"
        "  run     64x48, seed 1397146690, 12 steps of plain, guidance 7.5\n"
    )
    assert out.startswith(first)
    assert out.endswith("would make 1 rows, 0 are finished, 1 would fail; nothing was run\n")
    assert "line 2, id 000001" in err
    assert cli.main([*command, "--json"]) == 7
    told = json.loads(capsys.readouterr().out)
    assert [(row["id"], row["where"], row["seed"], row["sampler"]) for row in told["first"]] == [
        ("000000", "line 1", 1397146690, "plain")
    ]
    assert told["first"][0]["prompts"] == [{"text": "a boat", "tokens": 5, "cut": ""}]
    Path(job.prompts.url).write_text("a boat\n" * 7)
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("prompt    'a boat'") == 5
    assert "and 2 more rows\nwould make 7 rows" in out
    assert not Path(job.output.url).exists()
