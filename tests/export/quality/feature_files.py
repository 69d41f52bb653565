"""Feature models as users have them in files: an ONNX graph, and a folder of a CLIP vision model."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def onnx_features(path: Path, *, side: int | str = "side", batch: int | str = "batch", channels: int = 3) -> Path:
    """Writes a graph of one convolution and the mean over the picture: six features."""
    kernel = np.random.default_rng(0).standard_normal((6, channels, 5, 5)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["pixels", "kernel"], ["convolved"], strides=[2, 2]),
            helper.make_node("Relu", ["convolved"], ["positive"]),
            helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
        ],
        "features",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, channels, side, side])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, 6])],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def clip_features(folder: Path) -> Path:
    """Writes a CLIP vision model of two small layers with its image processor, as transformers does."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
