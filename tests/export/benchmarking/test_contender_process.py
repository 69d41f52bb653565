"""Contenders' processes: what they answer, how they fail, and interpreters that have nothing of this project's."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hidiff_export.benchmarking.contender_process import Competitor, ContenderFailed, contender_process

FAKE = """
import os, signal, sys, threading
class StableDiffusion:
    def __init__(self, **options):
        print("a library speaks", options["wtype"])
        assert sorted(os.listdir(options["model_path"])) == ["text_encoder", "unet"]
        text = open(options["model_path"] + "/text_encoder/model.safetensors", "rb").read()
        assert b'"text_model.encoder.weight"' in text and text.endswith(b"data")
    def generate_image(self, prompt, *, progress_callback, width, cfg_scale, **options):
        assert (width, cfg_scale) == (64, 7.0)
        progress_callback(3, 7, 0.0)
        for step in range(2):
            progress_callback(step, 1000, 0.0)
        {end}
"""
"""stable_diffusion_cpp as far as it is used: it tells of what it loads, takes a step, and comes to an end."""


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """A UNet's weights and a text encoder's, of no content."""
    header = b'{"encoder.weight":{}}'
    for name in ("unet", "text_encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"data")
    return tmp_path / "unet/weights.safetensors"


def fake(stores: Path, end: str, python: str = sys.executable) -> Competitor:
    """A contender over a fake of stable-diffusion.cpp, in an interpreter that finds it."""
    folder = stores.parents[1] / "library"
    folder.mkdir()
    (folder / "stable_diffusion_cpp.py").write_text(FAKE.replace("{end}", end))
    wrapper = folder / "python"
    numpy = Path(np.__file__).parents[1]
    path = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(numpy)!r}]"
    (folder / "sitecustomize.py").write_text("")
    wrapper.write_text(f'#!/bin/sh\nshift\nshift\ncode="$1"\nshift\nexec {python} -c "{path}\n$code" "$@"\n')
    wrapper.chmod(0o755)
    settings = {
        **{"store": str(stores), "precision": "float32", "threads": 1, "guidance": True},
        "shapes": {"latents": [2, 4, 8, 8]},
    }
    return Competitor("fake", "stable-diffusion.cpp", "", "float32", False, settings, str(wrapper))


def start(process: Any, one: Competitor) -> dict[str, Any]:
    answer: dict[str, Any] = process.ask(kind=one.kind, settings=dict(one.settings))
    return answer


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    np.savez(tmp_path / "inputs.npz", latents=np.zeros(3))
    return {"do": "evaluate", "inputs": str(tmp_path / "inputs.npz"), "output": str(tmp_path / "output.npy")}


def test_another_interpreter_takes_the_steps_of_a_picture(stores: Path, inputs: dict[str, Any]) -> None:
    one = fake(stores, "raise KeyError('all steps are done')")
    with contender_process(one, {}) as process:
        assert start(process, one)["seconds"] >= 0
        assert process.ask(do="open", phase="strided")["event"] == "done"
        answer = process.ask(**inputs)
        assert {"seconds", "processor"} <= answer.keys()
        assert process.memory > 1 << 20
        with pytest.raises(ContenderFailed, match="RuntimeError: it drew no picture: 'all steps are done'"):
            process.ask(**inputs)
        with pytest.raises(ContenderFailed, match="profiles no operators"):
            process.ask(do="operators", inputs=inputs["inputs"])
    assert not Path(inputs["output"]).exists()


def test_a_contender_that_is_killed_says_so(stores: Path, inputs: dict[str, Any]) -> None:
    one = fake(stores, "os.kill(os.getpid(), signal.SIGKILL)")
    with contender_process(one, {}) as process:
        start(process, one)
        process.ask(**inputs)
        with pytest.raises(
            ContenderFailed, match=r"it was killed, as systems do when memory is short: .*a library speaks"
        ):
            process.ask(**inputs)


def test_a_contender_that_ends_says_its_last_words(stores: Path, inputs: dict[str, Any]) -> None:
    one = fake(stores, "print('goodbye', flush=True); os._exit(5)")
    with contender_process(one, {}) as process:
        start(process, one)
        process.ask(**inputs)
        with pytest.raises(ContenderFailed, match=r"it ended with code 5: .*goodbye"):
            process.ask(**inputs)


def test_a_missing_library_is_a_failure(tmp_path: Path) -> None:
    one = Competitor("none", "stable-diffusion.cpp", "", "float32", False, {"store": str(tmp_path / "unet/weights")})
    with contender_process(one, {}) as process, pytest.raises(ContenderFailed, match="ModuleNotFoundError"):
        start(process, one)


def descendants() -> set[psutil.Process]:
    """This process's, among which are what other tests started and keep."""
    return set(psutil.Process().children(recursive=True))


def test_whatever_a_contender_started_ends_with_it(stores: Path) -> None:
    one = fake(stores, "pass")
    one = Competitor(**{**vars(one), "python": str(stores.parent / "python")})
    (stores.parent / "python").write_text("#!/bin/sh\nsleep 1000 &\necho hello\nwait\n")
    (stores.parent / "python").chmod(0o755)
    before = descendants()
    with contender_process(one, {}) as process:
        with pytest.raises(ContenderFailed, match=r"its answer is no JSON: b'hello\\n'"):
            start(process, one)
        children = descendants() - before
        assert len(children) == 2
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_an_interruption_is_the_parent_s_alone(stores: Path) -> None:
    """A terminal sends it to the whole foreground group, which contenders are not in."""
    one = fake(stores, "pass")
    before = descendants()
    with contender_process(one, {}) as process:
        start(process, one)
        (child,) = descendants() - before
        assert os.getpgid(child.pid) == child.pid != os.getpgrp()
