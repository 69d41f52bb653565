"""Which peers are asked for, which are left out and why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hidiff_export.benchmarking import peers
from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.peers import DEFAULT, PEERS, WantedPeer, competitor, interpreters, wanted_peers
from hidiff_export.benchmarking.workload import Workload
from hidiff_export.errors import InputError
from hidiff_export.recipe import Recipe


def rows(text: str, *precisions: str) -> list[str]:
    return [one.row for one in wanted_peers(text, precisions or ("float32",))]


def made(name: str, *changes: str, pythons: dict[str, str] | None = None) -> Competitor | str:
    """A peer for the tiny recipe with some values changed."""
    work = Workload(Recipe.load("tiny", changes), 50)
    store = Path("/nowhere/unet/weights.safetensors")
    return competitor(WantedPeer(name, "float32"), work, store, pythons or {}, 1, profile=False)


def test_names_come_in_the_order_of_the_table() -> None:
    assert rows("all") == list(PEERS)
    assert rows("none") == []
    assert rows("default") == list(DEFAULT)
    assert rows("eager, diffusers") == ["diffusers", "eager"]
    assert rows("eager:bfloat16,eager,diffusers") == ["diffusers", "eager", "eager:bfloat16"]
    assert rows("diffusers,eager:bfloat16", "float32", "bfloat16") == [
        "diffusers",
        "diffusers:bfloat16",
        "eager:bfloat16",
    ]


@pytest.mark.parametrize("text", ["", "onnx", "eager:int8", "eager,", "eager,eager", "eager:float32,eager", "all,none"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        wanted_peers(text, ("float32",))


@pytest.mark.parametrize(
    "text", ["optimum-intel", "optimum-intel=", "optimum-intel=/nowhere", f"eager={sys.executable}"]
)
def test_other_interpreters_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="PEER=PYTHON"):
        interpreters([text])


def test_an_interpreter_is_of_one_peer() -> None:
    assert interpreters([f"optimum-intel={sys.executable}"]) == {"optimum-intel": sys.executable}


def test_a_peer_has_the_first_step_of_each_phase() -> None:
    found = made("hidiffusion")
    assert isinstance(found, Competitor)
    assert found.hidiffusion
    assert found.settings["phase_steps"] == {"strided": 0, "windowed": 20}
    assert found.settings["shapes"]["latents"] == [2, 4, 32, 32]


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("hidiffusion", ("hidiffusion.thresholds={strided: 0.5}",), "the recipe has others"),
        ("hidiffusion", ("hidiffusion.windows=false",), "the recipe has others"),
        ("hidiffusion", ("task=controlnet", "controlnet=random:1"), "residuals"),
        ("diffusers", ("task=controlnet", "controlnet=random:1"), "residuals"),
        ("optimum-intel", ("prompt_chunks=2",), "77 tokens"),
        ("stable-diffusion.cpp", (), "full width"),
        ("stable-diffusion.cpp", ("unet_width=full",), "a bundle's text encoders"),
    ],
)
def test_what_a_peer_cannot_compute_is_told(name: str, changes: tuple[str, ...], why: str) -> None:
    found = made(name, *changes)
    assert isinstance(found, str)
    assert why in found


def test_what_is_not_installed_is_told_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _name: None)
    assert made("hidiffusion") == ("hidiffusion is not installed for this Python. pip install hidiffusion==0.1.10.")


def test_another_interpreter_is_asked_itself(tmp_path: Path) -> None:
    """One that has nothing, and one that is none."""
    bare, broken = tmp_path / "bare", tmp_path / "broken"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    broken.write_text("#!/bin/sh\nexit 3\n")
    for path, lacks in ((bare, "optimum.intel"), (broken, "a working Python")):
        path.chmod(0o755)
        found = made("optimum-intel", pythons={"optimum-intel": str(path)})
        assert isinstance(found, str)
        assert found.startswith(f"{lacks} is not installed for {path}. In an environment of its own: pip install")
