"""Prompts through the runtime's tokenizers and real engines against diffusers' ``encode_prompt``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from hidiff_export.checkpoints.component import Component
from hidiff_export.checkpoints.load import build, load
from hidiff_export.checkpoints.tokenizer import END, START, tokenizer_json
from hidiff_export.checkpoints.weight_store import WeightStore
from hidiff_export.engines.onnxruntime import lower
from hidiff_export.families.family import Family, Task, Width, text_encoder_configs
from hidiff_export.families.graph_io import most_skipped, text_encoder_inputs, text_encoder_outputs
from hidiff_export.graph.portable import write_graph
from hidiff_export.modules.text_encoder import TextEncoderModule
from hidiff_export.recipe.field_types import Precision
from hidiff_export.reference.tolerances import TOLERANCES, Boundary
from hidiff_runtime.backends import get
from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.bundle import open as open_bundle
from hidiff_runtime.format.specs import TensorSpec, TextEncoderRecord
from hidiff_runtime.format.tokenizer import Tokenizer
from hidiff_runtime.pipeline.prompt_encoding import TruncationWarning, encode_prompts
from hidiff_runtime.verification.comparison import compare

BOUND = TOLERANCES[Boundary.TEXT, "float32"]
START_ID, END_ID, COMMA = 512, 513, 256 + 11
PROMPTS = ["a cat, 2 dogs", "Señor 猫 😀!", "a" * 75]
NEGATIVE = ["", "blurry, bad", "text"]
LONG = "the quick brown fox jumps over the lazy dog; " * 4
PADDING = {
    (Family.SD15, "text_encoder"): END,
    (Family.SD21, "text_encoder"): "!",
    (Family.SDXL, "text_encoder"): END,
    (Family.SDXL, "text_encoder_2"): "!",
}


@dataclass
class TextBundle:
    """As much of a bundle as prompts need: a fabricated checkpoint's text encoders on ONNX Runtime."""

    root: Path
    family: Family
    models: dict[str, Any] = field(default_factory=dict)
    records: list[TextEncoderRecord] = field(default_factory=list)
    guidance: bool = True
    chunks: int = 1

    def __post_init__(self) -> None:
        for name in text_encoder_configs(self.family, Width.TINY):
            self._add(Component(name))

    def _add(self, component: Component) -> None:
        folder, penultimate = self.root / component.value, self.family.is_sdxl
        folder.mkdir(parents=True)
        config, tensors, _ = load(component, "random:0", self.family, Task.TEXT_TO_IMAGE, Width.TINY)
        store = WeightStore.write(tensors, folder / "weights.safetensors", Precision.FLOAT32)
        model = build(component, config, store.state_dict())
        write_graph(TextEncoderModule(model, penultimate=penultimate), 1, store, folder / "graph.onnx")
        lower(folder / "graph.onnx", folder / "graph.onnxruntime.onnx")
        content = tokenizer_json("random:0", component, self.family, Width.TINY)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        if not hasattr(model, "text_model"):
            vars(model)["text_model"] = model  # where diffusers' clip_skip looks for the last normalization
        self.models[component.value] = model
        self.records.append(
            TextEncoderRecord(
                f"{component.value}/graph.onnx",
                {"onnxruntime": f"{component.value}/graph.onnxruntime.onnx"},
                text_encoder_inputs(),
                text_encoder_outputs(config, pooled=component is Component.TEXT_ENCODER_2),
                name=component.value,
                tokenizer=f"{component.value}/tokenizer.json",
                clip_skip=most_skipped(config, penultimate=penultimate),
            )
        )

    @property
    def manifest(self) -> Any:
        embeds = TensorSpec("prompt_embeds", (2, 77 * self.chunks, 32), "float32")
        phase = SimpleNamespace(input=lambda name: embeds if name == "prompt_embeds" else None)
        return SimpleNamespace(
            text_encoders=tuple(self.records),
            guidance=self.guidance,
            phases=(phase,),
            force_zeros_for_empty_prompt=True,
        )

    def file(self, name: str) -> Path:
        return self.root / name

    def tokenizer(self, record: TextEncoderRecord) -> Tokenizer:
        return Tokenizer.kept(self.file(record.tokenizer), record.places)

    @contextmanager
    def network(self, name: str) -> Iterator[Session]:
        record = next(record for record in self.records if record.name == name)
        weights = {name: self.root / name / "weights.safetensors"}
        with ExitStack() as stack:
            device = stack.enter_context(get("onnxruntime").device({"threads": 1}))
            yield stack.enter_context(device.open(self.root / record.engines["onnxruntime"], weights, record))

    def encode(self, prompts: list[str], negative: list[str] | None = None, **options: Any) -> dict[str, Any]:
        bundle: Any = self
        return encode_prompts(bundle, prompts, negative, **options)[0]

    def diffusers(self, padding: dict[str, str] | None = None) -> Any:
        """The family's pipeline with nothing but what encodes prompts, transformers' own tokenizers among it."""
        parts: dict[str, Any] = dict.fromkeys(("vae", "unet", "scheduler"))
        for name, model in self.models.items():
            pad = (padding or {}).get(name, PADDING[self.family, name])
            parts |= {name: model, name.replace("text_encoder", "tokenizer"): tokenizer(pad)}
        if self.family.is_sdxl:
            return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts)

    def expected(
        self, prompts: list[str], negative: list[str] | None, clip_skip: int | None, **changed: Any
    ) -> dict[str, Any]:
        """What diffusers gives, under the runtime's names."""
        pipe = self.diffusers(**changed)
        names = ["prompt_embeds", "negative_prompt_embeds"]
        call: dict[str, Any] = {"prompt": prompts, "negative_prompt": negative, "clip_skip": clip_skip}
        if self.family.is_sdxl:
            names += ["text_embeds", "negative_text_embeds"]
        else:
            call["num_images_per_prompt"] = 1
        with torch.no_grad():
            found = pipe.encode_prompt(device="cpu", do_classifier_free_guidance=True, **call)
        return {name: tensor.numpy() for name, tensor in zip(names, found, strict=True)}


def tokenizer(padding: str) -> Any:
    """transformers' own, of single bytes: the first two times 256 tokens of CLIP's vocabulary, then start and end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(code) for code in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    names = [*characters, *(f"{character}</w>" for character in characters), START, END]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=padding, model_max_length=77)


def verdicts(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, bool]:
    """Whether each array is within the bound."""
    assert found.keys() == wanted.keys()
    return {name: compare(Boundary.TEXT.value, wanted[name], found[name], BOUND).ok for name in found}


@pytest.fixture(scope="module", params=[Family.SD15, Family.SD21, Family.SDXL], ids=lambda family: family.value)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    return TextBundle(tmp_path_factory.mktemp("text"), request.param)


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_prompt_embeds_are_those_of_encode_prompt(bundle: TextBundle, clip_skip: int | None) -> None:
    found = bundle.encode(PROMPTS, NEGATIVE, clip_skip=clip_skip or 0)
    wanted = bundle.expected(PROMPTS, NEGATIVE, clip_skip)
    assert found["prompt_embeds"].shape == (3, 77, 32)
    assert all(verdicts(found, wanted).values())


def test_without_a_negative_prompt(bundle: TextBundle) -> None:
    found, wanted = bundle.encode(PROMPTS), bundle.expected(PROMPTS, None, None)
    if bundle.family.is_sdxl:
        assert not wanted["negative_prompt_embeds"].any()
        for name in ("negative_prompt_embeds", "negative_text_embeds"):
            assert np.array_equal(found.pop(name), wanted.pop(name))
    assert all(verdicts(found, wanted).values())


def test_a_cut_prompt(bundle: TextBundle) -> None:
    with pytest.warns(TruncationWarning, match="fox jumps over the lazy dog; '"):
        found = bundle.encode([LONG])
    wanted = bundle.expected([LONG], [""], None)
    assert verdicts(found, wanted)["prompt_embeds"]


@pytest.mark.parametrize("wrong", [1, 2])
def test_another_clip_skip_is_seen(bundle: TextBundle, wrong: int) -> None:
    found, wanted = bundle.encode(PROMPTS, NEGATIVE, clip_skip=wrong), bundle.expected(PROMPTS, NEGATIVE, 0)
    same = verdicts(found, wanted)
    assert not same.pop("prompt_embeds")
    assert all(same.values())


def test_another_padding_is_seen(bundle: TextBundle) -> None:
    other = {name: "!" if PADDING[bundle.family, name] == END else END for name in bundle.models}
    wanted = bundle.expected(PROMPTS, NEGATIVE, None, padding=other)
    same = verdicts(bundle.encode(PROMPTS, NEGATIVE), wanted)
    assert not same["prompt_embeds"]
    assert not same["negative_prompt_embeds"]


@pytest.mark.parametrize("bundle", [Family.SDXL], ids=["sdxl"], indirect=True)
def test_another_end_is_seen(bundle: TextBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the published eos_token_id, 2, the end is the highest id; with another, the first token of that id."""
    found = bundle.encode(PROMPTS, NEGATIVE)
    monkeypatch.setattr(bundle.models["text_encoder_2"].text_model, "eos_token_id", END_ID)
    assert all(verdicts(found, bundle.expected(PROMPTS, NEGATIVE, None)).values())
    monkeypatch.setattr(bundle.models["text_encoder_2"].text_model, "eos_token_id", COMMA)
    same = verdicts(found, bundle.expected(PROMPTS, NEGATIVE, None))
    assert same["prompt_embeds"]
    assert not same["text_embeds"]


def test_chunks_are_each_a_prompt_of_their_own(bundle: TextBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed by hand: the tokens without start and end in rows of 75, each row with a start and an end again."""
    monkeypatch.setattr(bundle, "chunks", 3)
    found = bundle.encode([LONG], ["bad"], long_prompt="chunk", clip_skip=1)
    assert found["prompt_embeds"].shape == (1, 231, 32)
    wanted: dict[str, list[torch.Tensor]] = {"prompt_embeds": [], "negative_prompt_embeds": []}
    for name, model in bundle.models.items():
        theirs = tokenizer(PADDING[bundle.family, name])
        for key, text, skip in (("prompt_embeds", LONG, 1), ("negative_prompt_embeds", "bad", 0)):
            words = theirs(text).input_ids[1:-1]
            rows = [words[:75], words[75:150], words[150:]]
            whole = [[START_ID, *row, END_ID, *[theirs.pad_token_id] * (75 - len(row))] for row in rows]
            with torch.no_grad():
                states = model(torch.tensor(whole), output_hidden_states=True).hidden_states
                layer = states[-(skip + 2)] if bundle.family.is_sdxl else model.final_layer_norm(states[-(skip + 1)])
            wanted[key].append(layer.reshape(1, 231, -1))
    for key, parts in wanted.items():
        assert verdicts({key: found[key]}, {key: torch.cat(parts, dim=-1).numpy()})[key]


@pytest.mark.parametrize("bundle", [Family.SD15], ids=["sd15"], indirect=True)
def test_a_bundles_own_engines(sd15_bundle: Path, bundle: TextBundle) -> None:
    """The same through an opened bundle."""
    with open_bundle(sd15_bundle, verify="size") as opened:
        found, cut = encode_prompts(opened, PROMPTS, NEGATIVE, clip_skip=1)
    assert cut == {}
    assert all(verdicts(found, bundle.expected(PROMPTS, NEGATIVE, 1)).values())
