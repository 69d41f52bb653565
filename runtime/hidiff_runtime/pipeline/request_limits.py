"""What a server takes at most."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hidiff_runtime.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; looked at before any work begins.

    Args:
        prompt_characters: of a prompt, and of a negative prompt.
        image_bytes: of an encoded picture that is sent.
        image_pixels: of that picture once it is decoded.
        steps: denoising steps of a run.
        pictures: runs that one request may ask for at once.

    Raises:
        InputError: one is not a positive whole number.
    """

    prompt_characters: int = 2000
    image_bytes: int = 16 * 2**20
    image_pixels: int = 32 * 2**20
    steps: int = 150
    pictures: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise InputError(
                    f"The limit {field.name} must be a positive whole number.",
                    given=repr(value),
                    advice=f"Leave it out for {field.default}.",
                )
