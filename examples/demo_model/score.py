"""Scores the model in the package on prompts that it was never trained on: `python examples/demo_model/score.py`."""

import sys

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from scenes import BACKGROUNDS, COLORS
from torch import Tensor

from hidiff_export.demo_model import demo_classifier, demo_model, demo_prompts
from hidiff_export.quality.classifier import Classifier
from hidiff_export.quality.scoring import subject_of

BATCH = 20
EDGE = 4
"""Rows and columns at each side, in pixels, that show the background."""


def main() -> None:
    prompts = demo_prompts().read_text("utf-8").splitlines()
    pictures = draw(prompts)
    classifier = Classifier.load(demo_classifier())
    with torch.no_grad():
        scores = classifier(pictures)
    asked = [classifier.labels.index(str(subject_of(prompt, classifier.labels))) for prompt in prompts]
    places = np.array([int((row > row[subject]).sum()) for row, subject in zip(scores, asked, strict=True)])
    right = [name in prompt for name, prompt in zip(backgrounds(pictures), prompts, strict=True)]
    print(
        f"{len(prompts)} prompts: background {np.mean(right):.1%}; subject first {np.mean(places == 0):.1%}, among the"
    )
    print(
        f"first five {np.mean(places < 5):.1%}, median place {int(np.median(places)) + 1} of {len(classifier.labels)}"
    )


def draw(prompts: list[str]) -> Tensor:
    """Returns diffusers' pictures of the prompts, float32 from 0 to 1, count x 3 x side x side."""
    pipe = StableDiffusionPipeline.from_pretrained(demo_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for at in range(0, len(prompts), BATCH):
        settings = {"num_inference_steps": 15, "guidance_scale": 4.0, "output_type": "pt"}
        drawn.append(pipe(prompts[at : at + BATCH], generator=torch.Generator().manual_seed(at), **settings).images)
        print(f"drawn {at + len(drawn[-1])}/{len(prompts)}", file=sys.stderr, flush=True)
    return torch.cat(drawn).float()


def backgrounds(pictures: Tensor) -> list[str]:
    """Returns the plain background whose color each picture's edge comes nearest to, in the words of prompts."""
    sides = (pictures[:, :, :EDGE], pictures[:, :, -EDGE:], pictures[..., :EDGE], pictures[..., -EDGE:])
    edges = 255 * torch.cat([side.flatten(2) for side in sides], 2).median(2).values
    apart = (edges[:, None] - torch.tensor(list(COLORS.values()))).norm(dim=2).argmin(1)
    return [BACKGROUNDS[index] for index in apart]


if __name__ == "__main__":
    main()
