"""Every name of TensorRT, TensorRT-RTX and CUDA that the backend uses is one they have."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import tensorrt_api as api

import hidiff_runtime.backends.tensorrt as package
from hidiff_runtime.format.dtypes import BY_NAME
from hidiff_runtime.format.specs import DTYPES

FOLDER = Path(package.__file__).parent
VARIABLES = {
    "trt": api.MODULE,
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
}
BY_FILE = {"rtx_cache.py": {**VARIABLES, "cache": "IRuntimeCache"}, "cuda.py": {}}
"""Where variables of these names hold something else: our own cache, and CUDA's runtime."""
RTX_ONLY = {"rtx_cache.py"}


def names_in(path: Path) -> list[api.Use]:
    return list(api.uses(path.read_text(), BY_FILE.get(path.name, VARIABLES)))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_both_libraries_have_every_name_that_both_are_asked_for(path: Path) -> None:
    libraries = [api.RTX] if path.name in RTX_ONLY else [api.TRT, api.RTX]
    missing = [(use, library) for use in names_in(path) for library in libraries if not use.is_in(library)]
    assert not missing


@pytest.mark.parametrize("name", [*DTYPES, "bool"])
@pytest.mark.parametrize("library", [api.TRT, api.RTX])
def test_both_libraries_have_the_types_that_engines_take_and_give(name: str, library: str) -> None:
    assert api.Use(0, "DataType", BY_NAME[name].tensorrt).is_in(library)


def test_the_walk_sees_the_calls_that_matter() -> None:
    seen = {f"{use.owner}.{use.name}" for path in FOLDER.glob("*.py") for use in names_in(path)}
    assert {
        "Runtime.deserialize_cuda_engine",
        "Runtime.get_engine_validity",
        "ICudaEngine.device_memory_size_v2",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_device_memory",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeCache.deserialize",
        "ILogger.Severity.INTERNAL_ERROR",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
    } <= seen


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("trt.BuilderFlag.FP16", {api.TRT, api.RTX}),
        ("engine.device_memory_size", {api.TRT, api.RTX}),
        ("self._engine.get_binding_name(0)", {api.TRT, api.RTX}),
        ("trt.ComputeCapability.SM89", {api.TRT}),
        ("place.runtime.get_engine_validity(plan)", {api.TRT}),
        ("trt.Runtime(logger).deserialize_cuda_engine(plan).unload_weights()", {api.TRT}),
        ("trt.ILogger.Severity.ERROR, context.set_tensor_address('x', 1)", set()),
    ],
)
def test_a_name_that_a_library_lacks_is_found(source: str, missing: set[str]) -> None:
    found = list(api.uses(source, VARIABLES))
    assert found
    assert {library for use in found for library in (api.TRT, api.RTX) if not use.is_in(library)} == missing


def test_an_object_that_escapes_the_walk_is_found() -> None:
    with pytest.raises(AssertionError, match="made holds a ICudaEngine"):
        list(api.uses("made = runtime.deserialize_cuda_engine(plan)", VARIABLES))


def test_cuda_has_every_function_and_value_with_as_many_parameters() -> None:
    source = (FOLDER / "cuda.py").read_text()
    functions, enums = api.LISTS[api.CUDA]["functions"], api.LISTS[api.CUDA]["enums"]
    calls = list(api.cuda_calls(source, "runtime"))
    assert len(calls) > 20
    assert not [call for call in calls if len(functions.get(call.name, "?")) != call.arguments]
    values = set(api.cuda_values(source, "runtime"))
    assert "cudaError_t.cudaSuccess" in values
    known = {f"{enum}.{name}" for enum, names in enums.items() for name in names}
    known |= {*api.LISTS[api.CUDA]["constants"], *enums}
    assert not values - known


def test_the_list_of_cuda_is_what_the_package_has() -> None:
    runtime = pytest.importorskip(api.CUDA)
    for name, parameters in api.LISTS[api.CUDA]["functions"].items():
        assert list(inspect.signature(getattr(runtime, name)).parameters) == parameters


def test_the_list_of_tensorrt_rtx_is_what_the_package_has() -> None:
    trt = pytest.importorskip(api.RTX)
    if trt.__version__ != api.LISTS[api.RTX]["version"]:
        pytest.skip(f"TensorRT-RTX {trt.__version__} is another than the listed one")
    for name, members in api.LISTS[api.RTX]["classes"].items():
        assert not set(members) - set(dir(getattr(trt, name))), name


def test_the_modules_import_without_any_of_the_libraries() -> None:
    for path in FOLDER.glob("*.py"):
        importlib.import_module(f"{package.__name__}.{path.stem}".removesuffix(".__init__"))
