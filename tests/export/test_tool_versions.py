"""Which stages another version of a tool does again."""

from __future__ import annotations

from pathlib import Path

import pytest

from hidiff_export.compiler import compile as compile_module
from hidiff_export.compiler.compile import stage_key
from hidiff_export.compiler.stages.engines import EnginesStage
from hidiff_export.compiler.stages.stage import StageContext
from hidiff_export.compiler.stages.weights import WeightsStage
from hidiff_export.engines.tensorrt import builder
from hidiff_export.engines.tensorrt.capabilities import Examined
from hidiff_export.recipe import Recipe
from hidiff_export.tool_versions import ENGINE_BUILDERS, EXPORTERS, tool_versions


def test_another_tensorrt_builds_engines_again_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = StageContext(Recipe.load("tiny", ["backend=tensorrt-rtx"]), tmp_path)
    keys = []
    for version in ("1.7.1.116", "1.7.1.116", "1.8.0.1"):
        monkeypatch.setattr(builder, "examine", lambda _library, version=version: Examined(version, ("sm89",), None))
        weights = stage_key(WeightsStage(), context, {})
        done = dict.fromkeys(EnginesStage().needs, weights)
        keys.append((weights, stage_key(EnginesStage(), context, done)))
    assert keys[0] == keys[1]
    assert keys[0][0] == keys[2][0]
    assert keys[0][1] != keys[2][1]


def test_another_exporter_does_everything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = StageContext(Recipe.load("tiny"), tmp_path)
    before = stage_key(WeightsStage(), context, {})
    monkeypatch.setattr(compile_module, "tool_versions", lambda names: dict.fromkeys(names, "99"))
    assert stage_key(WeightsStage(), context, {}) != before


def test_manifests_list_all_tools_and_stages_those_they_use() -> None:
    assert not set(EXPORTERS) & set(ENGINE_BUILDERS)
    assert "torch" in tool_versions(EXPORTERS)
    assert not set(tool_versions(EXPORTERS)) & set(ENGINE_BUILDERS)
    assert set(tool_versions(EXPORTERS)) <= set(tool_versions())
