"""The liveness probe, as a container runs it, against a page of metrics that is really served."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hidiff_runtime.serving.probe import beats, main, probe_result

PAGE = """# HELP hidiff_heartbeat_seconds Unix time at which this process last said that it lives.
# TYPE hidiff_heartbeat_seconds gauge
{beats}
# TYPE hidiff_parity_info gauge
hidiff_parity_info{{bundle="0",parity="1",backend="toy"}} 1
# TYPE nv_inference_count counter
nv_inference_count{{model="hidiff",version="1"}} 3
"""


def page(*lines: str) -> str:
    return PAGE.format(beats="\n".join(lines))


@contextmanager
def served(body: str, status: int = 200) -> Iterator[str]:
    """The address under which a server on loopback gives ``body``."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_arguments: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_command_reads_a_served_page() -> None:
    command = [sys.executable, "-m", "hidiff_runtime.serving.probe"]
    with served(
        page(f"hidiff_heartbeat_seconds {time.time() + 600}")
    ) as url:  # how long the command takes is not the matter
        young = subprocess.run([*command, url, "--older-than", "30"], capture_output=True, text=True)
    with served(page(f"hidiff_heartbeat_seconds {time.time() - 3600}")) as url:
        old = subprocess.run([*command, url, "--older-than", "30"], capture_output=True, text=True)
    assert (young.returncode, young.stderr, old.returncode, old.stderr) == (0, "", 1, "")
    assert young.stdout.startswith("alive: ")
    assert re.match(r"not alive: hidiff_heartbeat_seconds is 3[67]\d\d s old, more than 30 s", old.stdout)


def test_one_dead_model_is_not_hidden_by_another() -> None:
    labelled = 'hidiff_heartbeat_seconds{model="hidiff_stream",instance="0_1"}'
    young, old = f"{labelled} 990.5", labelled.replace("0_1", "0_0") + " 100"
    assert probe_result(page(young), 1000, 30) == (0, "alive: the oldest of 1 heartbeats is 10 s old")
    code, line = probe_result(page(young, old), 1000, 30)
    assert code == 1
    assert '"0_0"} is 900 s old' in line


def test_values_as_servers_write_them() -> None:
    text = page("hidiff_heartbeat_seconds 1.7643e+09", 'hidiff_heartbeat_seconds{a="b c} d"} 2 1764331234000')
    assert beats(text) == {"": 1.7643e9, '{a="b c} d"}': 2.0}


def test_no_heartbeat_is_not_alive() -> None:
    other = page(
        "hidiff_heartbeat_seconds_created 5", "some_hidiff_heartbeat_seconds 5", "# hidiff_heartbeat_seconds 5"
    )
    code, line = probe_result(other, 1000, 30)
    assert code == 1
    assert "there is no hidiff_heartbeat_seconds" in line


def test_a_heartbeat_before_the_proof_is_not_alive() -> None:
    text = page("hidiff_heartbeat_seconds 995")
    assert probe_result(text, 1000, 30)[0] == 0
    code, line = probe_result(text.replace("\nhidiff_parity_info{", "\n# hidiff_parity_info{"), 1000, 30)
    assert code == 1
    assert "still being opened and proven" in line


@pytest.mark.parametrize("value", ["NaN", "-Inf", "nonsense"])
def test_values_that_are_no_time_are_not_alive(value: str) -> None:
    code, line = probe_result(
        page("hidiff_heartbeat_seconds 995", f'hidiff_heartbeat_seconds{{a="b"}} {value}'), 1000, 30
    )
    assert (code, line.split(":")[0]) == (1, "not alive")


def test_a_clock_that_was_set_back_is_no_death() -> None:
    assert probe_result(page("hidiff_heartbeat_seconds 1003"), 1000, 30)[0] == 0


def test_a_label_that_the_terminal_cannot_show_is_no_death() -> None:
    text = page(f'hidiff_heartbeat_seconds{{model="\u00e9"}} {time.time() - 3600}')
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with served(text) as url:
        command = [sys.executable, "-m", "hidiff_runtime.serving.probe", url, "--older-than", "1e9"]
        alive = subprocess.run(command, capture_output=True, text=True, env=environment)
        command[-1] = "30"
        dead = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (alive.returncode, alive.stderr) == (0, "")
    assert (dead.returncode, dead.stderr) == (1, "")
    assert '{model="\\xe9"}' in dead.stdout


@pytest.mark.parametrize("status", [404, 503])
def test_an_error_of_the_server_is_not_alive(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with served(page("hidiff_heartbeat_seconds 1e12"), status) as url:
        assert main([url]) == 1
    assert "does not answer" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/metrics", "nonsense"])
def test_no_server_is_not_alive(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([url]) == 1
    assert capsys.readouterr().out.startswith(f"not alive: {url} does not answer")
