"""Runs that start in the middle, of schedulers of a few lines: which evaluations differ, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hidiff_export.errors import ExportError
from hidiff_export.scheduler_tables.linear_probe import noise_weights, respond
from hidiff_export.scheduler_tables.partial_runs import drop_unread, probe_starts


class Remembering:
    """``sample - output / 2``, and from each of the last ``memory`` outputs an eighth, once there are as many."""

    config: dict[str, object] = {}  # noqa: RUF012 - as diffusers has it

    def __init__(self, memory: int, order: int = 1) -> None:
        self.memory, self.order = memory, order
        self.outputs: list[torch.Tensor | None] = [None] * memory
        self.timesteps = torch.tensor([])
        self.begun = 0

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.arange(steps * self.order - (self.order - 1), 0, -1)

    def set_begin_index(self, index: int) -> None:
        self.begun = index

    def scale_model_input(self, sample: torch.Tensor, _timestep: object) -> torch.Tensor:
        return sample

    def add_noise(self, image: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return image / 2 + noise * timesteps

    def step(self, output: torch.Tensor, _timestep: object, sample: torch.Tensor, return_dict: Any) -> Any:
        assert return_dict is False
        known = [each for each in self.outputs if each is not None]
        if len(known) == self.memory:
            sample = sample + sum(known) / 8
        self.outputs = [*self.outputs, output][1:]
        return (sample - output / 2,)


def starts_of(scheduler: Any, steps: int) -> Any:
    return probe_starts(
        scheduler, steps, drop_unread(respond(type(scheduler)(scheduler.memory, scheduler.order), steps))
    )


@pytest.mark.parametrize("memory", [0, 1, 3, 9])
def test_as_many_evaluations_differ_as_outputs_are_remembered(memory: int) -> None:
    starts = starts_of(Remembering(memory), 15)
    if memory == 0:
        assert starts == {}
        return
    assert list(starts) == list(range(1, 15))
    for start, run in starts.items():
        assert len(run) == min(memory, 15 - start)
        for response in run:
            assert response.rows[0, :3].tolist() == [1, -0.5, 0]
            assert not response.rows[0, 3:].any()
        assert [response.timestep for response in run] == [15 - start - number for number in range(len(run))]


def test_starts_are_at_whole_steps() -> None:
    assert list(starts_of(Remembering(1, order=2), 4)) == [2, 4, 6]
    assert starts_of(Remembering(1), 1) == {}


def test_a_start_that_comes_to_another_state_is_refused() -> None:
    class Strange(Remembering):
        def step(self, output: torch.Tensor, timestep: object, sample: torch.Tensor, return_dict: Any) -> Any:
            result = super().step(output, timestep, sample, return_dict)
            if self.begun == 6:
                self.outputs = [None] * self.memory
            return result

    with pytest.raises(ExportError, match="does not come to what the whole run remembers"):
        starts_of(Strange(1), 8)


def test_the_weights_of_picture_and_noise() -> None:
    np.testing.assert_allclose(noise_weights(Remembering(0), 3), [[0.5, 3], [0.5, 2], [0.5, 1]])


@pytest.mark.parametrize("change", [lambda noised: noised + 1, lambda noised: noised.clamp(-50, 50)])
def test_noise_that_is_not_added_is_refused(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    honest = Remembering.add_noise
    monkeypatch.setattr(Remembering, "add_noise", lambda *given: change(honest(*given)))
    with pytest.raises(ExportError, match="not a linear combination"):
        noise_weights(Remembering(0), 3)
