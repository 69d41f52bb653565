"""Tokens by which one process tells another that a request was cancelled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hidiff_runtime import StorageError
from hidiff_runtime.serving.triton.run_tokens import RunTokens


def test_a_token_is_seen_by_another_process_of_the_same_server(tmp_path: Path) -> None:
    tokens = RunTokens(7, tmp_path)
    one, other = tokens.new(), tokens.new()
    assert one != other
    program = (
        "import sys, pathlib; from hidiff_runtime.serving.triton.run_tokens import RunTokens; "
        "tokens = RunTokens(7, pathlib.Path(sys.argv[1])); print(*(tokens.cancelled(name) for name in sys.argv[2:]))"
    )

    def seen() -> str:
        command = [sys.executable, "-c", program, str(tmp_path), one, other]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert seen() == "False False"
    tokens.cancel(one)
    assert seen() == "True False"
    assert not RunTokens(8, tmp_path).cancelled(one)
    tokens.forget(one)
    tokens.forget(one)
    assert seen() == "False False"


@pytest.mark.parametrize("name", ["../secret", "", ".", "0" * 31, "G" * 32, "0" * 32 + "\n", 7, None])
def test_a_name_that_is_no_token_leads_nowhere(tmp_path: Path, name: str) -> None:
    assert RunTokens.valid(RunTokens.new())
    assert not RunTokens.valid(name)
    with pytest.raises(ValueError, match="no token"):
        RunTokens(7, tmp_path).cancelled(name)


def test_a_run_is_abandoned_when_its_process_ends_inside_it(tmp_path: Path) -> None:
    tokens = RunTokens(7, tmp_path)
    name = tokens.new()
    program = (
        "import sys, pathlib; from hidiff_runtime.serving.triton.run_tokens import RunTokens; "
        "tokens = RunTokens(7, pathlib.Path(sys.argv[1]))\n"
        "with tokens.running(sys.argv[2]): print(flush=True); sys.stdin.read(1)\n"
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path), name]
    for killed in (True, False):
        assert not tokens.abandoned(name)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            assert not tokens.abandoned(name)
            if not killed:
                process.stdin.write(b".")
                process.stdin.flush()
                process.stdout.readline()
            process.kill()
            process.wait()
        assert tokens.abandoned(name) == killed
        tokens.forget(name)
    tokens.close()
    assert not list(tmp_path.iterdir())


def test_the_folder_is_this_users_alone_and_goes_away_when_it_is_empty(tmp_path: Path) -> None:
    tokens = RunTokens(7, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    name = tokens.new()
    tokens.cancel(name)
    tokens.close()
    assert folder.exists()
    tokens.forget(name)
    tokens.close()
    assert not folder.exists()


def test_a_folder_that_others_can_look_into_is_refused(tmp_path: Path) -> None:
    RunTokens(7, tmp_path)
    (folder,) = tmp_path.iterdir()
    folder.chmod(0o755)
    with pytest.raises(StorageError, match="not this user's alone"):
        RunTokens(7, tmp_path)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(StorageError):
        RunTokens(7, tmp_path)


def test_the_folder_comes_back_where_another_model_took_it_away_as_it_ended(tmp_path: Path) -> None:
    stays, ends = RunTokens(7, tmp_path), RunTokens(7, tmp_path)
    one, other = stays.new(), stays.new()
    ends.close()
    assert not list(tmp_path.iterdir())
    assert not stays.cancelled(one)
    assert not stays.abandoned(one)
    stays.forget(one)
    stays.cancel(one)
    assert stays.cancelled(one)
    stays.forget(one)
    ends.close()
    with stays.running(other):
        assert not stays.abandoned(other)
    stays.close()
    assert not list(tmp_path.iterdir())
