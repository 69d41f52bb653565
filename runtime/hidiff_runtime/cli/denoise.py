"""`hidiff-run denoise`: prompt embeddings in, latents out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidiff_runtime.cli.shared_options import add_field, add_opening, open_bundle
from hidiff_runtime.console.printing import progress, write
from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.request_fields import SETTINGS

if TYPE_CHECKING:
    from hidiff_runtime.denoising.denoiser import StepInfo

SUMMARY = "denoise prompt embeddings to latents"
EXAMPLE = "denoise bundle --embeds prompt.safetensors --steps 20 --guidance 7.5 -o latents.safetensors"


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--embeds",
        metavar="FILE",
        type=Path,
        help="safetensors with prompt_embeds, negative_prompt_embeds and whatever else the bundle takes, float32",
    )
    source.add_argument("--random-embeds", metavar="SEED", type=int, help="random embeddings, to try a bundle out")
    command.add_argument("--steps", type=int, required=True, help="denoising steps")
    command.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale; needed with guidance")
    for name in ("guidance_rescale", "full_run", "sampler", "eta", "conditioning_scale"):
        add_field(command, SETTINGS[name], default=SETTINGS[name].default)
    command.add_argument("--seed", type=int, default=0, help="of latents, window shifts and noise (default: 0)")
    command.add_argument(
        "--control-image",
        metavar="FILE",
        type=Path,
        help="safetensors with control_image, float32 from 0 to 1, for a bundle with a ControlNet",
    )
    command.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="safetensors to write")
    add_opening(command)


def run(options: argparse.Namespace) -> int:
    """Denoises and writes the latents."""
    from hidiff_runtime.denoising.controlnet import fixed_control
    from hidiff_runtime.denoising.embedding_files import random_embeddings, read_control_image, read_embeddings
    from hidiff_runtime.format import safetensors

    if not options.output.absolute().parent.is_dir():
        raise InputError("The output's folder does not exist.", given=options.output, advice="Make it first.")
    with open_bundle(options) as bundle:
        if options.embeds is None:
            given, residuals = random_embeddings(bundle.manifest, options.random_embeds)
        else:
            given, residuals = read_embeddings(bundle.manifest, options.embeds)
        if options.control_image is not None:
            given |= read_control_image(options.control_image)
        arguments: dict[str, Any] = {**given}
        latents = bundle.denoiser().denoise(
            **arguments,
            steps=options.steps,
            guidance_scale=options.guidance,
            guidance_rescale=options.guidance_rescale,
            full_run=options.full_run,
            seed=options.seed,
            sampler=options.sampler,
            eta=options.eta,
            conditioning_scale=options.conditioning_scale,
            control=fixed_control(residuals) if residuals else None,
            callback=_show_step,
        )
        sampler = options.sampler or bundle.manifest.default_sampler
    facts = {"steps": str(options.steps), "seed": str(options.seed), "sampler": sampler}
    safetensors.write(options.output, {"latents": latents}, facts)
    write(f"{options.output}: latents float32{list(latents.shape)}\n", sys.stdout)
    return 0


def _show_step(info: StepInfo) -> None:
    last = info.step + 1 == info.steps
    text = f"step {info.step + 1}/{info.steps}  {info.phase.name}  {info.seconds:.3f} s"
    progress(text, end="\n" if last or not sys.stderr.isatty() else "")
