"""Arguments that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from hidiff_export.errors import InputError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

recipe_argument = click.argument("recipe", metavar="RECIPE")
"""A recipe's path or the name of a shipped one."""

set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a value of the recipe, e.g. --set width=1536 or --set hidiffusion.windows=false. Repeatable.",
)

lora_option = click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="PATH[:SCALE]",
    help="Fuse this LoRA into the weights (a .safetensors file of kohya's trainer, LyCORIS, OneTrainer, diffusers or "
    "PEFT); scale 1 where none is given. Repeatable; in place of those that the recipe names.",
)

allow_links_option = click.option(
    "--allow-links",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="A folder that symbolic links in the bundle may lead into; the store of a Hugging Face cache, of DVC or of "
    "git-annex that the bundle lies in needs none. Repeatable.",
)


def drawing_options(count: int) -> Callable[[Decorated], Decorated]:
    """Returns the decorator of what `quality` and `showcase` draw with: ``count`` is how many prompts by default."""
    options = (
        click.option(
            "--count", type=click.IntRange(1), default=count, show_default=True, help="At most so many prompts."
        ),
        click.option(
            "--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the first; counted up from it."
        ),
        click.option("--steps", type=click.IntRange(1), help="Of each picture, for all."),
        click.option("--sampler", help="One that all bundles have."),
        click.option("--guidance-scale", type=float, help="For all."),
    )

    def decorate(command: Decorated) -> Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


SHARED_SETTINGS = ("steps", "sampler", "guidance_scale")
"""Those of `drawing_options` that are settings of a picture."""


def lora_setting(loras: Sequence[str]) -> tuple[str, ...]:
    """Returns the values of ``--lora`` as a setting of the recipe; nothing where there are none.

    Raises:
        InputError: a scale is no number.
    """
    if not loras:
        return ()
    return (f"lora={json.dumps(lora_values(loras))}",)


def lora_values(loras: Sequence[str]) -> list[dict[str, object]]:
    """Returns the values of ``--lora`` as recipes hold them; errors as for `lora_setting`."""
    return [_lora(text) for text in loras]


def _lora(text: str) -> dict[str, object]:
    """Returns a LoRA's path, and as its scale what follows the last colon, unless that is a part of the path."""
    path, colon, scale = text.rpartition(":")
    if not colon or scale.endswith(".safetensors"):
        return {"path": text}
    try:
        return {"path": path, "scale": float(scale)}
    except ValueError:
        raise InputError(
            "The scale of a LoRA is not a number.", given=text, advice="Write --lora style.safetensors:0.8."
        ) from None
