"""Scenes to learn from: an emoji on a background, with the prompt that describes it.

Glyphs are Noto Color Emoji's bitmaps, names and keywords Unicode CLDR's English annotations. A scene follows from its
number alone, so that a training run which is resumed sees the scenes that it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUBJECTS = Path(__file__).with_name("subjects.txt")
FONT_SIZE = 109
"""The only size, in pixels, of the font's bitmaps."""
HELD_OUT_SHARE = 10
"""One in how many pairs of subject and background is never trained on."""


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


COLORS = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (135, 135, 135),
    "red": (205, 45, 45),
    "orange": (240, 145, 45),
    "yellow": (245, 215, 80),
    "green": (75, 160, 75),
    "blue": (60, 105, 205),
    "purple": (130, 75, 170),
    "pink": (245, 165, 195),
    "brown": (120, 80, 50),
    "teal": (45, 150, 150),
}
"""Plain backgrounds: "on a red background"."""
PLACES = {
    "in a meadow": ((150, 205, 245), (95, 175, 75)),
    "at the beach": ((120, 200, 245), (235, 215, 160)),
    "in the snow": ((190, 205, 225), (250, 250, 252)),
    "at sunset": ((250, 150, 80), (95, 55, 110)),
    "at night": ((20, 25, 60), (40, 40, 50)),
    "on the sea": ((170, 220, 245), (35, 95, 165)),
}
"""Backgrounds of a sky and a ground, by their colors."""
BACKGROUNDS = (*(f"on {_article(color)} background" for color in COLORS), *PLACES)
POSITIONS = {
    "in the center": (0.5, 0.5),
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
    "in the top left corner": (0.3, 0.3),
    "in the top right corner": (0.7, 0.3),
    "in the bottom left corner": (0.3, 0.7),
    "in the bottom right corner": (0.7, 0.7),
}
"""Where a subject's middle lies, as shares of width and height."""
SIZES = {"small": (0.4, 0.5), "": (0.58, 0.74), "large": (0.8, 0.94)}
"""How wide a subject is, as a share of the picture's width."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `place` indexes `BACKGROUNDS`, `subject` the library's subjects; `second` may be none."""

    prompt: str
    subject: int
    second: int | None
    place: int
    center: tuple[float, float]
    size: float


@dataclass(frozen=True)
class Library:
    """The subjects' glyphs (RGBA), names and keywords."""

    glyphs: tuple[Image.Image, ...]
    names: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, font: Path, annotations: Path) -> "Library":
        """Reads the subjects of `SUBJECTS` from the font's file and CLDR's `annotations/en.xml`."""
        names: dict[str, str] = {}
        keywords: dict[str, str] = {}
        for entry in ElementTree.parse(annotations).getroot().iter("annotation"):
            (names if entry.get("type") == "tts" else keywords)[entry.get("cp", "")] = entry.text or ""
        subjects = "".join(line for line in SUBJECTS.read_text("utf-8").split("\n") if not line.startswith("#"))
        typeface = ImageFont.truetype(str(font), FONT_SIZE)
        return cls(
            tuple(_glyph(typeface, subject) for subject in subjects),
            tuple(names[subject].lower().replace("’", "'") for subject in subjects),
            tuple(_keywords(keywords.get(subject, ""), names[subject]) for subject in subjects),
        )

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every phrase that a prompt can hold, for the tokenizer to learn from."""
        words = [word for words in self.keywords for word in words]
        return (*self.names, *words, *BACKGROUNDS, *POSITIONS, "a small", "a large", "an", "and", "a picture of")


def _glyph(typeface: ImageFont.FreeTypeFont, subject: str) -> Image.Image:
    """A subject's bitmap, cut to what it covers and centered in a square."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE // 4, FONT_SIZE // 4), subject, font=typeface, embedded_color=True)
    bitmap = canvas.crop(canvas.getbbox())
    side = max(bitmap.size)
    square = Image.new("RGBA", (side, side))
    square.paste(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
    return square


def _keywords(text: str, name: str) -> tuple[str, ...]:
    words = (word.strip().lower() for word in text.split("|"))
    return tuple(word for word in words if word and word != name.lower())


def held_out(subject: int, place: int) -> bool:
    """Whether this pair of subject and background is kept for the score: no scene trained on shows it."""
    return (subject * 7 + place * 3) % HELD_OUT_SHARE == 0


def draw_scene(library: Library, seed: Sequence[int]) -> Scene:
    """The scene that belongs to `seed`."""
    random = np.random.default_rng(seed)
    subject = int(random.integers(len(library.names)))
    places = [place for place in range(len(BACKGROUNDS)) if not held_out(subject, place)]
    place = int(random.choice(places))
    pair = random.random() < 0.08
    second = int(random.integers(len(library.names))) if pair else None
    if second is not None and held_out(second, place):
        second = None
    position = str(random.choice(["in the center"] * 4 + list(POSITIONS)))
    size = str(random.choice(list(SIZES), p=[0.2, 0.5, 0.3]))
    if size == "large":
        position = "in the center"
    share = random.uniform(*SIZES[size])
    told = random.random(3) < (0.5, 0.75, 0.6)
    keyword = random.choice(library.keywords[subject]) if library.keywords[subject] and random.random() < 0.15 else ""
    words = prompt_words(
        library.names[subject],
        size=size,
        position=position if told[0] else "",
        background=BACKGROUNDS[place] if told[1] else "",
        keyword=str(keyword),
        second=None if second is None else library.names[second],
    )
    if second is not None:
        return Scene(words, subject, second, place, (0.26, 0.5), random.uniform(0.42, 0.5))
    center = np.array(POSITIONS[position]) + random.uniform(-0.04, 0.04, 2)
    low, high = share / 2, 1 - share / 2
    return Scene(words, subject, None, place, tuple(np.clip(center, low, high).tolist()), share)


def prompt_words(
    name: str, *, size: str = "", position: str = "", background: str = "", keyword: str = "", second: str | None = None
) -> str:
    """A prompt: "a small red apple, fruit, on the left, at night"."""
    if second is not None:
        return ", ".join(part for part in (f"{_article(name)} and {_article(second)}", background) if part)
    return ", ".join(part for part in (_article(f"{size} {name}".strip()), keyword, position, background) if part)


def render(library: Library, scene: Scene, side: int, seed: Sequence[int]) -> np.ndarray:
    """The scene's picture: uint8, `side` x `side` x 3."""
    random = np.random.default_rng([*seed, 1])
    picture = _background(scene.place, side, random)
    if scene.second is None:
        _paste(picture, library.glyphs[scene.subject], scene.center, scene.size)
    else:
        _paste(picture, library.glyphs[scene.subject], scene.center, scene.size)
        _paste(picture, library.glyphs[scene.second], (1 - scene.center[0], scene.center[1]), scene.size)
    return np.asarray(picture)


def _background(place: int, side: int, random: np.random.Generator) -> Image.Image:
    shade = random.uniform(-12, 12, 3)
    if place < len(COLORS):
        colors = np.broadcast_to(np.array(list(COLORS.values())[place]) + shade, (side, 3))
    else:
        sky, ground = (np.array(color) + shade for color in list(PLACES.values())[place - len(COLORS)])
        horizon = round(side * random.uniform(0.5, 0.65))
        fade = np.linspace(0, 0.35, horizon)[:, None]
        colors = np.concatenate(
            [sky * (1 - fade) + 255 * fade * (sky.mean() > 90), np.tile(ground, (side - horizon, 1))]
        )
    rows = np.broadcast_to(colors[:, None], (side, side, 3))
    return Image.fromarray(rows.clip(0, 255).astype(np.uint8))


def _paste(picture: Image.Image, glyph: Image.Image, center: tuple[float, float], size: float) -> None:
    side = max(round(size * picture.width), 1)
    scaled = glyph.resize((side, side), Image.Resampling.LANCZOS)
    corner = tuple(round(share * picture.width - side / 2) for share in center)
    picture.paste(scaled, corner, scaled)
