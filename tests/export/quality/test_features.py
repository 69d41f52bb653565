"""Feature models out of a user's files: the figures of their own libraries, and refusals that say what to give."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hidiff_export.errors import InputError
from hidiff_export.quality.classifier import Classifier
from hidiff_export.quality.features import open_features
from tests.export.quality.feature_files import clip_features, onnx_features


def pictures(count: int, side: int = 48) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8) for seed in range(count)]


class TestOnnx:
    def test_pictures_are_normalized_as_torchvision_does(self, tmp_path: Path):
        path = onnx_features(tmp_path / "features.onnx", side=48)
        pixels = np.stack(pictures(2)).astype(np.float32).transpose(0, 3, 1, 2) / 255
        mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        normalized = (pixels - mean[:, None, None]) / deviation[:, None, None]
        (expected,) = ReferenceEvaluator(onnx.load(path)).run(None, {"pixels": normalized})
        found = open_features(path).features(pictures(2))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
        raw = ReferenceEvaluator(onnx.load(path)).run(None, {"pixels": pixels})[0]
        assert np.abs(found.numpy() - raw).max() > 0.1

    def test_a_fixed_batch_gives_every_picture_its_own_row(self, tmp_path: Path):
        fixed = open_features(onnx_features(tmp_path / "fixed.onnx", side=48, batch=2))
        free = open_features(onnx_features(tmp_path / "free.onnx", side=48))
        torch.testing.assert_close(fixed.features(pictures(5)), free.features(pictures(5)))

    def test_a_graph_of_something_else_is_refused(self, tmp_path: Path):
        with pytest.raises(InputError, match="takes or gives something else"):
            open_features(onnx_features(tmp_path / "gray.onnx", channels=1))

    def test_a_damaged_file_is_refused(self, tmp_path: Path):
        (tmp_path / "damaged.onnx").write_bytes(b"no graph")
        with pytest.raises(InputError, match="does not load"):
            open_features(tmp_path / "damaged.onnx")


class TestClip:
    def test_embeddings_are_transformers_own(self, tmp_path: Path):
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        folder = clip_features(tmp_path / "clip")
        pixels = CLIPImageProcessor.from_pretrained(folder)(images=pictures(2), return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = CLIPVisionModelWithProjection.from_pretrained(folder)(pixels).image_embeds
        found = open_features(folder).features(pictures(2))
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found[0], found[1])

    def test_a_folder_without_one_is_refused(self, tmp_path: Path):
        with pytest.raises(InputError, match="no CLIP vision model"):
            open_features(tmp_path)


def test_a_missing_file_is_refused_with_what_can_be_given(tmp_path: Path):
    with pytest.raises(InputError, match="There is no feature model") as caught:
        open_features(tmp_path / "missing.onnx")
    assert ".onnx file" in caught.value.advice


class TestClassifier:
    def test_a_saved_one_names_the_same(self, tmp_path: Path):
        torch.manual_seed(0)
        network = Classifier(("cat", "dog", "owl")).half().float().eval()
        network.save(tmp_path / "animals")
        model = open_features(tmp_path / "animals")
        batch = torch.from_numpy(np.stack(pictures(6))).permute(0, 3, 1, 2).float() / 255
        features = model.features(pictures(6))
        with torch.no_grad():
            best = network(batch).argmax(1)
            torch.testing.assert_close(features, network.features(batch))
        assert model.named(features) == [network.labels[index] for index in best.tolist()]
        assert len(set(model.named(torch.randn(64, features.shape[1])))) > 1

    def test_a_damaged_one_is_refused(self, tmp_path: Path):
        Classifier(("cat", "dog")).save(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(InputError, match="classifier does not load"):
            open_features(tmp_path)
