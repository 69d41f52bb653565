"""What a manifest says of text encoders and a VAE: written, read, and refused where its parts do not fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hidiff_runtime.errors import BundleError
from hidiff_runtime.format.manifest import FileDigest, GraphRecord, Manifest, PhaseRecord, TensorSpec
from hidiff_runtime.format.specs import TextEncoderRecord, VaeRecord
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule

ROWS = ((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5), (0.1, 0.1, 0.1), (0.0, 0.25, 0.0))


def text_encoder(name: str, width: int, *pooled: TensorSpec) -> TextEncoderRecord:
    return TextEncoderRecord(
        f"{name}/{name}.onnx",
        {"toy": f"{name}/{name}.toy"},
        (TensorSpec("input_ids", (1, 77), "int32"), TensorSpec("clip_skip", (1,), "int32")),
        (TensorSpec("prompt_embeds", (1, 77, width), "float32"), *pooled),
        name=name,
        tokenizer=f"{name}/tokenizer.json",
        clip_skip=2,
    )


def graph(name: str, given: TensorSpec, made: TensorSpec) -> GraphRecord:
    return GraphRecord(f"vae/{name}.onnx", {"toy": f"vae/{name}.toy"}, (given,), (made,))


def sample() -> Manifest:
    image = TensorSpec("image", (1, 3, 64, 64), "float32")
    vae = VaeRecord(
        decoder=graph("decoder", TensorSpec("latents", (1, 4, 8, 8), "float32"), image),
        encoder=graph("encoder", image, TensorSpec("moments", (1, 8, 8, 8), "float32")),
        scaling_factor=0.13025,
        overlap=16,
        preview=ROWS,
    )
    latents, noise, timestep, embeds, pooled = (
        TensorSpec("latents", (1, 4, 16, 16), "float32"),
        TensorSpec("noise_pred", (1, 4, 16, 16), "float32"),
        TensorSpec("timestep", (1,), "float32"),
        TensorSpec("prompt_embeds", (1, 77, 20), "float32"),
        TensorSpec("text_embeds", (1, 6), "float32"),
    )
    inputs = (latents, timestep, embeds, pooled)
    phase = PhaseRecord("unet/w.onnx", {}, inputs, (noise,), Phase(PhaseKind.WINDOWED))
    manifest = Manifest(
        tools={},
        recipe={},
        family="sdxl",
        task="text-to-image",
        width=128,
        height=128,
        batch=1,
        guidance=False,
        precision="float32",
        rule=PhaseRule(),
        latent=(4, 16, 16),
        windowed_blocks=(),
        phases=(phase,),
        samplers={"ddim": "samplers/ddim.safetensors"},
        default_sampler="ddim",
        steps=(1,),
        weights={name: f"{name}/weights.safetensors" for name in ("unet", "text_encoder", "text_encoder_2", "vae")},
        files={},
        text_encoders=(text_encoder("text_encoder", 8), text_encoder("text_encoder_2", 12, pooled)),
        vae=vae,
    )
    return replace(manifest, files={path: FileDigest(1, "0" * 64) for _, path in manifest.paths()})


def test_text_encoders_and_vae_survive_json() -> None:
    manifest = Manifest.from_json(json.loads(json.dumps(sample().to_json())))
    assert manifest == sample()
    assert [name for name, _ in manifest.others()] == [
        "text_encoder",
        "text_encoder_2",
        "vae_decoder",
        "vae_encoder",
    ]


def test_tokenizers_and_both_halves_of_the_vae_are_among_the_paths() -> None:
    paths = dict(sample().paths())
    assert paths["text_encoder_2.tokenizer"] == "text_encoder_2/tokenizer.json"
    assert paths["vae_encoder.graph"] == "vae/encoder.onnx"
    assert paths["vae_decoder.engines.toy"] == "vae/decoder.toy"


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("text_encoders", 0, "name"), "text_encoder_3", "text_encoders must be text_encoder and text_encoder_2"),
        (("text_encoders", 0, "clip_skip"), -1, r"text_encoders\[0\].clip_skip must be a whole number"),
        (("text_encoders", 0, "tokenizer"), "../tokenizer.json", r"text_encoders\[0\].tokenizer"),
        (
            ("text_encoders", 1, "inputs", 1, "name"),
            "skip",
            "text_encoder_2 must take one row of input_ids and one clip_skip",
        ),
        (("text_encoders", 1, "outputs", 0, "shape", 2), 13, "text_encoders must give embeddings as wide as"),
        (("text_encoders", 1, "outputs", 1, "shape", 1), 7, "text_encoders must give text_embeds"),
        (("weights", "unet"), ..., "weights must name the UNet's store"),
        (("weights", "text_encoder"), ..., "weights must name the store of text_encoder"),
        (("weights", "vae"), ..., "weights must name the VAE's store"),
        (("vae", "decoder", "inputs", 0, "shape", 2), 17, "vae.decoder must have a picture of 8"),
        (("vae", "encoder", "outputs", 0, "shape", 1), 4, "vae must be for tiles of at most"),
        (("vae", "encoder", "outputs", 0, "name"), "latents", "vae must take latents and give image"),
        (("vae", "scaling_factor"), 0, "vae.scaling_factor must be from 0.0001 to 10000"),
        (("vae", "preview"), [[0, 0, 0]], "vae.preview must have 5 rows"),
        (("vae", "preview", 0, 1), "much", "vae.preview must be rows of three numbers"),
        (("vae", "overlap"), 0.5, "vae.overlap must be a whole number"),
        (("vae", "overlap"), 64, "vae.overlap must be smaller than a tile"),
    ],
)
def test_what_does_not_fit_together_is_named(path: tuple[Any, ...], value: object, named: str) -> None:
    data = json.loads(json.dumps(sample().to_json()))
    *way, last = path
    place = data["buckets"][0] if path[0] == "vae" else data
    for part in way:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(BundleError, match=named) as caught:
        Manifest.from_json(data)
    assert caught.value.exit_code == 4
