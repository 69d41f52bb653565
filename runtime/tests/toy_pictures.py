"""The toy bundle from prompt to picture: text encoders, a VAE and a ControlNet of a few lines of numpy each.

Each output depends on each input and on where in it a value is, so that a wrong or misplaced one shows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import toy

from hidiff_runtime.format.manifest import GraphRecord, Manifest, TensorSpec
from hidiff_runtime.format.safetensors import write
from hidiff_runtime.format.specs import TextEncoderRecord, VaeRecord
from hidiff_runtime.sampling.scheduler_table import EtaTerms

TOKENS = 77
WIDTH, HEIGHT = toy.WIDTH * 8, toy.HEIGHT * 8
SCALING_FACTOR = 0.5
CLIP_SKIP = 4
START, END = "<|startoftext|>", "<|endoftext|>"
PREVIEW = ((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5), (0.1, 0.1, 0.1), (0.0, 0.1, 0.0))


KARRAS = {"config": json.dumps({"use_karras_sigmas": True, "num_train_timesteps": 1000})}


def encode_text(record: TextEncoderRecord, inputs: toy.Arrays) -> dict[str, np.ndarray]:
    """Prompt embeds that tell ids, places and skipped layers apart; pooled ones if the encoder has them."""
    ids = inputs["input_ids"].astype(np.float32)
    found = {}
    for spec in record.outputs:
        place = np.arange(1, TOKENS + 1, dtype=np.float32)[None, :, None]
        channel = np.arange(1, spec.shape[-1] + 1, dtype=np.float32)
        value = np.sin(ids[:, :, None] * 0.01 * channel + 0.3 * place + inputs["clip_skip"][0])
        found[spec.name] = (value if spec.name == "prompt_embeds" else value.mean(1)).astype(np.float32)
    return found


def decode(latents: np.ndarray) -> np.ndarray:
    """A picture of 8 x 8 squares, whose colours are three channels and a part of the fourth."""
    colours = np.tanh(latents[:, :3] + 0.1 * latents[:, 3:])
    return colours.repeat(8, axis=2).repeat(8, axis=3).astype(np.float32)


def encode(image: np.ndarray) -> np.ndarray:
    """The moments of a picture: the means of its squares, and a variance that grows with their brightness."""
    batch, _, height, width = image.shape
    squares = image.reshape(batch, 3, height // 8, 8, width // 8, 8).mean(axis=(3, 5))
    grey = squares.mean(axis=1, keepdims=True)
    return np.concatenate([squares, grey, np.repeat(grey - 3, 4, axis=1)], axis=1).astype(np.float32)


def residuals(inputs: toy.Arrays, outputs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    """What the ControlNet gives."""
    rows = np.linspace(0, 1, inputs["control_image"].shape[2], dtype=np.float32)[:, None]
    batch = len(inputs["latents"])
    told = sum(np.tanh(inputs[name]).reshape(batch, -1).mean(1) for name in ("latents", "prompt_embeds"))
    value = (inputs["control_image"] * rows).reshape(batch, -1).mean(1) + told + 1e-3 * inputs["timestep"][0]
    each = (inputs["conditioning_scale"][0] * value)[:, None, None, None].astype(np.float32)
    return {spec.name: np.broadcast_to(each, spec.shape).copy() for spec in outputs}


@dataclasses.dataclass
class Session:
    """Runs one of them; notes when it was entered and left."""

    backend: toy.ToyBackend
    name: str
    record: Any

    def __enter__(self) -> Session:
        self.backend.events.append(f"open {self.name}")
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.events.append(f"close {self.name}")

    def run(self, inputs: toy.Arrays) -> dict[str, np.ndarray]:
        assert {name: (array.shape, array.dtype) for name, array in inputs.items()} == {
            spec.name: (spec.shape, np.dtype(spec.dtype)) for spec in self.record.inputs
        }
        self.backend.calls.append((self.name, dict(inputs)))
        return self.backend.spoil(self._compute(inputs), len(self.backend.calls))

    def _compute(self, inputs: toy.Arrays) -> dict[str, np.ndarray]:
        if self.name == "decoder":
            return {"image": decode(inputs["latents"])}
        if self.name == "encoder":
            return {"moments": encode(inputs["image"])}
        if self.name == "controlnet":
            return residuals(inputs, self.record.outputs)
        return encode_text(self.record, inputs)


class Backend(toy.ToyBackend):
    """Opens the engines of a toy that has everything."""

    def open(self, engine: Path, weights: Mapping[str, Path], record: Any) -> Any:
        described = json.loads(engine.read_text())
        if "network" not in described:
            return super().open(engine, weights, record)
        assert engine.parent.name in weights
        return Session(self, described["network"], record)


def tokenizer(path: Path) -> None:
    """Writes a tokenizer of single letters that works as CLIP's: lower case, spaces as one, 77 places."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    model = models.BPE({token: number for number, token in enumerate(vocabulary)}, [], unk_token=END)
    model.end_of_word_suffix = "</w>"
    made = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    word = Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(word, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    start, end = vocabulary.index(START), vocabulary.index(END)
    made.post_processor = processors.RobertaProcessing((END, end), (START, start), False, False)
    made.add_special_tokens([START, END])
    made.enable_padding(length=TOKENS, pad_id=end, pad_token=END)
    made.save(str(path))


def text_encoders(sdxl: bool) -> tuple[TextEncoderRecord, ...]:
    """One as wide as the toy takes, or two that are together, the second with pooled embeds."""

    def record(name: str, width: int, pooled: bool) -> TextEncoderRecord:
        outputs = [TensorSpec("prompt_embeds", (1, TOKENS, width), "float32")]
        outputs += [TensorSpec("text_embeds", (1, toy.POOLED), "float32")] if pooled else []
        return TextEncoderRecord(
            graph=f"{name}/text_encoder.graph",
            engines={"toy": f"{name}/text_encoder.toy"},
            inputs=(TensorSpec("input_ids", (1, TOKENS), "int32"), TensorSpec("clip_skip", (1,), "int32")),
            outputs=tuple(outputs),
            name=name,
            tokenizer=f"{name}/tokenizer.json",
            clip_skip=CLIP_SKIP,
        )

    if sdxl:
        return record("text_encoder", 2, False), record("text_encoder_2", toy.DIM - 2, True)
    return (record("text_encoder", toy.DIM, False),)


def vae() -> VaeRecord:
    """For one tile that is the picture."""
    latents, moments = ((1, depth, toy.HEIGHT, toy.WIDTH) for depth in (4, 8))
    picture = (1, 3, HEIGHT, WIDTH)

    def record(name: str, given: TensorSpec, found: TensorSpec) -> GraphRecord:
        return GraphRecord(f"vae/{name}.graph", {"toy": f"vae/{name}.toy"}, (given,), (found,))

    return VaeRecord(
        decoder=record("decoder", TensorSpec("latents", latents, "float32"), TensorSpec("image", picture, "float32")),
        encoder=record("encoder", TensorSpec("image", picture, "float32"), TensorSpec("moments", moments, "float32")),
        scaling_factor=SCALING_FACTOR,
        overlap=0,
        preview=PREVIEW,
    )


def controlnet(manifest: Manifest) -> GraphRecord:
    """It sees the picture at its own size."""
    phase = manifest.phases[0]
    taken = [spec for spec in phase.inputs if spec.name in ("latents", "timestep", "prompt_embeds")]
    image = TensorSpec("control_image", (phase.inputs[0].shape[0], 3, HEIGHT, WIDTH), "float32")
    return GraphRecord(
        graph="controlnet/controlnet.graph",
        engines={"toy": "controlnet/controlnet.toy"},
        inputs=(*taken, image, TensorSpec("conditioning_scale", (1,), "float32")),
        outputs=phase.residuals,
    )


def make(
    folder: Path, kind: toy.Toy | None = None, *, with_text: bool = True, with_vae: bool = True, chunks: int = 1
) -> Path:
    """Writes a bundle of this kind into ``folder`` that has everything; a ControlNet where its phases take one."""
    kind = dataclasses.replace(kind or toy.Toy(), tokens=TOKENS * chunks, reference=False)
    toy.make(folder, kind)
    manifest = Manifest.read(folder)
    encoders = text_encoders(kind.sdxl) if with_text else ()
    changes: dict[str, Any] = {"text_encoders": encoders, "vae": vae() if with_vae else None}
    if kind.control:
        changes["controlnet"] = controlnet(manifest)
    manifest = dataclasses.replace(manifest, **changes)
    weights = dict(manifest.weights)
    for name, record in manifest.others():
        if name == "step":
            continue
        home = Path(record.graph).parent
        (folder / home).mkdir(exist_ok=True)
        (folder / record.graph).write_text("a graph")
        (folder / record.engines["toy"]).write_text(json.dumps({"network": name.removeprefix("vae_")}))
        write(folder / home / "weights.safetensors", {"none": np.zeros(1, np.float32)})
        weights[home.name] = f"{home.name}/weights.safetensors"
    for encoder in encoders:
        tokenizer(folder / encoder.tokenizer)
    toy.seal(folder, dataclasses.replace(manifest, weights=weights))
    return folder


def add_samplers(folder: Path, **recipe: Any) -> Path:
    """Adds samplers that web UIs know, and words to the recipe; toy tables have the timesteps of ``Uniform``."""
    manifest = Manifest.read(folder)
    tables = {name: toy.table(name) for name in ("euler", "dpmpp_2m", "dpmpp_2m_karras", "ddim")}
    tables["dpmpp_2m_karras"] = dataclasses.replace(tables["dpmpp_2m_karras"], origin=KARRAS)
    total = len(tables["ddim"].timesteps)
    eta = EtaTerms(np.full((total, 2), 0.1), np.full(total, 0.5), np.full(total, 0.3))
    tables["ddim"] = dataclasses.replace(tables["ddim"], eta=eta)
    for name, table in tables.items():
        table.write(folder / f"samplers/{name}.safetensors")
    samplers = {**manifest.samplers, **{name: f"samplers/{name}.safetensors" for name in tables}}
    toy.seal(folder, dataclasses.replace(manifest, samplers=samplers, recipe={**manifest.recipe, **recipe}))
    return folder
