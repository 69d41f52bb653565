"""`hidiff-export triton`: options become a plan, what was written is told, what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path

import linked
import pytest
import toy
import toy_pictures
from click.testing import CliRunner, Result
from google.protobuf import text_format
from toy_reference import record
from tritonclient.grpc.model_config_pb2 import ModelConfig

from hidiff_export.cli import main
from hidiff_runtime.format.manifest import Manifest


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    toy_pictures.make(folder)
    record(folder, toy.Toy())
    return folder


def triton(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["triton", *map(str, arguments)])


def config(repository: Path, model: str) -> ModelConfig:
    return text_format.Parse((repository / model / "config.pbtxt").read_text("utf-8"), ModelConfig())


def test_a_bundle_of_links_opens_as_it_says(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = linked.elsewhere(bundle, tmp_path)
    done = triton(source, "-o", tmp_path / "models")
    assert done.exit_code == 4
    assert "--allow-links" in done.stderr
    monkeypatch.chdir(tmp_path)
    done = triton(source, "-o", tmp_path / "models", "--allow-links", "store", "--bundle", "/mnt/bundle")
    assert done.exit_code == 0, done.output
    found = config(tmp_path / "models", "hidiff_stream").parameters["allow_links"].string_value
    assert json.loads(found) == [str(tmp_path / "store")]


def test_options_reach_the_configuration(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    done = triton(
        *(bundle, "-o", output, "--name", "sdxl", "--bundle", "/mnt/sdxl", "--gpus", "1,0", "--backend", "tensorrt"),
        *("--resident", "all", "--prefetch", "--option", "cache=off", "--option", "cuda_graph=false"),
        *("--queue-size", 7, "--queue-timeout", 2.5, "--max-prompt", 100, "--max-image-bytes", 9000, "--max-steps", 30),
        *("--environment", "/opt/hidiff", "--dynamic-batching"),
    )
    assert done.exit_code == 0, done.output
    found = config(output, "sdxl_stream")
    given = {name: value.string_value for name, value in found.parameters.items()}
    assert given["bundle"] == "/mnt/sdxl"
    assert given["EXECUTION_ENV_PATH"] == "/opt/hidiff"
    assert given["dynamic_batching"] == "true"
    assert [given[f"max_{name}"] for name in ("prompt_characters", "image_bytes", "steps")] == ["100", "9000", "30"]
    options = {"backend": "tensorrt", "resident": "all", "prefetch": True, "cache": "off", "cuda_graph": False}
    assert json.loads(given["options"]) == options
    assert list(found.instance_group[0].gpus) == [1, 0]
    policy = found.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (7, 2_500_000)


def test_a_memory_limit_reaches_the_configuration_in_bytes(bundle: Path, tmp_path: Path) -> None:
    assert triton(bundle, "-o", tmp_path / "models", "--memory-limit", "6GiB").exit_code == 0
    options = json.loads(config(tmp_path / "models", "hidiff_stream").parameters["options"].string_value)
    assert options == {"resident": "current", "prefetch": False, "memory_limit": 6 * 2**30}


def test_it_tells_people_and_machines_what_it_wrote(bundle: Path, tmp_path: Path) -> None:
    said = triton(bundle, "-o", tmp_path / "models").output
    assert f"tritonserver --model-repository {tmp_path / 'models'}" in said
    assert "hidiff, hidiff_stream" in said
    assert "linked" in said
    told = json.loads(triton(bundle, "-o", tmp_path / "models", "--force", "--json").output)
    assert told["models"] == ["hidiff", "hidiff_stream"]
    assert told["bundle"] == Manifest.read(bundle).digest
    assert told["linked"] is True
    assert 0 < told["bytes"] < 10_000


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--gpus", "0,0"), 2, "different numbers"),
        (("--gpus", "all"), 2, "different numbers"),
        (("--option", "threads"), 2, "NAME=VALUE"),
        (("--option", "verify=size"), 2, "no option of a backend"),
        (("--option", "memory_limit=1"), 2, "Use --memory-limit"),
        (("--memory-limit", "much"), 2, "write 6GiB, 500MB or 6442450944"),
        (("--memory-limit", "0"), 2, "--memory-limit must be a size"),
        (("--memory-limit", "1GiB", "--resident", "all"), 2, "does not go with --resident all"),
        (("--bundle", "elsewhere"), 2, "absolute path"),
        (("--name", "a/b"), 2, "no name of a model"),
        (("--queue-size", "0"), 2, "queue-size"),
        (("--max-steps", "0"), 2, "max-steps"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    bundle: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = triton(bundle, "-o", tmp_path / "models", *arguments)
    assert done.exit_code == code
    assert words in done.output
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    done = triton(tmp_path, "-o", tmp_path / "models")
    assert done.exit_code == 4
    assert "manifest" in done.output


def test_one_layout_is_left_and_the_other_says_why(bundle: Path, tmp_path: Path) -> None:
    done = triton(bundle, "-o", tmp_path / "models", "--layout", "per-phase")
    assert done.exit_code == 2
    assert "2.15 times the weights in memory" in done.stderr
    assert "430 MB" in done.stderr
    assert "given: --layout per-phase" in done.stderr
    assert "Leave --layout out" in done.stderr
    assert not (tmp_path / "models").exists()
    usual = triton(bundle, "-o", tmp_path / "models")
    named = triton(bundle, "-o", tmp_path / "models", "--force", "--layout", "pipeline")
    assert (named.exit_code, named.output) == (0, usual.output)
    assert "--layout" not in triton("--help").output
