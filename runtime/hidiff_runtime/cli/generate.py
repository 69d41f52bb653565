"""`hidiff-run generate`: prompts in, pictures out."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidiff_runtime.cli.shared_options import (
    FIELD_OPTIONS,
    add_field,
    add_group,
    add_opening,
    add_size,
    open_bundle,
    sides,
)
from hidiff_runtime.console.printing import write
from hidiff_runtime.errors import InputError
from hidiff_runtime.pipeline.request_fields import PICTURES, PROMPT, Settings, Size
from hidiff_runtime.text_safety import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from hidiff_runtime.cli.output_paths import OutputPaths
    from hidiff_runtime.cli.prompt_options import Prompt
    from hidiff_runtime.pipeline.pipeline import Pipeline
    from hidiff_runtime.pipeline.request import Request

Reader = Callable[[Path, str, "Size | None"], "Image"]
"""Gives the picture of a file, called so, at a size or as it is."""

SUMMARY = "make pictures from prompts"
EXAMPLE = 'generate bundle -p "a lighthouse at dusk" --seed 1 -o lighthouse.png'


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    _add_request(command)
    _add_results(command)
    add_opening(command)


def _add_request(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("prompts")
    source = group.add_mutually_exclusive_group()
    add_field(source, PROMPT, action="append", help=f"{PROMPT.help}; may be given again")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='prompts, by the ending: .txt (one a line), .jsonl ({"prompt": "a lighthouse", "seed": 3}), .json, '
        ".csv, .tsv, .yaml, .parquet",
    )
    group.add_argument(
        "--like",
        metavar="FILE",
        type=Path,
        help="draw with the prompt and the settings that this picture tells of itself; options given beside it win",
    )
    add_group(group, "prompts")
    run_group = command.add_argument_group("run")
    add_size(run_group)
    add_group(run_group, "run")
    add_group(command.add_argument_group("pictures to start from (PNG, JPEG, WebP)"), "pictures")


def _add_results(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("results")
    group.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        required=True,
        help="PNG to write; for several pictures a folder/, or a pattern such as out-{index}.png or out-{seed}.png",
    )
    group.add_argument("--sheet", metavar="FILE", type=Path, help="also write all pictures on one, with their prompts")
    group.add_argument("--previews", metavar="FILE", type=Path, help="also write how each run went, a row a run")
    group.add_argument("--force", action="store_true", help="replace files that are there")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show the first prompts as they would be drawn, write nothing",
    )
    group.add_argument("--json", action="store_true", help="print what was made (or would be) as JSON")


def run(options: argparse.Namespace) -> int:
    """Makes the pictures, or says what would be made."""
    from hidiff_runtime.cli.dry_run import describe_runs
    from hidiff_runtime.cli.output_paths import find_output_paths
    from hidiff_runtime.cli.prompt_options import Prompt, read_prompts
    from hidiff_runtime.pipeline.image_parameters import read_parameters
    from hidiff_runtime.pipeline.image_settings import Likeness, settings_like
    from hidiff_runtime.pipeline.pipeline import Pipeline
    from hidiff_runtime.pipeline.request import late_start

    asked: Sequence[Prompt] = (
        [Prompt(text) for text in options.prompt or ()] if options.prompts is None else read_prompts(options.prompts)
    )
    told = None if options.like is None else read_parameters(options.like)
    if told is None and not asked:
        raise InputError("There is no prompt.", advice="Give -p TEXT, --prompts FILE or --like PICTURE.")
    with open_bundle(options, **({"verify": "size"} if options.dry_run else {})) as bundle:
        pipeline = Pipeline(bundle)
        given = {field.name: getattr(options, field.name) for field in FIELD_OPTIONS}
        # Pictures as paths.
        settings = {name: value for name, value in given.items() if value is not None} | sides(options)
        like = Likeness("", settings, ())
        if told is not None:
            like = settings_like(bundle, told, settings, with_prompt=not asked)
        _warn(like.warnings)
        asked = asked or [Prompt(like.prompt)]
        requests = _requests(pipeline, options, asked, like.settings)
        late = dict.fromkeys(late_start(bundle, request) for request in requests)
        found = (*filter(None, late), *_drawn_later(options, asked))
        _warn(found)
        warned = (*like.warnings, *found)
        seeds = [request.settings.seed for request in requests for _ in request.prompts]
        many = options.prompts is not None or len(seeds) > 1
        extra = (options.sheet, options.previews)
        outputs = find_output_paths(options.output, seeds, many=many, extra=extra, force=options.force)
        if options.dry_run:
            described = describe_runs(bundle, asked, requests, outputs, as_json=options.json, warned=warned)
            write(f"{described}\n", sys.stdout)
            return 0
        _generate(pipeline, requests, outputs, options, warned)
    return 0


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        write(f"warning: {printable(line)}\n", sys.stderr)  # a picture's text may hold what terminals obey


def _requests(
    pipeline: Pipeline, options: argparse.Namespace, asked: Sequence[Prompt], shared: Mapping[str, Any]
) -> list[Request]:
    """Returns every prompt with its settings, checked; the row at fault is named."""
    from secrets import randbelow

    from hidiff_runtime.cli.prompt_options import located
    from hidiff_runtime.pipeline.request_values import DRAWN, RANDOM

    found, read = [], _reader()
    for prompt in asked:
        with located(options.prompts, prompt.where):
            # Not the seed of a picture to draw like: -1 was its very seed.
            drawn = {"seed": randbelow(DRAWN)} if prompt.settings.get("seed", options.seed) == RANDOM else {}
            settings = {**shared, **prompt.settings, **drawn}
            bucket = pipeline.bundle.sized(settings.get("width"), settings.get("height")).manifest
            found.append(pipeline.request(prompt.text, _merged(settings, read, (bucket.width, bucket.height))))
    return found


def _drawn_later(options: argparse.Namespace, asked: Sequence[Prompt]) -> tuple[str, ...]:
    """Returns what a dry run has to say of random seeds, which it cannot know."""
    from hidiff_runtime.pipeline.request_values import RANDOM

    if not options.dry_run or all(prompt.settings.get("seed", options.seed) != RANDOM for prompt in asked):
        return ()
    return ("seed -1 is drawn anew when pictures are made: the seed shown in its place is an example",)


def _reader() -> Reader:
    """Reads pictures, each file once; those that are resized are kept at the size drawn, since there may be many."""
    from hidiff_runtime.pipeline.image_processing import fitted_pictures, read_picture

    def read(path: Path, called: str, size: Size | None) -> Image:
        found = read_picture(path, called)
        return found if size is None else fitted_pictures(found, size, called, resize=True)[0]

    return functools.cache(read)


def _merged(asked: Mapping[str, Any], read: Reader, size: Size) -> Settings:
    given = dict(asked)
    for name in PICTURES:
        if given.get(name) is not None:
            given[name] = read(given[name], name.replace("_", " "), size if given.get("resize") else None)
    return Settings(**given)


def _generate(
    pipeline: Pipeline,
    requests: Sequence[Request],
    outputs: OutputPaths,
    options: argparse.Namespace,
    warned: Sequence[str],
) -> None:
    """Makes and writes each run's pictures as they are done."""
    from hidiff_runtime.console.progress import RunProgress
    from hidiff_runtime.pipeline.contact_sheet import Cell, contact_sheet
    from hidiff_runtime.pipeline.image_metadata import save_png
    from hidiff_runtime.pipeline.prompt_encoding import TruncationWarning

    runs = pipeline.batches(requests)
    shown = RunProgress([run[0].steps for run in runs], options.previews is not None)
    ends = set(accumulate(map(len, runs)))
    cells: list[Cell] = []
    told: list[dict[str, Any]] = []
    paths = iter(outputs.pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # told in the end, with the pictures
        for done, result in enumerate(pipeline.run(requests, callback=shown.step, progress=shown.tile), start=1):
            shown.run += done in ends
            outputs.make_folder()  # not before: a prompt may be refused when it is encoded
            settings = result.request.settings
            for image, prompt in zip(result.images, result.request.prompts, strict=True):
                path = next(paths)
                save_png(image, path)
                if options.sheet is not None:
                    image.thumbnail((1024, 1024))
                    cells.append(Cell(image, f"seed {settings.seed}: {prompt}"))
                facts = json.loads(image.info["hidiff"])
                told.append({"file": str(path), "seconds": round(result.seconds, 3), **facts})
                if not options.json:
                    _tell(path, told[-1])
    if options.sheet is not None:
        save_png(contact_sheet(cells), options.sheet)
    if options.previews is not None:
        save_png(shown.sheet(), options.previews)
    sheets = [str(path) for path in outputs.extra]
    if options.json:
        write(json.dumps({"pictures": told, "sheets": sheets, "warnings": warned}, indent=2) + "\n", sys.stdout)
    elif sheets:
        write("\n".join(sheets) + "\n", sys.stdout)


def _tell(path: Path, facts: dict[str, Any]) -> None:
    size = f"{facts['width']}x{facts['height']}"
    text = f"{path}: {size}, seed {facts['seed']}, {facts['steps']} steps, {facts['seconds']:.1f} s\n"
    write(text, sys.stdout)
    for cut in facts.get("cut", ()):
        write(f"cut from the prompt, which is over 75 tokens: {cut!r}\n", sys.stderr)
