"""``hidiff-run``: checks, describes and runs a bundle on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hidiff_runtime import __version__
from hidiff_runtime.errors import Cancelled, HidiffError, InputError

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.denoiser import StepInfo
    from hidiff_runtime.manifest import GraphRecord

EXIT_CODES = """exit codes:
  0 done        1 check failed       2 bad option or input   4 bundle broken
  5 backend missing or failing       6 disk                  130 interrupted"""

EXAMPLES = {
    "check": "hidiff-run check bundle --json > check.json",
    "info": "hidiff-run info bundle",
    "denoise": "hidiff-run denoise bundle --embeds prompt.safetensors --steps 20 --guidance 7.5 -o latents.safetensors",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except HidiffError as error:
        _write(f"error: {error}\n", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _write("\ninterrupted\n", sys.stderr)
        return Cancelled.exit_code


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "hidiff-run", description=__doc__.replace("``", "'"), epilog=EXIT_CODES, formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"hidiff-run {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        epilog = f"example:\n  {EXAMPLES[name]}\n\n{EXIT_CODES}"
        command = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=form)
        command.add_argument("folder", metavar="DIR", type=Path, help="the bundle's folder")
        command.set_defaults(command=run)
        return command

    checking = add("check", _check, "replay the bundle's reference samples on this machine's engines")
    checking.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    checking.add_argument("--calls-only", action="store_true", help="leave out the whole runs")
    _add_opening(checking)
    describing = add("info", _info, "show what is in the bundle, without opening an engine")
    describing.add_argument("--json", action="store_true", help="print the manifest as JSON")
    _add_denoising(add("denoise", _denoise, "denoise prompt embeddings to latents"))
    return parser


def _add_opening(command: argparse.ArgumentParser) -> None:
    command.add_argument("--backend", metavar="NAME", help="whose engines to run (default: the first this machine has)")
    command.add_argument(
        "--verify", choices=("hash", "size"), default="hash", help="how to check files (default: hash)"
    )
    command.add_argument(
        "--resident", choices=("current", "all"), default="current", help="engines kept open (default: current)"
    )
    command.add_argument(
        "--prefetch", action="store_true", help="open the next phase's engine while the current one runs"
    )
    command.add_argument(
        "--loop",
        choices=("auto", "host", "device"),
        default="auto",
        help="where latents stay between steps (default: auto, on any device that is not the host itself)",
    )
    command.add_argument(
        "--option",
        metavar="NAME=VALUE",
        type=_named_value,
        action="append",
        default=[],
        help="an option of the backend, such as threads=8 or device=cpu; may be given again",
    )


def _named_value(text: str) -> tuple[str, str | int | bool]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.isdecimal() else value


def _add_denoising(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--embeds",
        metavar="FILE",
        type=Path,
        help="safetensors with prompt_embeds, negative_prompt_embeds and whatever else the bundle takes, float32",
    )
    source.add_argument("--random-embeds", metavar="SEED", type=int, help="random embeddings, to try a bundle out")
    command.add_argument("--steps", type=int, required=True, help="denoising steps")
    command.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale; needed with guidance")
    command.add_argument("--seed", type=int, default=0, help="of latents, window shifts and noise (default: 0)")
    command.add_argument("--sampler", metavar="NAME", help="one of the bundle's (default: its own)")
    command.add_argument("--eta", type=float, default=0.0, help="of DDIM (default: 0)")
    command.add_argument(
        "--control-image",
        metavar="FILE",
        type=Path,
        help="safetensors with control_image, float32 from 0 to 1, for a bundle with a ControlNet",
    )
    command.add_argument(
        "--conditioning-scale", type=float, default=1.0, metavar="SCALE", help="of the ControlNet (default: 1)"
    )
    command.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="safetensors to write")
    _add_opening(command)


def _check(options: argparse.Namespace) -> int:
    from hidiff_runtime.replay import check, read_samples

    count = 0

    def show(_: object) -> None:
        nonlocal count
        count += 1
        _progress(f"{count} of {total} compared")

    with _open(options) as bundle:
        samples = read_samples(bundle)
        replayed = [] if options.calls_only else samples.runs
        total = len(samples.calls) + sum(len(run.trajectory) + 1 for run in replayed)
        _progress(f"0 of {total} compared")
        report = check(bundle, runs=not options.calls_only, progress=show)
    _progress("", end="\n" if sys.stderr.isatty() else "")
    _write((json.dumps(report.to_dict(), indent=2) if options.json else report.render()) + "\n", sys.stdout)
    return report.exit_code


def _info(options: argparse.Namespace) -> int:
    from hidiff_runtime.manifest import Manifest

    manifest = Manifest.read(options.folder)
    if options.json:
        _write(json.dumps(manifest.to_json(), indent=2) + "\n", sys.stdout)
        return 0
    total = sum(file.size for file in manifest.files.values())
    lines = [
        f"{manifest.family} {manifest.task}, {manifest.width}x{manifest.height} pixels, batch {manifest.batch}, "
        f"{manifest.precision}, guidance {'on' if manifest.guidance else 'off'}",
        f"  files     {len(manifest.files)}, {total / 2**20:.1f} MiB",
        f"  samplers  {', '.join(sorted(manifest.samplers))} (default {manifest.default_sampler})",
        f"  steps     {manifest.steps[0]} to {manifest.steps[-1]} ({len(manifest.steps)} tabulated)",
        f"  reference {manifest.reference or 'none'}",
        f"  built by  {', '.join(f'{tool} {version}' for tool, version in manifest.tools.items())}",
        "  graphs",
    ]
    graphs: list[tuple[str, GraphRecord]] = [(record.phase.name, record) for record in manifest.phases]
    graphs += manifest.others()
    for name, record in graphs:
        lines.append(f"    {name:24} engines: {', '.join(record.engines)}")
        lines += [f"      {spec}" for spec in record.inputs]
        lines += [f"      -> {spec}" for spec in record.outputs]
    _write("\n".join(lines) + "\n", sys.stdout)
    return 0


def _denoise(options: argparse.Namespace) -> int:
    from hidiff_runtime import safetensors
    from hidiff_runtime.embeddings import random_embeddings, read_control_image, read_embeddings

    if not options.output.absolute().parent.is_dir():
        raise InputError("The output's folder does not exist.", given=options.output, advice="Make it first.")
    with _open(options) as bundle:
        if options.embeds is None:
            given, residuals = random_embeddings(bundle.manifest, options.random_embeds)
        else:
            given, residuals = read_embeddings(bundle.manifest, options.embeds)
        if options.control_image is not None:
            given |= read_control_image(options.control_image)
        latents = bundle.denoiser().denoise(
            **given,
            steps=options.steps,
            guidance_scale=options.guidance,
            seed=options.seed,
            sampler=options.sampler,
            eta=options.eta,
            conditioning_scale=options.conditioning_scale,
            control=(lambda _: residuals) if residuals else None,
            callback=_show_step,
        )
        sampler = options.sampler or bundle.manifest.default_sampler
    facts = {"steps": str(options.steps), "seed": str(options.seed), "sampler": sampler}
    safetensors.write(options.output, {"latents": latents}, facts)
    _write(f"{options.output}: latents float32{list(latents.shape)}\n", sys.stdout)
    return 0


def _open(options: argparse.Namespace) -> Bundle:
    from hidiff_runtime.bundle import open as open_bundle

    opening = {name: getattr(options, name) for name in ("verify", "backend", "resident", "prefetch", "loop")}
    taken = [name for name, _ in options.option if name in (*opening, "folder", "preload")]
    if taken:
        raise InputError("This is no option of a backend.", given=taken[0], advice=f"Use --{taken[0]} if there is one.")
    return open_bundle(options.folder, **opening, **dict(options.option))


def _show_step(info: StepInfo) -> None:
    last = info.step + 1 == info.steps
    text = f"step {info.step + 1}/{info.steps}  {info.phase.name}  {info.seconds:.3f} s"
    _progress(text, end="\n" if last or not sys.stderr.isatty() else "")


def _progress(text: str, end: str = "") -> None:
    """Writes over the last line of a terminal; elsewhere writes lines that end."""
    if sys.stderr.isatty():
        _write(f"\r\x1b[K{text}{end}", sys.stderr)
    elif end:
        _write(f"{text}{end}", sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    stream.write(text)
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
