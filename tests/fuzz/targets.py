"""What is done with a mutated bundle: it is opened, listed, drawn with and proven, as commands and servers do it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import toy
import toy_pictures
import toy_reference

from hidiff_runtime import check
from hidiff_runtime.cli import info
from hidiff_runtime.errors import EngineError
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.pipeline.pipeline import Pipeline

PROMPT, NEGATIVE = "A lighthouse at dusk, gulls over the breakers", "fog"
SEED, STEPS, GUIDANCE = 7, 3, 5.0


class Unproven(Exception):  # noqa: N818 - an outcome
    """The bundle opens, and its own proof fails: nobody is told that it is whole."""


class BundleTarget:
    """A bundle of a kind.

    Args:
        options: that it is opened with.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def play(self, folder: Path) -> dict[str, np.ndarray]:
        """Does everything; returns a picture for each sampler.

        Nothing is left to the bundle's defaults, which may say what they like: sampler, steps, guidance and its
        rescale, negative prompt and seed are all given.

        Raises:
            HidiffError: the bundle was refused.
            Unproven: what was drawn is not what the bundle's own samples prove.
        """
        _list(folder)
        with Pipeline.open(folder, **self._options) as pipeline:
            manifest = pipeline.bundle.manifest
            given: dict[str, Any] = {"seed": SEED, "steps": STEPS}
            if manifest.guidance:
                given |= {"negative_prompt": NEGATIVE, "guidance_scale": GUIDANCE, "guidance_rescale": 0.0}
            drawn = {}
            for sampler in manifest.samplers:
                made = pipeline([PROMPT] * manifest.batch, sampler=sampler, **given)
                drawn[sampler] = np.stack([np.asarray(image) for image in made])
            report = check(pipeline.bundle)
        if not report.ok:
            raise Unproven(next(str(verdict) for verdict in report.verdicts if not verdict.ok))
        return drawn


def _list(folder: Path) -> None:
    """What `hidiff-run info` and `hidiff-export inspect` print."""
    from hidiff_export.cli.inspect import bundle_summary, print_bundle

    with contextlib.redirect_stdout(io.StringIO()):
        for as_json in (False, True):
            info.run(argparse.Namespace(folder=folder, allow_links=(), json=as_json))
            print_bundle(bundle_summary(folder), as_json=as_json)


def make_toy(folder: Path) -> Path:
    """Writes the toy with everything: SDXL's two text encoders, a VAE, samples of all, and two samplers."""
    kind = toy.Toy(sdxl=True)
    toy_pictures.make(folder, kind)
    manifest = Manifest.read(folder)
    recipe = {"family": "sdxl", "source": "random:0", "name": "toy", "width": 1024, "height": 1024, "steps": [3]}
    samplers = {name: path for name, path in manifest.samplers.items() if name != "second"}
    toy.seal(folder, dataclasses.replace(manifest, samplers=samplers, recipe=recipe))
    toy_reference.record(folder, kind)
    return folder


class ToyBackend(toy_pictures.Backend):
    """The toy's, which refuses engines that are none, as a real one does."""

    def open(self, engine: Path, weights: Mapping[str, Path], record: Any) -> Any:
        try:
            return super().open(engine, weights, record)
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError("This is no engine of the toy.", given=error) from error


def toy_target() -> BundleTarget:
    """The toy, whose engines are numpy."""
    return BundleTarget({"backend": ToyBackend()})


def real_target() -> BundleTarget:
    """Any bundle, with ONNX Runtime on the CPU."""
    return BundleTarget({"backend": "onnxruntime", "device": "cpu", "threads": 1, "resident": "all"})
