"""The classifier that scores pictures: it learns the subjects of scenes at every size, sharp, blurred and noisy."""

import numpy as np
import torch
from autoencoder import SIDE
from scenes import Library, draw_scene, render
from torch import Tensor
from torch.nn import functional
from training import Run, Schedule, train

from hidiff_export.quality.classifier import Classifier

SCHEDULE = Schedule(steps=4_000, batch=64, rate=2e-3)


def train_classifier(library: Library, run: Run) -> Classifier:
    """Trains on scenes with one subject, by cross entropy."""
    torch.manual_seed(run.seed)
    network = run.images(Classifier(library.names))

    def loss_at(step: int) -> Tensor:
        pictures, labels = _examples(library, (run.seed, 30, step), SCHEDULE.batch)
        scores = network(run.images(_worsened(pictures, step)))
        return functional.cross_entropy(scores, labels.to(run.device), label_smoothing=0.05)

    def report(network: torch.nn.Module, step: int) -> None:
        pictures, labels = _examples(library, (run.seed, 31), 512)
        with torch.no_grad():
            right = (network(run.images(pictures)).argmax(1).cpu() == labels).float().mean().item()
        print(f"classifier {step}: {100 * right:.1f} % of unseen scenes named", flush=True)

    trained = train("classifier", network, loss_at, SCHEDULE, run.work, report=report)
    assert isinstance(trained, Classifier)
    return trained


def _examples(library: Library, seed: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    pictures, labels, number = [], [], 0
    while len(pictures) < count:
        scene = draw_scene(library, (*seed, number))
        if scene.second is None:
            pictures.append(render(library, scene, SIDE, (*seed, number)))
            labels.append(scene.subject)
        number += 1
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels)


def _worsened(pictures: Tensor, step: int) -> Tensor:
    """Blurs half of them as a small autoencoder would, and shifts colors and adds noise to all."""
    generator = torch.Generator().manual_seed(step)
    side = int(torch.randint(20, 64, (1,), generator=generator))
    half = len(pictures) // 2
    blurred = functional.interpolate(pictures[:half], (side, side), mode="bilinear", antialias=True)
    blurred = functional.interpolate(blurred, pictures.shape[-2:], mode="bilinear")
    pictures = torch.cat([blurred, pictures[half:]])
    shade = 0.06 * torch.randn((len(pictures), 3, 1, 1), generator=generator)
    return pictures + shade + 0.03 * torch.randn(pictures.shape, generator=generator)
