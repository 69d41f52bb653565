"""Trains the demo model: `python examples/demo_model/train.py --font … --annotations … --work …`.

From nothing, or with `--start` on from a published one, of which the denoiser and the text encoder learn further.
"""

import argparse
import shutil
from pathlib import Path

import torch
from autoencoder import train_autoencoder
from classifier import train_classifier
from decoder import train_decoder
from denoiser import pipeline, train_denoiser
from diffusers import AutoencoderKL, StableDiffusionPipeline
from scenes import Library
from tokens import make_tokenizer
from training import Run


def main() -> None:
    arguments = _arguments()
    run = Run(arguments.work, arguments.seed, torch.device(arguments.device), arguments.compile)
    run.work.mkdir(parents=True, exist_ok=True)
    library = Library.read(arguments.font, arguments.annotations)
    trained = None if arguments.start is None else start_from(arguments.start, run)
    tokenizer = make_tokenizer(library, run.work / "tokenizer")
    autoencoder = first_parts(library, run) if trained is None else trained.vae
    denoiser, scale = train_denoiser(library, tokenizer, autoencoder, run, trained)
    # A tokenizer keeps how it was called last, padding above all; a new one is saved as it is.
    model = pipeline(denoiser, make_tokenizer(library, run.work / "tokenizer"), autoencoder, scale)
    for network in (model.unet, model.vae, model.text_encoder):
        network.to("cpu", torch.float16)
    model.save_pretrained(run.work / "model")
    for name in ("vocab.json", "merges.txt"):  # older releases of transformers read these alone
        shutil.copy(run.work / "tokenizer" / name, run.work / "model/tokenizer")


def first_parts(library: Library, run: Run) -> AutoencoderKL:
    """Trains what the denoiser is not part of: the classifier, which is saved, and the autoencoder, which is given."""
    train_classifier(library, run).cpu().save(run.work / "classifier")
    return train_decoder(library, train_autoencoder(library, run), run)


def start_from(folder: Path, run: Run) -> StableDiffusionPipeline:
    """Returns the model in `folder/model`, in float32; its tokenizer and the classifier beside it become this run's."""
    shutil.copytree(folder / "classifier", run.work / "classifier", dirs_exist_ok=True)
    shutil.copytree(folder / "model/tokenizer", run.work / "tokenizer", dirs_exist_ok=True)
    return StableDiffusionPipeline.from_pretrained(folder / "model", dtype=torch.float32)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--annotations", type=Path, required=True, help="CLDR's common/annotations/en.xml")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and sample grids")
    parser.add_argument("--start", type=Path, help="a published model to go on from: hidiff_export/demo_model")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser before it is trained")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="a device of PyTorch: cpu, cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
