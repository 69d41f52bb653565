"""What a Triton model for each engine costs: copies of the weights in memory, and a hop for each evaluation.

    python benchmarks/serving/per_phase.py memory BUNDLE
    python benchmarks/serving/per_phase.py hop
    python benchmarks/serving/per_phase.py steps BUNDLE

`memory` opens the UNet's ONNX Runtime engines of a bundle in each way there is, evaluates each once on zeros, and
prints what the process then holds in addition. Each way has a process of its own.

`hop` starts a real server (`make install` has it in ``.venv-triton``) whose models take and give tensors of the sizes
that shipped recipes have, and compute nothing; a model asks them as the pipeline does. `steps` serves a bundle in both
layouts and prints the seconds of a step. In both, models of the Python backend stand for Triton's ONNX Runtime and
TensorRT backends, which that server does not have: these compute inside the server, so that tensors cross one process
border less. Needs `hidiff-export`; nothing here is asserted by the test-suite.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime/tests")]

WAYS = {
    "current": "one model, one phase's engine at a time (the default)",
    "all": "one model, all phases' engines (`--resident all`)",
    "shared": "one model, all phases' engines, `--option weights=shared`",
    "linked": "a model for each engine, in one server",
    "copied": "the same, its files copied instead of linked",
}
RECIPES = ("sd15-1024", "sdxl-2048", "sdxl-4096", "sd15-controlnet-1024", "sdxl-controlnet-2048")
REPEATS = 100
PICTURES = 20

_NOTHING = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        types = {"TYPE_FP32": np.float32, "TYPE_INT32": np.int32}
        outputs = json.loads(args["model_config"])["output"]
        self._made = {one["name"]: np.zeros(one["dims"], types[one["data_type"]]) for one in outputs}

    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor(*one) for one in self._made.items()]) for _ in requests]
"""

_ASKER = """
import json
import time
import numpy as np
import triton_python_backend_utils as pb_utils
from hidiff_runtime.serving.triton.bls import ask

class TritonPythonModel:
    def execute(self, requests):
        return [self._timed(json.loads(request.inputs()[0].as_numpy()[0])) for request in requests]

    def _timed(self, asked):
        inputs = {name: np.zeros(shape, dtype) for name, shape, dtype in asked["inputs"]}
        seconds = []
        for _ in range(asked["repeats"] + 1):
            started = time.perf_counter()
            ask(asked["model"], inputs, asked["outputs"])
            seconds.append(time.perf_counter() - started)
        text = json.dumps(seconds[1:]).encode()
        return pb_utils.InferenceResponse([pb_utils.Tensor("seconds", np.array([text], np.object_))])
"""

_ASKER_CONFIG = """name: "asker"
backend: "python"
max_batch_size: 0
input [ { name: "asked" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "seconds" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""


def held() -> dict[str, float]:
    """MiB that this process holds: of its own, and of files, which all processes and sessions on them share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(rest.split()[0]) / 1024 for name, rest in (line.split(":", 1) for line in lines)}
    return {"own": sizes["Private_Dirty"], "files": sizes["Pss"] - sizes["Private_Dirty"]}


def zeros(record: Any) -> dict[str, np.ndarray]:
    """Inputs of a graph."""
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in record.inputs}


def measure(bundle: Path, way: str, folder: Path) -> None:
    """In a process of its own: prints what was held before the engines were opened, and after."""
    import onnxruntime  # noqa: F401 - part of what is held before

    from hidiff_runtime import open as open_bundle
    from hidiff_runtime.backends.onnxruntime import backend
    from hidiff_runtime.format.manifest import Manifest

    options: dict[str, Any] = {} if way == "current" else {"resident": "all"}
    if way == "shared":
        options["weights"] = "shared"
    before = held()
    with ExitStack() as stack:
        if way in ("linked", "copied"):
            device = stack.enter_context(backend().device({"threads": 2}))
            for record in Manifest.read(bundle).phases:
                session = device.open(folder / record.phase.name / "model.onnx", {}, record)
                stack.enter_context(session).run(zeros(record))
        else:
            opened = stack.enter_context(open_bundle(bundle, verify="size", threads=2, **options))
            for record in opened.manifest.phases:
                opened.engine(record.phase).run(zeros(record))
        gc.collect()
        print(json.dumps({"before": before, "after": held()}))


def memory(bundle: Path) -> None:
    """The table of all ways."""
    from hidiff_export.deploy.engine_files import take_onnx
    from hidiff_runtime.format.manifest import Manifest

    manifest = Manifest.read(bundle)
    store = manifest.files[manifest.weights["unet"]].size / 2**20
    size = f"{manifest.width} x {manifest.height}"
    print(f"{manifest.family}, {size}, {manifest.precision}, {len(manifest.phases)} phases, weights {store:,.0f} MiB\n")
    print("| engines | own, MiB | of files, MiB | own, in copies of the weights |\n| --- | ---: | ---: | ---: |")
    for way, words in WAYS.items():
        with tempfile.TemporaryDirectory(dir=bundle.parent) as name:
            if way in ("linked", "copied"):
                for record in manifest.phases:
                    (Path(name) / record.phase.name).mkdir()
                    engine = bundle / record.engines["onnxruntime"]
                    take_onnx(engine, Path(name) / record.phase.name, link=way == "linked")
            command = [sys.executable, __file__, "_measure", str(bundle), way, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        own, files = (found["after"][kind] - found["before"][kind] for kind in ("own", "files"))
        print(f"| {words} | {own:,.0f} | {files:,.0f} | {own / store:.2f} |", flush=True)


def graphs(name: str) -> Iterator[tuple[str, Any]]:
    """What each step of a shipped recipe evaluates: its first phase, and the ControlNet if it has one."""
    from hidiff_export.families import graph_io
    from hidiff_export.recipe import Recipe
    from hidiff_runtime.format.manifest import GraphRecord

    recipe = Recipe.load(name)
    config, shape = recipe.unet_config(), (recipe.latent_height, recipe.latent_width, recipe.model_batch)
    phase, tokens = recipe.phase_rule().phases()[0], {"prompt_tokens": recipe.prompt_tokens}
    inputs = graph_io.phase_inputs(config, recipe.unet_layout, phase, *shape, **tokens)
    yield f"UNet, {phase.name}", GraphRecord("unet", {}, inputs, graph_io.phase_outputs(config, *shape))
    if recipe.controlnet is not None:
        config = recipe.controlnet_config()
        inputs = graph_io.controlnet_inputs(config, *shape, **tokens)
        yield "ControlNet", GraphRecord("controlnet", {}, inputs, graph_io.controlnet_outputs(config, *shape))


def write_model(folder: Path, config: str, program: str) -> None:
    """A model of the Python backend."""
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    (folder / "1/model.py").write_text(program)


def hop(repeats: int) -> None:
    """The table of what a hop takes by the sizes of what crosses."""
    from hidiff_export.deploy.engine_config import engine_config
    from hidiff_export.triton.model_config import InstancePlacement
    from tests.deploy.engine_stand_in import PLATFORM
    from tests.deploy.server import TritonServer

    print("| recipe | evaluation | in, MB | out, MB | ms, median | ms, 95% |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for recipe in RECIPES:
        found = dict(graphs(recipe))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder / "models/asker", _ASKER_CONFIG, _ASKER)
            for index, record in enumerate(found.values()):
                text = engine_config(f"graph{index}", record, "onnxruntime", InstancePlacement()).text()
                write_model(folder / f"models/graph{index}", text.replace(PLATFORM, 'backend: "python"'), _NOTHING)
            with TritonServer(folder / "models", folder) as server:
                for index, (words, record) in enumerate(found.items()):
                    seconds = timed(server, f"graph{index}", record, repeats)
                    given, made = (sum(spec.bytes for spec in specs) / 1e6 for specs in (record.inputs, record.outputs))
                    late = statistics.quantiles(seconds, n=20)[-1] * 1e3
                    middle = statistics.median(seconds) * 1e3
                    row = (f"{given:.1f}", f"{made:.1f}", f"{middle:.1f}", f"{late:.1f}")
                    print(f"| {recipe} | {words} | {' | '.join(row)} |", flush=True)


def timed(server: Any, model: str, record: Any, repeats: int) -> list[float]:
    """Seconds of each time that a model was asked."""
    asked = {
        "model": model,
        "inputs": [(spec.name, spec.shape, spec.dtype) for spec in record.inputs],
        "outputs": [spec.name for spec in record.outputs],
        "repeats": repeats,
    }
    data = {"inputs": [{"name": "asked", "datatype": "BYTES", "shape": [1], "data": [json.dumps(asked)]}]}
    url = f"http://{server.http}/v2/models/asker/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(data).encode()), timeout=600) as answer:
        seconds: list[float] = json.loads(json.load(answer)["outputs"][0]["data"][0])
    return seconds


def steps(bundle: Path, pictures: int) -> None:
    """The table of the seconds of a step in both layouts."""
    from hidiff_export.deploy.per_phase import write_per_phase
    from hidiff_export.triton.repository import RepositoryPlan, write
    from tests.deploy.engine_stand_in import stand_in
    from tests.deploy.server import TritonServer

    plan = RepositoryPlan(options={"backend": "onnxruntime", "resident": "all"})
    print("| layout | phase | steps | ms a step | ms a picture |\n| --- | --- | ---: | ---: | ---: |")
    for layout in ("pipeline", "per-phase"):
        with tempfile.TemporaryDirectory(dir=bundle.parent) as name:
            folder, options = Path(name), {}
            if layout == "pipeline":
                write(bundle, folder / "models", RepositoryPlan(options={**plan.options, "threads": 1}))
            else:
                found = write_per_phase(bundle, folder / "models", plan)
                options = {"control": "explicit", "options": found.options("secret")[1:]}
                stand_in(folder / "models")
            with TritonServer(folder / "models", folder, **options) as server:
                rows(server, layout, pictures)


def rows(server: Any, layout: str, pictures: int) -> None:
    """Asks for pictures one after the other, and prints what they took."""
    kinds = "hidiff_step_seconds", "hidiff_request_seconds"
    names = [f"{kind}_{part}" for kind in kinds for part in ("sum", "count")]

    def read() -> dict[str, float]:
        return {key: value for name in names for key, value in server.measured(name).items()}

    url = f"http://{server.http}/v2/models/hidiff/generate"
    before: dict[str, float] = {}
    for index in range(pictures + 1):
        body = json.dumps({"prompt": "a lighthouse", "seed": index, "output": "base64"}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=600) as answer:
            answer.read()
        before = before or read()
    after = read()
    spent = {key: value - before.get(key, 0.0) for key, value in after.items()}

    def total(start: str) -> float:
        return sum(value for key, value in spent.items() if key.startswith(start))

    picture = total("hidiff_request_seconds_sum") / total("hidiff_request_seconds_count") * 1e3
    for key in (key for key in spent if key.startswith("hidiff_step_seconds_sum")):
        count = spent[key.replace("_sum", "_count")]
        phase = key.split('phase="')[1].split('"')[0]
        print(f"| {layout} | {phase} | {count:.0f} | {spent[key] / count * 1e3:.2f} | {picture:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("memory").add_argument("bundle", type=Path)
    hidden = commands.add_parser("_measure")
    hidden.add_argument("bundle", type=Path)
    hidden.add_argument("way", choices=WAYS)
    hidden.add_argument("folder", type=Path)
    commands.add_parser("hop").add_argument("--repeats", type=int, default=REPEATS)
    compared = commands.add_parser("steps")
    compared.add_argument("bundle", type=Path)
    compared.add_argument("--pictures", type=int, default=PICTURES)
    given = parser.parse_args()
    if given.command == "memory":
        memory(given.bundle)
    elif given.command == "_measure":
        measure(given.bundle, given.way, given.folder)
    elif given.command == "hop":
        hop(given.repeats)
    else:
        steps(given.bundle, given.pictures)


if __name__ == "__main__":
    main()
