"""A pipeline whose engines are elsewhere: the same pictures from a folder without engines, and short errors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import toy
import toy_pictures
from PIL import Image

from hidiff_runtime import check
from hidiff_runtime.bundle import open as open_bundle
from hidiff_runtime.errors import BundleError, EngineError, InputError
from hidiff_runtime.format.manifest import MANIFEST, Manifest
from hidiff_runtime.pipeline.pipeline import Pipeline
from hidiff_runtime.serving.public_errors import public_message
from hidiff_runtime.serving.triton.backend import TritonBackend
from hidiff_runtime.serving.triton.layout import engine_models


class Server:
    """Stands for the server: evaluates the toy engines of a whole bundle by their models' names."""

    def __init__(self, folder: Path, prefix: str = "toy") -> None:
        self.models = engine_models(Manifest.read(folder), prefix)
        self.asked: list[str] = []
        self.instead: dict[str, str] = {}
        self._folder = folder
        self._engines = toy_pictures.Backend()

    def __call__(self, model: str, inputs: toy.Arrays, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.asked.append(model)
        record = self.models[self.instead.get(model, model)]
        weights = {name: self._folder / path for name, path in Manifest.read(self._folder).weights.items()}
        found = self._engines.open(self._folder / record.engines["toy"], weights, record).run(inputs)
        return {name: found[name] for name in outputs}

    @property
    def backend(self) -> TritonBackend:
        return TritonBackend("toy", self.models, self)


def thin(folder: Path, into: Path) -> Path:
    """A folder of what the runtime reads itself."""
    for path in (*Manifest.read(folder).thin_files(), MANIFEST):
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, into / path)
    return into


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return toy_pictures.make(tmp_path / "whole", toy.Toy(control=True))


def given(pipeline: Pipeline) -> Mapping[str, object]:
    size = (pipeline.bundle.manifest.width, pipeline.bundle.manifest.height)
    image = Image.new("RGB", size, (200, 30, 90))
    return {"seed": 3, "steps": 4, "image": image, "control_image": image, "strength": 1.0}


def test_models_are_named_after_what_they_compute(whole: Path) -> None:
    names = set(engine_models(Manifest.read(whole), "toy"))
    assert {"toy_windowed", "toy_windowed-control", "toy_controlnet", "toy_text_encoder", "toy_vae_decoder"} <= names
    assert "toy_step" not in names


def test_a_thin_folder_draws_the_same_picture(whole: Path, tmp_path: Path) -> None:
    server = Server(whole)
    with Pipeline.open(whole, backend=toy_pictures.Backend()) as local:
        expected = local("a house", **given(local))
    with Pipeline.open(thin(whole, tmp_path / "thin"), backend=server.backend) as pipeline:
        found = pipeline("a house", **given(pipeline))
        assert pipeline.bundle.manifest.digest == Manifest.read(whole).digest
    assert found.tobytes() == expected.tobytes()
    assert set(server.asked) == set(server.models) - {"toy_strided_pooled", "toy_strided"}


def test_a_thin_folder_holds_no_engine_and_no_weights(whole: Path, tmp_path: Path) -> None:
    names = {path.suffix for path in thin(whole, tmp_path / "thin").rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}
    assert not list((tmp_path / "thin").rglob("weights.safetensors"))


def test_what_is_left_of_a_thin_folder_is_still_hashed(whole: Path, tmp_path: Path) -> None:
    folder = thin(whole, tmp_path / "thin")
    table = folder / "samplers/plain.safetensors"
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="broken") as caught:
        open_bundle(folder, backend=Server(whole).backend)
    assert "plain.safetensors" in str(caught.value.given)


def test_a_thin_folder_is_broken_to_a_backend_that_opens_engines_itself(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="broken"):
        open_bundle(thin(whole, tmp_path / "thin"), backend=toy.ToyBackend())


@pytest.mark.parametrize("verify", ["hash", "size"])
def test_another_phase_s_model_is_found_by_the_reference_samples(tmp_path: Path, verify: str) -> None:
    whole = toy.make(tmp_path / "whole")
    folder, server = thin(whole, tmp_path / "thin"), Server(whole)
    with open_bundle(folder, backend=server.backend, verify=verify) as bundle:
        assert check(bundle).ok
        server.instead = {"toy_strided": "toy_windowed"}
        failed = {verdict.phase for verdict in check(bundle).verdicts if not verdict.ok}
    assert "strided" in failed


def test_an_output_of_another_shape_is_refused(whole: Path, tmp_path: Path) -> None:
    server = Server(whole)
    backend = TritonBackend("toy", server.models, lambda *given: {"image": server(*given)["image"][..., 1:]})
    with (
        open_bundle(thin(whole, tmp_path / "thin"), backend=backend) as bundle,
        bundle.network("vae_decoder") as session,
    ):
        latents = np.zeros(session._record.inputs[0].shape, np.float32)  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="toy_vae_decoder gave another output"):
            session.run({"latents": latents})


def test_a_failure_tells_the_client_no_path(whole: Path, tmp_path: Path) -> None:
    def fail(model: str, _inputs: toy.Arrays, _outputs: Sequence[str]) -> dict[str, np.ndarray]:
        raise EngineError(f"The model {model} failed.", given="/models/toy/1/model.onnx: no such node")

    backend = TritonBackend("toy", Server(whole).models, fail)
    with (
        Pipeline.open(thin(whole, tmp_path / "thin"), backend=backend) as pipeline,
        pytest.raises(EngineError) as caught,
    ):
        pipeline("a house", **given(pipeline))
    assert "toy_" in public_message(caught.value)
    assert "/" not in public_message(caught.value)


def test_options_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="take no options"):
        open_bundle(thin(whole, tmp_path / "thin"), backend=Server(whole).backend, threads=2)
