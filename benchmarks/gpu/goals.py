"""The goals, from what was measured: each reached or missed with its figures, or not measured and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu.cases import BACKENDS, PRECISIONS
from benchmarks.gpu.record import DONE, REHEARSAL

PHASE_TO_COMPILED = 1.0
RUN_SPEED_UP = 1.5
MEMORY_TO_WEIGHTS = 1.2
_ENGINE, _COMPILED, _PUBLISHED = "engine", "compiled PhaseUNet", "eager published package"
_RUN_CASE = "sdxl-2048"

Data = Mapping[str, Any]


def goals(data: Data) -> list[dict[str, Any]]:
    """Every goal for every case, phase and backend that has a job; what a rehearsal measured decides none.

    Args:
        data: the record.
    """
    pairs = sorted({(job["case"], job["by"]) for job in data["jobs"].values() if job.get("by") in BACKENDS})
    made: list[dict[str, Any]] = []
    for case, backend in pairs:
        made += _phases(data, case, backend)
        made += _run(data, case, backend)
        made += _memory(data, case, backend)
    if data["kind"] == REHEARSAL:
        made = [goal if goal["verdict"] == "not measured" else {**goal, "verdict": "rehearsed"} for goal in made]
    return made


def results(data: Data, **wanted: Any) -> list[dict[str, Any]]:
    """The finished results that have these values."""
    return [
        result
        for result in data["results"]
        if result["status"] == DONE and all(result.get(key) == value for key, value in wanted.items())
    ]


def _phases(data: Data, case: str, backend: str) -> Iterator[dict[str, Any]]:
    name = "no phase slower than torch.compile of the same phase"
    where = {"part": "speed", "case": case, "precision": PRECISIONS[0], "by": backend}
    found = results(data, **where, what="phase", contender=_ENGINE)
    if not found:
        yield _absent(data, name, where)
    for engine in found:
        named = {"goal": name, "case": case, "by": backend, "phase": engine["phase"]}
        ratio = engine.get("to_compiled")
        compiled = results(data, **where, what="phase", contender=_COMPILED, phase=engine["phase"])
        if ratio is None or not compiled:
            yield {**named, "verdict": "not measured", "reason": "torch.compile has no figure for this phase"}
            continue
        figures = {"engine_ms": engine["median_ms"], "compiled_ms": compiled[0]["median_ms"]}
        yield _judged(named, ratio, PHASE_TO_COMPILED, ratio <= PHASE_TO_COMPILED, figures)


def _run(data: Data, case: str, backend: str) -> Iterator[dict[str, Any]]:
    if case != _RUN_CASE:
        return
    name = f"whole run at least {RUN_SPEED_UP} times as fast as PyTorch eager with the published package"
    where = {"part": "run", "case": case, "precision": PRECISIONS[0]}
    ours, theirs = (results(data, **where, by=by, what="run") for by in (backend, _PUBLISHED))
    if not ours or not theirs:
        yield _absent(data, name, {**where, "by": _PUBLISHED if ours else backend})
        return
    figures = {"engines_s": ours[0]["median_s"], "published_s": theirs[0]["median_s"]}
    ratio = figures["published_s"] / figures["engines_s"]
    named = {"goal": name, "case": case, "by": backend}
    yield _judged(named, round(ratio, 3), RUN_SPEED_UP, ratio >= RUN_SPEED_UP, figures)


def _memory(data: Data, case: str, backend: str) -> Iterator[dict[str, Any]]:
    name = f"device memory at most {MEMORY_TO_WEIGHTS} times the weights plus the largest activation"
    where = {"case": case, "precision": PRECISIONS[0]}
    run = results(data, **where, part="run", by=backend, what="run")
    bundle = results(data, **where, part="build", by=backend, what="bundle")
    activations = results(data, **where, part="speed", what="activation")
    if not run or not bundle or not activations:
        by = backend if not run or not bundle else "pytorch"
        part = "run" if not run else "build" if not bundle else "speed"
        yield _absent(data, name, {**where, "part": part, "by": by})
        return
    figures = {
        "peak_bytes": run[0]["peak_bytes"],
        "weights_bytes": bundle[0]["weights_bytes"],
        "largest_activation_bytes": max(activation["largest_bytes"] for activation in activations),
    }
    allowed = MEMORY_TO_WEIGHTS * figures["weights_bytes"] + figures["largest_activation_bytes"]
    used = figures["peak_bytes"] / allowed
    yield _judged({"goal": name, "case": case, "by": backend}, round(used, 3), 1.0, used <= 1, figures)


def _judged(named: Data, figure: float, bound: float, reached: bool, figures: Data) -> dict[str, Any]:
    verdict = "reached" if reached else "missed"
    return {**named, "verdict": verdict, "figure": figure, "bound": bound, **figures}


def _absent(data: Data, goal: str, where: Data) -> dict[str, Any]:
    """A goal without figures, and the reason that its job gave."""
    job: Data = next((job for job in data["jobs"].values() if _of(job, where)), {})
    told = [result["reason"] for result in data["results"] if _of(result, where) and result.get("reason")]
    reason = job.get("reason") or next(iter(told), "") or job.get("status", "its job was not run")
    return {"goal": goal, "case": where["case"], "by": where["by"], "verdict": "not measured", "reason": reason}


def _of(result: Data, where: Data) -> bool:
    return all(result.get(key) == value for key, value in where.items())


def faults(data: Data) -> Sequence[str]:
    """What did not end as it should: jobs and results that failed, bounds that were missed, controls that passed."""
    jobs = [f"{name}: {job['reason']}" for name, job in data["jobs"].items() if job["status"] == "failed"]
    return jobs + [
        f"{result['job']}: {_what(result)}: {result.get('reason') or result.get('fault') or 'beyond its bound'}"
        for result in data["results"]
        if result["status"] == "failed" or result.get("ok") is False
    ]


def _what(result: Data) -> str:
    words = (result.get(key, "") for key in ("what", "phase", "candidate", "contender"))
    return ", ".join(word for word in words if word)
