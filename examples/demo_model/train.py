"""Trains the demo model from nothing: `python examples/demo_model/train.py --font … --annotations … --work …`."""

import argparse
from pathlib import Path

import torch
from autoencoder import train_autoencoder
from classifier import train_classifier
from denoiser import pipeline, train_denoiser
from scenes import Library
from tokens import make_tokenizer


def main() -> None:
    arguments = _arguments()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    library = Library.read(arguments.font, arguments.annotations)
    tokenizer = make_tokenizer(library, work / "tokenizer")
    train_classifier(library, work, arguments.seed).save(work / "classifier")
    autoencoder = train_autoencoder(library, work, arguments.seed)
    denoiser, scale = train_denoiser(library, tokenizer, autoencoder, work, arguments.seed)
    pipeline(denoiser, tokenizer, autoencoder, scale).to(torch.float16).save_pretrained(work / "model")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--annotations", type=Path, required=True, help="CLDR's common/annotations/en.xml")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and sample grids")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
