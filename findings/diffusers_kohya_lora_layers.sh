#!/bin/sh
# diffusers 0.42.1 (peft 0.21.2, transformers 5.23.0, torch 2.13.0): a kohya LoRA is not fused layer by layer.
#
# The guess: load_lora_weights and fuse_lora add to each weight what the file holds for it, scaled by the alpha that lies
# beside its factors (alpha / rank; 1 without alpha, as kohya's trainer defines it), and a tensor that is not used is an
# error: for unknown names it is one.
# What happens:
# 1. Alphas that differ by layer are lost for to_q, to_k, to_v, to_out and for text encoders: these layers get the
#    alpha that is most frequent, because the names that the alphas are kept under match no layer. Feed-forwards and
#    convolutions of the UNet get their own. PEFT says so in a RuntimeWarning, and the fused weights are wrong.
# 2. Where the file has alphas for some layers alone, attention without alpha gets that of the others.
# 3. LoRA on q, k and v of a text encoder is skipped where the file has none on out_proj but some on the
#    feed-forwards: the file's names are then taken for those of another format, and what is left over for "unexpected".
#
# Exits with 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import diffusers
import peft
import torch
import transformers

RANK = 4
transformers.logging.set_verbosity_error()


def pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=64, **sizes))
    return diffusers.StableDiffusionPipeline(
        vae=None, tokenizer=None, unet=unet, text_encoder=text_encoder, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def weights(pipe):
    found = {}
    for network in ("unet", "text_encoder"):
        for name, value in getattr(pipe, network).state_dict().items():
            if "lora_" not in name:
                found[network, name.replace(".base_layer", "").replace("text_model.", "")] = value.clone()
    return found


def differing(title, layers):
    """The layers of a file whose fused weight is not W + alpha / rank * up @ down; ``layers`` with an alpha each."""
    torch.manual_seed(1)
    before = weights(pipeline())
    file, expected = {}, dict(before)
    for (network, module), alpha in layers.items():
        outputs, inputs = before[network, f"{module}.weight"].shape
        down, up = torch.randn(RANK, inputs), torch.randn(outputs, RANK)
        stem = ("lora_unet_" if network == "unet" else "lora_te_text_model_") + module.replace(".", "_")
        file |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha is not None:
            file[f"{stem}.alpha"] = torch.tensor(alpha)
        expected[network, f"{module}.weight"] = before[network, f"{module}.weight"] + (alpha or RANK) / RANK * up @ down
    pipe = pipeline()
    pipe.load_lora_weights(file)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    after = weights(pipe)
    wrong = [key for key in after if not torch.allclose(after[key], expected[key], atol=1e-4)]
    untouched = [key for key in wrong if torch.equal(after[key], before[key])]
    print(f"{title}: {len(layers)} layers, {len(wrong)} fused with another weight, {len(untouched)} of them not at all")
    for _, name in wrong:
        print("   ", name)
    return {name.removesuffix(".weight") for _, name in wrong}, len(untouched)


print("diffusers", diffusers.__version__, "peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
UNET = "mid_block.attentions.0.transformer_blocks.0"
attention = {("unet", f"{UNET}.attn1.to_{part}"): None for part in ("q", "k", "v", "out.0")}
forward = {("unet", f"{UNET}.ff.net.2"): None}
text = {("text_encoder", f"encoder.layers.0.self_attn.{part}_proj"): None for part in "qkv"}
out = {("text_encoder", "encoder.layers.0.self_attn.out_proj"): None}
mlp = {("text_encoder", f"encoder.layers.0.mlp.fc{part}"): None for part in (1, 2)}

layers = {**attention, **forward, **text, **out}
most_frequent = dict.fromkeys(layers, 2.0)
own = {**most_frequent, **{key: 1.0 for key in list(attention)[:1] + list(forward) + list(out)}}
one = differing("one alpha", most_frequent)
differ = differing("alphas that differ", own)
some = differing("alphas for some", {**most_frequent, next(iter(attention)): None})
skipped = differing("text q, k, v without out", dict.fromkeys({**attention, **text, **mlp}, 2.0))

as_described = (
    one == (set(), 0)
    and differ == ({f"{UNET}.attn1.to_q", "encoder.layers.0.self_attn.out_proj"}, 0)
    and some == ({f"{UNET}.attn1.to_q"}, 0)
    and skipped == ({module for _, module in text}, 3)
)
print("as described:", as_described)
sys.exit(not as_described)
PYTHON
