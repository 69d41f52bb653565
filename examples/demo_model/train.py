"""Trains the demo model from nothing: `python examples/demo_model/train.py --font … --annotations … --work …`."""

import argparse
import shutil
from pathlib import Path

import torch
from autoencoder import train_autoencoder
from classifier import train_classifier
from decoder import train_decoder
from denoiser import pipeline, train_denoiser
from scenes import Library
from tokens import make_tokenizer
from training import Run


def main() -> None:
    arguments = _arguments()
    run = Run(arguments.work, arguments.seed, torch.device(arguments.device))
    run.work.mkdir(parents=True, exist_ok=True)
    library = Library.read(arguments.font, arguments.annotations)
    tokenizer = make_tokenizer(library, run.work / "tokenizer")
    train_classifier(library, run).cpu().save(run.work / "classifier")
    autoencoder = train_decoder(library, train_autoencoder(library, run), run)
    denoiser, scale = train_denoiser(library, tokenizer, autoencoder, run)
    model = pipeline(denoiser, tokenizer, autoencoder, scale)
    for network in (model.unet, model.vae, model.text_encoder):
        network.to("cpu", torch.float16)
    model.save_pretrained(run.work / "model")
    for name in ("vocab.json", "merges.txt"):  # older releases of transformers read these alone
        shutil.copy(run.work / "tokenizer" / name, run.work / "model/tokenizer")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--annotations", type=Path, required=True, help="CLDR's common/annotations/en.xml")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and sample grids")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="a device of PyTorch: cpu, cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
