"""A thousand prompts that have everything in them that people type, and some that nobody does."""

from __future__ import annotations

import random

_HAND = [
    "a photograph of an astronaut riding a horse",
    "Portrait of a woman, 85mm f/1.4, golden hour, ultra-detailed, 8k, trending on artstation",
    "(masterpiece:1.2), [blurry|sharp], <lora:style:0.8>, {best quality}, 1girl",
    "don't won't it's I'll they've we're she'd I'm DON'T IT'S 'tis rock'n'roll o'clock ''quoted''",
    "!!!???... --- ___ *** ((())) [[]] {{}} <<>> $$$ %% @@ ## && ~~ ^^ || \\\\ // :: ;; ,, ``",
    "!",
    "a!",
    "! a !",
    "!!",
    "hello! world!",
    "1 12 123 1234567890 3.14159 1,000,000 2024-11-24 16:9 0xFF ½ ² ³ ① Ⅷ ٣ ७ 五",
    "<|startoftext|> inside <|endoftext|> a prompt",
    "<|endoftext|>",
    "<|STARTOFTEXT|>",
    "<|endoftext",
    "</w> a</w>",
    "Ünïcödé: naïve café, Łódź, İstanbul, ıI, Straße ẞ, ǅ ǆ, Œuvre, ﬁ ﬂ ﬀ",
    "e\u0301 vs \u00e9, A\u030a vs \u00c5 vs \u212b",
    "o\u0302\u0323 vs o\u0323\u0302, \u1e9b\u0323, a\u0300\u0301\u0302\u0303",
    "Привет, мир! Ёжик в тумане",
    "Καλημέρα κόσμε ΣΊΣΥΦΟΣ ς",
    "שלום עולם",
    "مرحبا بالعالم ﷺ لا",
    "नमस्ते दुनिया क्षि",
    "வணக்கம் உலகம்",
    "สวัสดีชาวโลก",
    "ພາສາລາວ",
    "မြန်မာ",
    "ខ្មែរ",
    "བོད་སྐད་",
    "ქართული",
    "Հայերեն",
    "አማርኛ",
    "ᏣᎳᎩ",
    "ᚠᚢᚦ",
    "𓀀𓁐",
    "𐍈",
    "한국어 각 \u1100\u1161\u11a8",
    "日本語のプロンプト、夜景",
    "中文提示词，山水画。",
    "が vs か\u3099",
    "ＦＵＬＬ ｗｉｄｔｈ　spaces",
    "𝔊𝔬𝔱𝔥𝔦𝔠 𝟙𝟚𝟛 𝒮𝒸𝓇𝒾𝓅𝓉",
    "😀😃 👍🏽 👩🏽‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☺︎ #️⃣ 1️⃣ 🫠 \U0001fae8",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\v\f",
    "a\u00a0b\u2003c\u200ad\u3000e\u2028f\u2029g\u1680h\u205fi",
    "zero\u200bwidth\u200cjoin\u200ders\u2060\ufeff",
    "rtl \u200f\u202e override \u202c \u2066isolate\u2069",
    "soft\u00adhyphen",
    "\ufffd \ufffc \ue000 \U0010ffff \ufdd0",
    "combining alone: \u0301 \u20dd a\u20dd",
    "Z̷̢͚a̴l̶g̵o̸ ţ̷e̸x̴t̵",
    "x" * 500,
    "ab " * 200,
    "supercalifragilisticexpialidocious " * 20,
    "😀" * 60,
    "日本語" * 60,
    "1" * 100,
    "!" * 200,
    "a" * 74 + " b",
    "a " * 74 + "b",
    "a " * 75 + "b",
    "a " * 76 + "b",
    "a, " * 37 + "b c",
    "a, " * 38 + "b",
]

_RANGES = [
    (0x20, 0x7E), (0x20, 0x7E), (0xA1, 0x17F), (0x180, 0x24F), (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF),
    (0x400, 0x52F), (0x531, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF),
    (0xE00, 0xE7F), (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F),
    (0x1E00, 0x1EFF), (0x1F00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x218F), (0x2190, 0x23FF), (0x2460, 0x24FF),
    (0x2600, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFB4F),
    (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x10300, 0x103FF), (0x1D400, 0x1D7FF), (0x1F300, 0x1F64F), (0x1F900, 0x1F9FF),
]  # fmt: skip
_WORDS = [
    "a", "the", "of", "in", "photo", "painting", "cat", "dog", "castle", "dragon", "cyberpunk",
    "watercolour,", "portrait;", "(detailed)", "don't", "it's", "4k", "8K", "f/1.8", "35mm", "Rembrandt's",
    "UNREAL-ENGINE", "hyper_realistic", ":-)", "co-op", "1990s", "3d", "café", "naïve", "über", "señor", "ß",
    "東京", "Москва",
]  # fmt: skip
_GLUE = (" ", " ", " ", "", "  ", ", ", "\n", "\t", " - ", "...", "\u00a0", "\u3000", "'s ", "/", "!")


def prompts(count: int = 1000) -> list[str]:
    """The same ones in every run: those written by hand, then words, scripts and both mixed, of 1 to 150 parts."""
    draw = random.Random(0)
    found = dict.fromkeys(["", *_HAND])
    while len(found) < count:
        length = draw.choice((1, 2, 5, 12, 30, 60, 90, 150))
        strange = draw.choice((0.0, 0.3, 1.0))
        parts = (_script(draw) if draw.random() < strange else _word(draw) for _ in range(length))
        found["".join(part + draw.choice(_GLUE) for part in parts)] = None
    return list(found)


def _word(draw: random.Random) -> str:
    word = draw.choice(_WORDS)
    return draw.choice((word, word, word.upper(), word.title(), word[::-1]))


def _script(draw: random.Random) -> str:
    first, last = draw.choice(_RANGES)
    return "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 6)))
