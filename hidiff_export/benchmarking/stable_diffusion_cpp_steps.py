"""stable-diffusion.cpp through its Python package, without HiDiffusion: the steps of a picture that is never finished.

The library draws whole pictures and has no call for one evaluation. So a thread draws one in a thousand steps and is
held at the end of each, until the next is asked for. Inputs are the library's own, and there is no noise to compare.
Nothing is imported here but what the package brings itself.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

_STEPS = 1000
_PROMPT = "a lighthouse on a rock in the sea at dusk"
_GUIDANCE = 7.0
_TYPES = {"float32": "f32", "bfloat16": "bf16"}
_PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
"""Folders of a pipeline and the file in each, as diffusers writes them and the library reads them."""


def evaluator(_kind: str, settings: Mapping[str, Any]) -> StableDiffusionCppSteps:
    """Returns the library with the weights of a bundle, whose UNet is the settings' ``store``."""
    return StableDiffusionCppSteps(settings)


def _place(weights: Path, path: Path) -> None:
    """Puts a network's weights where the library looks: a text encoder's under the names that it knows."""
    if not path.parent.name.startswith("text_encoder"):
        path.symlink_to(weights.resolve())
        return
    with weights.open("rb") as source, path.open("wb") as copied:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        renamed = {_renamed(name): value for name, value in header.items()}
        text = json.dumps(renamed).encode()
        copied.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, copied)


def _renamed(name: str) -> str:
    """Returns the name of a tensor as transformers wrote it before its version 5."""
    own = name.startswith(("encoder.", "embeddings.", "final_layer_norm."))
    return f"text_model.{name}" if own else name


class StableDiffusionCppSteps:
    """A picture in the making."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from stable_diffusion_cpp import StableDiffusion

        self._settings = settings
        with TemporaryDirectory(prefix="hidiff-bench-") as folder:
            stores = Path(settings["store"]).parents[1]
            for part, name in _PARTS.items():
                if (weights := stores / part / "weights.safetensors").is_file():
                    (Path(folder) / part).mkdir()
                    _place(weights, Path(folder) / part / name)
            self._library = StableDiffusion(
                model_path=folder,
                wtype=_TYPES[settings["precision"]],
                n_threads=settings["threads"],
                diffusion_flash_attn=True,  # without it the scores of a large picture take gigabytes
                vae_decode_only=True,
                verbose=False,
            )
        self._asked, self._reached = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def open(self, phase: str) -> None:
        """Does nothing: there is one kind of evaluation."""

    def evaluate(self, inputs: Mapping[str, NDArray[Any]]) -> None:  # noqa: ARG002 - it has inputs of its own
        """Lets the picture take one step; the first time it also encodes the prompt."""
        if not self._thread.is_alive():
            self._thread.start()
        self._asked.release()
        self._reached.acquire()
        if self._failure:
            raise RuntimeError(f"it drew no picture: {self._failure[0]}") from self._failure[0]

    def operators(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, float]:  # noqa: ARG002 - as above
        """Raises RuntimeError: the library profiles none."""
        raise RuntimeError("stable-diffusion.cpp profiles no operators")

    def _draw(self) -> None:
        latents = self._settings["shapes"]["latents"]
        guided = self._settings["guidance"]
        try:
            self._asked.acquire()
            self._library.generate_image(
                _PROMPT,
                width=latents[3] * 8,
                height=latents[2] * 8,
                batch_count=latents[0] // (2 if guided else 1),
                cfg_scale=_GUIDANCE if guided else 1.0,
                sample_method="euler",
                sample_steps=_STEPS,
                progress_callback=self._stepped,
            )
            raise RuntimeError("the library finished a picture of a thousand steps")
        except BaseException as error:  # handed to the thread that waits for it
            self._failure.append(error)
            self._reached.release()

    def _stepped(self, step: int, steps: int, _seconds: float) -> None:
        """Holds the picture after a step; the library tells of what it loads in the same way."""
        if steps == _STEPS and step > 0:
            self._reached.release()
            self._asked.acquire()
