"""Every name of TensorRT that the builder uses is one that the library has which it is asked of."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_api as api

import hidiff_export.engines.tensorrt as package

FOLDER = Path(package.__file__).parent
VARIABLES = {
    "trt": api.MODULE,
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "engine": "ICudaEngine",
    "layer": "ILayer",
    "tensor": "ITensor",
    "made": "IBuilderConfig",
}
RTX_ONLY = {"ComputeCapability", "REQUIRE_USER_ALLOCATION"}
"""Names that only TensorRT-RTX has, which the builder uses where it has found it to be that."""
FILES = ("engine_build.py", "network.py")
"""Those that hold the library's objects; no other file of the package may name the library."""


def names_in(path: Path) -> list[api.Use]:
    return list(api.uses(path.read_text(), VARIABLES))


@pytest.mark.parametrize("name", FILES)
def test_both_libraries_have_every_name(name: str) -> None:
    found = names_in(FOLDER / name)
    assert found
    rtx = [use for use in found if RTX_ONLY & {use.owner, use.name}]
    assert not [use for use in rtx if not use.is_in(api.RTX)]
    assert not [
        (use, library) for use in found if use not in rtx for library in (api.TRT, api.RTX) if not use.is_in(library)
    ]


def test_the_walk_sees_the_calls_that_matter() -> None:
    seen = {f"{use.owner}.{use.name}" for name in FILES for use in names_in(FOLDER / name)}
    assert {
        "Builder.create_network",
        "OnnxParser.load_initializer",
        "OnnxParser.parse_model_proto",
        "INetworkDefinition.get_output",
        "IBuilderConfig.clear_flag",
        "BuilderFlag.TF32",
        "IProgressMonitor.__init__",
    } <= seen


def test_no_other_file_names_the_library() -> None:
    for path in FOLDER.glob("*.py"):
        if path.name not in FILES:
            assert not names_in_module(path), path.name


def names_in_module(path: Path) -> list[api.Use]:
    return list(api.uses(path.read_text(), {"trt": api.MODULE}))


def test_cuda_has_what_is_asked_of_it() -> None:
    functions, enums = api.LISTS[api.CUDA]["functions"], api.LISTS[api.CUDA]["enums"]
    source = (FOLDER / "engine_build.py").read_text()
    calls = list(api.cuda_calls(source, "runtime"))
    assert calls
    assert not [call for call in calls if len(functions.get(call.name, "?")) != call.arguments]
    values = set(api.cuda_values(source, "runtime"))
    assert values <= {f"{enum}.{name}" for enum, names in enums.items() for name in names}
