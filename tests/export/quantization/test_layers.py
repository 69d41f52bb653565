"""Which layers of a traced UNet are quantized."""

import numpy as np
import onnx_ir as ir

from hidiff_export.quantization.layers import KEPT, quantized_layers


def _graph(*names: str) -> ir.Graph:
    tensor = ir.tensor(np.zeros((4, 4), np.float16), name="w")
    value = ir.Value(name="w", const_value=tensor)
    nodes = [ir.node(name.rpartition("/")[2], [value, value], name=name) for name in names]
    return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, initializers=[value], opset_imports={"": 23})


def test_layers_behind_a_normalization_are_quantized() -> None:
    names = (
        "down_blocks.0.resnets.0.conv1/Conv",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q/Gemm",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2/Gemm",
    )
    assert quantized_layers(_graph(*names)) == names


def test_the_table_and_what_has_no_weights_are_left_out() -> None:
    names = (
        "conv_in/Conv",
        "time_embedding.linear_1/Gemm",
        "down_blocks.0.resnets.0.time_emb_proj/Gemm",
        "down_blocks.1.resnets.0.conv_shortcut/Conv",
        "down_blocks.0.attentions.0.proj_in/Conv",
        "down_blocks.0.downsamplers.0.conv/Conv",
        "up_blocks.0.upsamplers.0.conv/Conv",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1/Attention",
        "down_blocks.0.resnets.0/Add",
    )
    assert quantized_layers(_graph(*names)) == ()


def test_a_name_that_only_begins_like_a_kept_one_is_quantized() -> None:
    assert quantized_layers(_graph("block.conv_input/Conv")) == ("block.conv_input/Conv",)


def test_each_group_says_why() -> None:
    for modules, reason in KEPT.items():
        assert modules
        assert len(reason) > 40
