"""The record as Markdown.

python -m benchmarks.gpu.table OUT.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import faults, goals, results
from benchmarks.gpu.record import DONE, FAILED, REHEARSAL, Record

Row = Sequence[str]
_FIGURE = 1e9


def markdown(data: Mapping[str, Any]) -> str:
    """The whole record: machine, goals, parity, phases, runs, builds, tests, and what is missing with its reason."""
    parts = [_head(data), _goals(data), _parity(data), _phases(data), _runs(data), _builds(data), _tests(data)]
    return "\n\n".join(part for part in (*parts, _missing(data)) if part) + "\n"


def _head(data: Mapping[str, Any]) -> str:
    lines = ["# Measured on a GPU" if data["kind"] != REHEARSAL else f"# {REHEARSAL[0].upper()}{REHEARSAL[1:]}", ""]
    if data["kind"] == REHEARSAL:
        lines += ["Tiny width, on the CPU: the figures show that everything runs, and nothing else.", ""]
    lines.append(f"Commit {data['commit'] or 'unknown'}.")
    hidden = ("job", "part", "status", "what")
    for result in (result for result in data["results"] if result["part"] == "environment"):
        told = ", ".join(f"{key} {value}" for key, value in result.items() if key not in hidden)
        lines.append(f"{result['what'].capitalize() if result['what'].islower() else result['what']}: {told}.")
    return "\n".join(lines)


def _goals(data: Mapping[str, Any]) -> str:
    rows = []
    for goal in goals(data):
        measured = [f"{goal['figure']:g}", f"{goal['bound']:g}"] if "figure" in goal else ["", ""]
        about = (goal["case"], goal["by"], goal.get("phase", "all"))
        rows.append([goal["goal"], *about, *measured, goal["verdict"]])
    return _table("Goals", ("goal", "case", "by", "phase", "figure", "bound", "verdict"), rows, right=(4, 5))


def _parity(data: Mapping[str, Any]) -> str:
    rows = []
    for result in results(data):
        if result["part"] not in ("reference", "parity") or "bound_db" not in result:
            continue
        value = result.get("psnr_db", result.get("snr_db"))
        who = " ".join(word for word in (result.get("by", "PyTorch"), result.get("candidate", "")) if word)
        sign = "<" if result["control"] else "≥"
        where = (result["case"], result["precision"], result["what"], result.get("phase", "all"))
        verdict = "ok" if result["ok"] else f"FAILED {result.get('fault', '')}".strip()
        rows.append([*where, who, _decibels(value), f"{sign} {result['bound_db']:g}", verdict])
    head = ("case", "precision", "compared", "phase", "candidate", "dB", "bound", "verdict")
    note = "Against float32 PyTorch on the same weights. A bound with < is a negative control's: it must not pass."
    return _table("Parity", head, rows, note, right=(5, 6))


def _phases(data: Mapping[str, Any]) -> str:
    rows = []
    for result in results(data, part="speed", what="phase"):
        spread = f"{result['p25_ms']:.2f} to {result['p75_ms']:.2f}"
        ratio = f"{result['to_compiled']:.3f}" if "to_compiled" in result else ""
        contender = result["contender"] if result["contender"] != "engine" else f"**{result['by']}**"
        figures = (f"{result['median_ms']:.2f}", spread, str(result["n"]), ratio)
        rows.append([result["case"], result["phase"], result["by"], contender, *figures, result["clock"]])
    head = ("case", "phase", "beside", "contender", "median, ms", "middle half, ms", "n", "to compiled", "clock")
    note = "Contenders of one process take turns in random order; *to compiled* is the median of each round's ratio."
    return _table("Milliseconds of one evaluation", head, rows, note, right=(4, 5, 6, 7))


def _runs(data: Mapping[str, Any]) -> str:
    rows = []
    for result in results(data, part="run", what="run"):
        allocated = result["peak_allocated_bytes"]
        memory = (_giga(result["peak_bytes"]), "" if allocated is None else _giga(allocated), result["peak_of"])
        seconds = (f"{result['median_s']:.2f}", f"{result['min_s']:.2f} to {result['max_s']:.2f}", str(result["n"]))
        rows.append([result["case"], result["by"], str(result["steps"]), *seconds, *memory])
    head = ("case", "by", "steps", "median, s", "range, s", "n", "peak, GB", "torch allocated, GB", "peak of")
    return _table("Whole runs, without the decoder", head, rows, right=(2, 3, 4, 5, 6, 7))


def _builds(data: Mapping[str, Any]) -> str:
    rows = []
    for result in results(data, part="build", what="bundle"):
        seconds = ", ".join(f"{stage} {took:.0f}" for stage, took in result["seconds_of_stages"].items() if took)
        sizes = (_giga(result["bundle_bytes"]), _giga(result["weights_bytes"]))
        rows.append([result["case"], result["precision"], result["by"], seconds, *sizes, result["backend"]])
    head = ("case", "precision", "by", "seconds of the stages", "bundle, GB", "weights, GB", "backend")
    return _table("Builds", head, rows, right=(4, 5))


def _tests(data: Mapping[str, Any]) -> str:
    found = results(data, part="tests")
    if not found:
        return ""
    lines = [f"## Tests that need a device\n\n{found[0]['passed']} passed, {found[0]['failed']} failed, "]
    lines.append(f"{found[0]['skipped']} skipped.")
    lines += [f"\n- {name}: {text}" for name, text in found[0]["not_passed"].items()]
    return "".join(lines)


def _missing(data: Mapping[str, Any]) -> str:
    lines = [
        f"- {name}: {job['status']}: {_one_line(job['reason'])}"
        for name, job in data["jobs"].items()
        if job["status"] not in (DONE, FAILED)
    ]
    lines += [
        f"- {result['job']}, {', '.join(_named(result))}: {result['status']}: {_one_line(result['reason'])}"
        for result in data["results"]
        if result["status"] not in (DONE, FAILED) and result["part"] != "environment"
    ]
    wrong = [f"- {_one_line(fault)}" for fault in faults(data)]
    parts = [("## Not measured", lines), ("## Not in order", wrong)]
    return "\n\n".join("\n\n".join((title, "\n".join(items))) for title, items in parts if items)


def _named(result: Mapping[str, Any]) -> Iterator[str]:
    return (str(result[key]) for key in ("what", "phase", "candidate", "contender") if key in result)


def _table(title: str, head: Row, rows: Iterable[Row], note: str = "", right: Sequence[int] = ()) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    rule = "| " + " | ".join("---:" if column in right else "---" for column in range(len(head))) + " |"
    return "\n".join([f"## {title}", "", *([note, ""] if note else []), f"| {' | '.join(head)} |", rule, *lines])


def _decibels(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float | int) else str(value or "none")


def _giga(size: float) -> str:
    return f"{size / _FIGURE:.2f}" if size >= _FIGURE / 100 else f"{size / _FIGURE:.4f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]


def main() -> None:
    """Prints the tables of a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    sys.stdout.write(markdown(Record(parser.parse_args().record).read()))


if __name__ == "__main__":
    main()
