"""``hidiff-serve``: its options, its errors and its exit codes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import linked
import pytest
import toy

from hidiff_runtime.cli import serve as command
from hidiff_runtime.cli.serve import _keys, listen, main

PROGRAM = "import sys; from hidiff_runtime.cli.serve import main; sys.exit(main())"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_help_has_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "hidiff-serve bundle --host 0.0.0.0 --api-key-file keys.txt" in shown
    assert "exit codes:" in shown


def test_help_loads_no_server() -> None:
    code = "import sys\nfrom hidiff_runtime.cli.serve import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    report = "print(sorted({'fastapi', 'uvicorn', 'numpy', 'prometheus_client'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


REFUSED = {
    "an unknown limit": (["--limit", "colour=3"], "no such limit"),
    "a limit of nothing": (["--limit", "steps=0"], "positive whole number"),
    "a limit that is text": (["--limit", "steps=many"], "positive whole number"),
    "an address that is another's": (["--host", "192.0.2.1"], "cannot listen there"),
    "no file of keys": (["--api-key-file", "nothing.txt"], "keys cannot be read"),
    "more connections than files": (["--connections", "100000000"], "may open too few files for so many connections"),
    "memory for no body": (["--body-memory", "1000"], "memory for all bodies is less than one may take"),
    "an option of the bundle's": (["--port", "0", "--option", "backend=toy"], "no option of a backend"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, told = REFUSED[name]
    assert main([str(tmp_path), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_says_how_many_connections_there_may_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_open_files", lambda: 100)
    assert main([str(tmp_path), "--connections", "69"]) == 2
    shown = capsys.readouterr().err
    assert "69 connections, 100 files (ulimit -n)" in shown
    assert "give --connections 68 or fewer" in shown
    assert main([str(tmp_path), "--connections", "68", "--host", "192.0.2.1"]) == 2
    assert "cannot listen there" in capsys.readouterr().err


@pytest.mark.parametrize(("files", "most"), [(64, 32), (256, 128), (1024, 512), (20000, 512)])
def test_half_of_the_files_are_left_to_the_bundle(files: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_open_files", lambda: files)
    options = command._parser().parse_args(["bundle"])
    assert command._connection_limits(options).most == most


def test_says_how_much_memory_a_body_may_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--body-memory", "1000"]) == 2
    assert "a body of up to 68157440 bytes" in capsys.readouterr().err


def test_links_out_of_the_bundle_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    folder = linked.elsewhere(toy.make(tmp_path / "made"), tmp_path)
    done = run(folder, "--port", "0")
    assert done.returncode == 4
    assert f"--allow-links {tmp_path / 'store'}" in done.stderr
    done = run(folder, "--port", "0", "--allow-links", tmp_path / "store")
    assert "no engines that this hidiff-runtime knows" in done.stderr


def test_refuses_a_file_without_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("\n \n")
    assert main([str(tmp_path), "--api-key-file", str(keys)]) == 2
    assert "no key" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["a\u2028b\n\nc\u0085d\n", "\ufeffa\u2028b\r\nc\u0085d\r\n"])
def test_keys_end_where_their_lines_do(tmp_path: Path, content: str) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_bytes(content.encode())
    assert _keys(keys) == ["a\u2028b", "c\u0085d"]


def test_an_error_has_nothing_that_terminals_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--limit", "\x1b[2Jsteps\udcff=3"]) == 2
    shown = capsys.readouterr().err
    assert "given: \\x1b[2Jsteps\\udcff" in shown
    assert "\n  next:  There are" in shown


def test_refuses_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen there" in capsys.readouterr().err


def test_answers_are_sent_without_waiting_for_the_client() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_numbers_are_positive_and_whole(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = ("--timeout", "--grace", "--head-timeout", "--body-timeout", "--idle-timeout", "--send-timeout")
    for option in ("--queue", "--connections", "--body-memory", *seconds):
        with pytest.raises(SystemExit, match="2"):
            main(["bundle", option, value])
        assert "not a positive whole number" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["65536", "-1", "http"])
def test_a_port_is_one(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bundle", "--port", value])
    assert "not a port" in capsys.readouterr().err


def test_ends_with_the_exit_code_of_a_bundle_that_does_not_open(tmp_path: Path) -> None:
    done = run(tmp_path, "--port", "0")
    assert done.returncode == 4
    assert done.stdout.startswith("listening on http://127.0.0.1:")
    assert "not a finished bundle" in done.stderr
    assert "warning" not in done.stderr


def test_warns_where_everyone_may_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("secret\n")
    unheard = [str(tmp_path), "--host", "192.0.2.1"]  # so that it ends at once
    main(unheard)
    assert "warning: without --api-key-file" in capsys.readouterr().err
    main([*unheard, "--api-key-file", str(keys)])
    shown = capsys.readouterr().err
    assert "warning" not in shown
    assert "secret" not in shown
