"""A manifest's sizes are those of its graphs: each field that says otherwise is refused by its name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import toy
import toy_pictures

from hidiff_runtime import BundleError
from hidiff_runtime.format.manifest import Manifest, PhaseRecord, TensorSpec
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule, StepRange

KINDS = {
    "plain": toy.Toy(),
    "unguided": toy.Toy(guidance=False),
    "sdxl": toy.Toy(sdxl=True, batch=2),
    "inpainting": toy.Toy(inpainting=True),
    "control": toy.Toy(control=True),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_bundle_fits(tmp_path: Path, kind: toy.Toy) -> None:
    assert Manifest.read(toy.make(tmp_path / "bundle", kind)).phases


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest.read(toy_pictures.make(tmp_path_factory.mktemp("toy") / "bundle"))


def with_inputs(manifest: Manifest, change: Any, which: slice = slice(None)) -> dict[str, Any]:
    def changed(record: PhaseRecord) -> PhaseRecord:
        return dataclasses.replace(record, inputs=tuple(change(record.inputs)))

    phases = list(manifest.phases)
    phases[which] = map(changed, phases[which])
    return {"phases": tuple(phases), "step": None, "text_encoders": ()}


def resized(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Any:
    return lambda inputs: [TensorSpec(name, shape, dtype) if spec.name == name else spec for spec in inputs]


def without(name: str) -> Any:
    return lambda inputs: [spec for spec in inputs if spec.name != name]


BROKEN: dict[str, tuple[Any, str]] = {
    "width": (
        lambda _: {"width": toy_pictures.WIDTH + 8},
        "latent must be channels, and a latent for each 8 pixels of 72x48",
    ),
    "width between latents": (
        lambda _: {"width": toy_pictures.WIDTH + 1},
        "latent must be channels, and a latent for each 8 pixels of 65x48",
    ),
    "height": (
        lambda _: {"height": toy_pictures.HEIGHT - 8},
        "latent must be channels, and a latent for each 8 pixels of 64x40",
    ),
    "sizes the other way round": (
        lambda _: {"width": toy_pictures.HEIGHT, "height": toy_pictures.WIDTH},
        "latent must be channels, and a latent for each 8 pixels of 48x64",
    ),
    "picture and latents": (
        lambda _: {"width": 128, "latent": (4, toy.HEIGHT, 16), "step": None, "vae": None},
        r"phases\[0\].inputs must hold float32 latents \[2, 4, 6, 16\]",
    ),
    "channels": (
        lambda _: {"latent": (3, 6, 8), "step": None, "vae": None},
        r"inputs must hold float32 latents \[2, 3,",
    ),
    "batch": (lambda _: {"batch": 2, "step": None}, r"inputs must hold float32 latents \[4, 4, 6, 8\]"),
    "guidance": (lambda _: {"guidance": False, "step": None}, r"inputs must hold float32 latents \[1, 4, 6, 8\]"),
    "fewer windowed blocks": (lambda _: {"windowed_blocks": toy.BLOCKS[:2]}, r"inputs must be what a run gives"),
    "no windowed blocks": (lambda _: {"windowed_blocks": ()}, r"inputs must be what a run gives"),
    "no window shifts": (lambda m: with_inputs(m, without("window_shifts")), "inputs must hold window_shifts"),
    "no timestep": (lambda m: with_inputs(m, without("timestep")), "inputs must hold timestep"),
    "no embeddings": (lambda m: with_inputs(m, without("prompt_embeds")), "inputs must hold prompt_embeds"),
    "latents of another size": (
        lambda m: with_inputs(m, resized("latents", (2, 4, 6, 9))),
        r"inputs must hold float32 latents \[2, 4, 6, 8\]",
    ),
    "latents with strange channels": (
        lambda m: with_inputs(m, resized("latents", (2, 7, 6, 8))),
        "must hold float32 latents",
    ),
    "latents of another rank": (lambda m: with_inputs(m, resized("latents", (2, 4))), "must hold float32 latents"),
    "latents of whole numbers": (
        lambda m: with_inputs(m, resized("latents", (2, 4, 6, 8), "int32")),
        "must hold float32 latents",
    ),
    "embeddings of one": (
        lambda m: with_inputs(m, resized("prompt_embeds", (1, 77, 5))),
        "must be what a run gives, one for each picture",
    ),
    "something else": (
        lambda m: with_inputs(m, lambda inputs: [*inputs, TensorSpec("guidance", (1,), "float32")]),
        r"given: 'guidance float32\[1\]'",
    ),
    "a name twice": (lambda m: with_inputs(m, lambda inputs: [*inputs, inputs[0]]), "must have names of their own"),
    "phases that differ": (
        lambda m: with_inputs(m, resized("prompt_embeds", (2, 78, 5)), slice(1, 2)),
        r"phases\[1\].inputs must be those of the first phase",
    ),
    "residuals in a phase without": (
        lambda m: with_inputs(m, lambda inputs: [*inputs, TensorSpec("mid_residual", (2, 2, 3, 3), "float32")]),
        "residuals exactly where the phase takes them",
    ),
    "another output": (
        lambda m: {
            "phases": tuple(dataclasses.replace(one, outputs=(*one.outputs, one.outputs[0])) for one in m.phases)
        },
        r"outputs must be noise_pred",
    ),
    "a phase that is missing": (lambda m: {"phases": m.phases[1:]}, "graph for each phase that the rule reaches"),
    "a rule with another phase": (
        lambda _: {"rule": PhaseRule(StepRange(0, 0.5), StepRange(0.25, 0.75))},
        "graph for each phase that the rule reaches|a phase that the rule never reaches",
    ),
    "tiles of other pixels": (
        lambda m: {"vae": dataclasses.replace(m.vae, decoder=halved(m), encoder=halved_picture(m))},
        r"vae.decoder must have a picture of 8 pixels for each latent",
    ),
}


def halved(manifest: Manifest) -> Any:
    assert manifest.vae is not None
    return dataclasses.replace(manifest.vae.decoder, outputs=(TensorSpec("image", (1, 3, 24, 32), "float32"),))


def halved_picture(manifest: Manifest) -> Any:
    assert manifest.vae is not None
    return dataclasses.replace(manifest.vae.encoder, inputs=(TensorSpec("image", (1, 3, 24, 32), "float32"),))


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_size_that_is_not_the_graphs_is_named(whole: Manifest, change: Any, message: str) -> None:
    odd = dataclasses.replace(whole, **change(whole))
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(odd.to_json())
    assert caught.value.exit_code == 4
    assert re.search(message, str(caught.value)), str(caught.value)


def test_the_sample_is_refused_for_its_change_alone(whole: Manifest) -> None:
    assert Manifest.from_json(whole.to_json()) == whole
    assert whole.phases[0].phase == Phase(PhaseKind.STRIDED_POOLED)
