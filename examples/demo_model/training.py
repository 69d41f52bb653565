"""The loop that every part of the model is trained by: resumable, with a fixed seed, averaged weights and progress."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one part learns; `batch` counts examples a step, `rate` is the highest learning rate."""

    steps: int
    batch: int
    rate: float
    warmup: int = 200
    average: float = 0.999
    """The decay of the averaged weights, which are those that are kept."""

    def factor(self, step: int) -> float:
        """The share of `rate` at a step: a linear warm-up, then half a cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / max(self.steps - self.warmup, 1))


@dataclass(frozen=True)
class Run:
    """One training run: the folder of its checkpoints and grids, the seed that all follows from, and the device."""

    work: Path
    seed: int
    device: torch.device
    compiled: bool = False
    """Whether networks are compiled first, which takes minutes and makes every step a quarter shorter."""

    def images(self, images):
        """Returns images, or a network that takes them, on the device and in the order that is fast there."""
        return images.to(self.device, memory_format=torch.channels_last)

    def precision(self) -> torch.autocast:
        """Returns the context of bfloat16 where the device multiplies matrices in it, else one that changes nothing."""
        processor = torch.cpu.get_capabilities()
        fast = self.device.type == "cuda" or processor.get("amx_bf16") or processor.get("avx512_bf16")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bool(fast))

    def fast(self, network: nn.Module) -> nn.Module:
        """Returns the network compiled if this run compiles, else itself; either way its weights are the network's."""
        return torch.compile(network) if self.compiled else network  # type: ignore[return-value]


def train(
    name: str,
    network: nn.Module,
    loss_at: Callable[[int], Tensor],
    schedule: Schedule,
    work: Path,
    *,
    report: Callable[[nn.Module, int], None] | None = None,
    every: int = 500,
) -> nn.Module:
    """Trains `network` and returns its averaged copy, going on from the checkpoint in `work` if there is one.

    `loss_at` draws the batch of a step by the step's number and gives its loss; `report` may draw samples.
    """
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=schedule.rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    averaged = AveragedModel(network, multi_avg_fn=_averaging(schedule.average), use_buffers=True)
    checkpoint = work / f"{name}.pt"
    first = _resume(checkpoint, network, averaged, optimizer)
    began, total = time.monotonic(), 0.0
    network.train()
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * schedule.factor(step)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        averaged.update_parameters(network)
        total += loss.item()
        done = step + 1
        if done % 50 == 0:
            pace = (time.monotonic() - began) / (done - first)
            left = (schedule.steps - done) * pace / 60
            print(
                f"{name} {done}/{schedule.steps}  loss {total / 50:.4f}  {pace:.2f} s a step  {left:.0f} min left",
                flush=True,
            )
            total = 0.0
        if done % every == 0 or done == schedule.steps:
            _save(checkpoint, done, network, averaged, optimizer)
            if report is not None:
                report(averaged.module.eval(), done)
    return averaged.module.eval()


def _averaging(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Returns the rule of the averaged weights: of young ones less is kept, so that the first are soon forgotten."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        young = (1 + float(count)) / (10 + float(count))
        get_ema_multi_avg_fn(min(decay, young))(averaged, current, count)

    return update


def _save(path: Path, step: int, network: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    partial = path.with_suffix(".partial")
    state = {"network": network.state_dict(), "averaged": averaged.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"step": step, **state}, partial)
    partial.replace(path)


def _resume(path: Path, network: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
