"""What cannot be built here is refused before anything is written: library, version, target, GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from hidiff_export.cli import main
from hidiff_export.engines.tensorrt import capabilities as module
from hidiff_export.engines.tensorrt.capabilities import (
    THIS_MACHINE,
    DetectedGpu,
    Examined,
    check_targets,
    examine,
    timing_cache,
)
from hidiff_export.engines.tensorrt.libraries import TENSORRT, TENSORRT_RTX, BuilderLibrary
from hidiff_export.errors import EngineError
from hidiff_export.recipe.field_types import Target

H100 = DetectedGpu("NVIDIA H100 80GB HBM3", "sm90")
L40 = DetectedGpu("NVIDIA L40S", "sm89")
RTX = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@pytest.mark.needs("tensorrt-rtx")
def test_the_installed_library_knows_every_target_that_a_recipe_can_name() -> None:
    found = examine(TENSORRT_RTX)
    assert set(found.targets) == {target.value for target in Target if target.ahead_of_time}
    check_targets(TENSORRT_RTX, ("sm89", "sm120"))
    with pytest.raises(EngineError, match="does not know the target sm90") as refused:
        check_targets(TENSORRT_RTX, ("sm89", "sm90"))
    assert refused.value.advice == "It builds for sm75, sm80, sm86, sm89, sm120, sm121."
    assert refused.value.exit_code == 5


@pytest.mark.parametrize(
    ("library", "found", "targets", "summary", "advice"),
    [
        (TENSORRT_RTX, Examined("1.7.1.116", RTX[:4], None), ("sm120",), "not know the target sm120", "sm86, sm89."),
        (TENSORRT_RTX, Examined("1.7.1.116", RTX, None), THIS_MACHINE, "there is none", "targets: [sm89, sm120], or"),
        (TENSORRT, Examined("11.4.0.106", (), None), THIS_MACHINE, "there is none", "with backend: tensorrt-rtx"),
        (
            TENSORRT_RTX,
            Examined("1.7.1.116", RTX, H100),
            THIS_MACHINE,
            "nothing for this machine's",
            "backend: tensorrt",
        ),
        (TENSORRT, Examined("10.9.0.34", (), L40), THIS_MACHINE, "too old", "pip install --upgrade"),
    ],
)
def test_what_cannot_be_built_here_is_refused(
    library: BuilderLibrary,
    found: Examined,
    targets: tuple[str, ...],
    summary: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "examine", lambda _library: found)
    with pytest.raises(EngineError) as refused:
        check_targets(library, targets)
    assert summary in refused.value.summary
    assert advice in refused.value.advice


@pytest.mark.parametrize(
    ("library", "version", "gpu"),
    [(TENSORRT, "10.13.2", H100), (TENSORRT, "11.4.0", L40), (TENSORRT_RTX, "1.7.1", L40)],
)
def test_a_gpu_that_is_here_can_be_built_for(
    library: BuilderLibrary, version: str, gpu: DetectedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = RTX if library.ahead_of_time else ()
    monkeypatch.setattr(module, "examine", lambda _library: Examined(version, known, gpu))
    check_targets(library, THIS_MACHINE)


def test_a_missing_module_is_named_with_the_command() -> None:
    library = BuilderLibrary("tensorrt-rtx", "TensorRT-RTX", "tensorrt_of_next_year", (1, 0), ahead_of_time=True)
    with pytest.raises(EngineError, match="tensorrt_of_next_year is not installed") as refused:
        examine(library)
    assert "pip install 'hidiff-export[tensorrt-rtx]'" in refused.value.advice


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_build_without_its_library_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    done = CliRunner().invoke(main, ["build", "tiny", "-o", str(output), "--set", "backend=tensorrt"])
    assert done.exit_code == 5
    assert "tensorrt is not installed" in done.stderr
    assert "pip install 'hidiff-export[tensorrt]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_timings_are_kept_for_one_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = timing_cache(TENSORRT, Examined("11.4.0.106", (), H100))
    assert kept == tmp_path / "hidiff-export/timings/tensorrt-11.4.0.106-NVIDIA-H100-80GB-HBM3.cache"
    assert kept != timing_cache(TENSORRT, Examined("11.4.0.106", (), L40))
    assert timing_cache(TENSORRT_RTX, Examined("1.7.1.116", RTX, L40)) is None


def test_timings_that_cannot_be_kept_do_not_stop_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hidiff-export").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache(TENSORRT, Examined("11.4.0.106", (), H100)) is None
