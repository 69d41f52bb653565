"""Evaluations of all contenders, taken in turn, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hidiff_export.benchmarking.contender_process import (
    Competitor,
    ContenderFailed,
    ContenderProcess,
    contender_process,
)
from hidiff_export.benchmarking.peers import REFERENCES
from hidiff_export.benchmarking.timings import ContenderTimes, PhaseTimes, signal_to_noise
from hidiff_export.benchmarking.workload import TIMESTEPS, Workload, inputs_file

Stepped = Callable[[str], object]
"""Called before each evaluation and each start, with what begins."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def thread_environment(threads: int) -> dict[str, str]:
    """Returns the variables that libraries read how many threads to start from."""
    return dict.fromkeys(_THREADS, str(threads))


def steps_of(competitors: int, phases: int, rounds: int) -> int:
    """Returns how often `measure` tells that something begins, where nobody fails."""
    return competitors * (1 + phases * (1 + rounds))


def measure(
    competitors: Sequence[Competitor],
    work: Workload,
    rounds: int,
    threads: int,
    stepped: Stepped,
) -> tuple[ContenderTimes, ...]:
    """Evaluates every phase of a run ``rounds`` times with each contender, one contender at a time.

    Contenders are started one after another and stay until the end, each in a process of its own. One that fails is out
    of the running from there on.

    Args:
        competitors: in the order that they are shown.
        work: what they compute.
        rounds: evaluations of each phase, beside one before that is not counted.
        threads: of an evaluation.
        stepped: told what begins.

    Returns:
        What was measured, in the order of the competitors.
    """
    with TemporaryDirectory(prefix="hidiff-bench-") as folder, ExitStack() as stack:
        work.write_inputs(Path(folder))
        runners = [_Runner(one, Path(folder), place, stack, threads) for place, one in enumerate(competitors)]
        for runner in runners:
            stepped(f"{runner.name}: start")
            runner.start()
        for planned in work.phases:
            taking = [runner for runner in runners if planned in work.phases_of(bundle=runner.times.competitor.bundle)]
            for runner in taking:
                stepped(f"{runner.name}: {planned.phase.name}, the first")
                runner.open(planned.phase.name)
            for index in range(rounds):
                first = index % max(1, len(taking))
                for runner in (*taking[first:], *taking[:first]):
                    stepped(f"{runner.name}: {planned.phase.name}, round {index + 1} of {rounds}")
                    runner.evaluate(planned.phase.name, index)
                _compare(taking, planned.phase.name)
    return tuple(runner.times for runner in runners)


def profile(
    competitors: Sequence[Competitor],
    measured: Sequence[ContenderTimes],
    work: Workload,
    threads: int,
    stepped: Stepped,
) -> None:
    """Adds the operators' times of one further evaluation in each phase, taken one contender after another.

    Args:
        competitors: those measured, set up to profile.
        measured: what was measured of them; those that failed are passed over.
        work: what they compute.
        threads: of an evaluation.
        stepped: told what begins.
    """
    with TemporaryDirectory(prefix="hidiff-bench-") as folder:
        work.write_inputs(Path(folder))
        for one, times in zip(competitors, measured, strict=True):
            if times.failure:
                continue
            with ExitStack() as stack:
                runner = _Runner(one, Path(folder), 0, stack, threads)
                runner.start()
                for planned in work.phases_of(bundle=one.bundle):
                    stepped(f"{one.name}: operators of {planned.phase.name}")
                    runner.open(planned.phase.name)
                    times.phases[planned.phase.name].operators = runner.operators(planned.phase.name)
                times.profile_failure = runner.times.failure


class _Runner:
    """A contender in the running, or out of it: then nothing more is asked of it."""

    def __init__(self, one: Competitor, folder: Path, number: int, stack: ExitStack, threads: int) -> None:
        self.times = ContenderTimes(one)
        self.name = one.name
        self._folder = folder
        self._output = folder / f"{number}.npy"
        # What its libraries leave in temporary files goes away with the folder, for it is killed in the end.
        self._environment = {**thread_environment(threads), "TMPDIR": str(folder)}
        self._closing = stack.enter_context(ExitStack())
        self._process: ContenderProcess | None = None

    @property
    def output(self) -> Path | None:
        """What its last evaluation gave; None where it failed, or gives nothing."""
        return self._output if self._process is not None and self._output.exists() else None

    def start(self) -> None:
        one = self.times.competitor
        with self._watched():
            self._process = self._closing.enter_context(contender_process(one, self._environment))
            self.times.started = self._asked(kind=one.kind, settings=dict(one.settings))["seconds"]

    def open(self, phase: str) -> None:
        """Gets ready for a phase, and evaluates it once."""
        with self._watched():
            times = self.times.phases[phase] = PhaseTimes()
            times.opened = self._asked(do="open", phase=phase)["seconds"]
            times.first = self._evaluated(phase, 0)["seconds"]

    def evaluate(self, phase: str, index: int) -> None:
        with self._watched():
            answer = self._evaluated(phase, index % len(TIMESTEPS))
            times = self.times.phases[phase]
            times.wall.append(answer["seconds"])
            times.processor.append(answer["processor"])

    def operators(self, phase: str) -> dict[str, float]:
        with self._watched():
            found: dict[str, float] = self._asked(do="operators", inputs=self._inputs(phase, 0))["operators"]
            return found
        return {}

    def _evaluated(self, phase: str, index: int) -> dict[str, Any]:
        return self._asked(do="evaluate", inputs=self._inputs(phase, index), output=str(self._output))

    def _inputs(self, phase: str, index: int) -> str:
        return str(inputs_file(self._folder, phase, index))

    def _asked(self, **request: Any) -> dict[str, Any]:
        if self._process is None:
            raise ContenderFailed(self.times.failure)
        answer = self._process.ask(**request)
        self.times.memory = self._process.memory
        return answer

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Takes a contender that fails out of the running, with its reason."""
        try:
            yield
        except ContenderFailed as failed:
            self.times.failure = str(failed)
            self._process = None
            self._closing.close()  # others need the memory


def _compare(runners: Sequence[_Runner], phase: str) -> None:
    """Adds how far each output of this round is from what PyTorch gave in float32, with HiDiffusion or without."""
    for hidiffusion, reference in REFERENCES.items():
        alike = [one for one in runners if one.output and one.times.competitor.hidiffusion is hidiffusion]
        expected = next((one.output for one in alike if one.name == reference), None)
        if expected is None:
            continue
        exact = np.load(expected)
        for one in alike:
            if one.name != reference and one.output is not None:
                one.times.phases[phase].decibels.append(signal_to_noise(exact, np.load(one.output)))
