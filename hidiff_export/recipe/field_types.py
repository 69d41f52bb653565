"""The kinds of value a recipe holds: named choices, fractions of a run, step counts and checkpoint sources."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from itertools import pairwise
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    StrictInt,
    StrictStr,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

SMALLEST, LARGEST, MULTIPLE = 64, 8192, 8
"""Sides of a picture, in pixels."""

MOST_STEPS = 1000
"""Denoising steps: as many as there are training timesteps."""

_SEED_LIMIT = 2**63
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


class Precision(str, Enum):
    """The type of the weights and of most of the arithmetic; what goes in and out of a graph is float32.

    In int8 and fp8 (E4M3), convolutions and linear layers are quantized; all else, and the stored weights, is float16.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def quantized(self) -> bool:
        """Whether layers compute in fewer bits than weights are stored in."""
        return self in (Precision.INT8, Precision.FP8)

    @property
    def stored(self) -> Precision:
        """The precision of the weight store."""
        return Precision.FLOAT16 if self.quantized else self

    @property
    def bytes(self) -> int:
        """Size of one stored weight."""
        return 4 if self is Precision.FLOAT32 else 2


class Prediction(str, Enum):
    """What a UNet predicts, as diffusers' schedulers name it."""

    EPSILON = "epsilon"
    VELOCITY = "v_prediction"


class TimestepSpacing(str, Enum):
    """Where the timesteps of a run lie, as diffusers' schedulers name it."""

    LEADING = "leading"
    TRAILING = "trailing"
    LINSPACE = "linspace"


class BetaSchedule(str, Enum):
    """How the noise grows over the training timesteps, as diffusers' schedulers name it."""

    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"
    COSINE = "squaredcos_cap_v2"


class SamplerName(str, Enum):
    """A noise scheduler that can be tabulated."""

    DDIM = "ddim"
    DDPM = "ddpm"
    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    DPMPP_2M = "dpmpp_2m"
    DPMPP_2M_KARRAS = "dpmpp_2m_karras"
    DPMPP_2M_SDE = "dpmpp_2m_sde"
    UNIPC = "unipc"
    DEIS = "deis"
    PNDM = "pndm"
    HEUN = "heun"
    LCM = "lcm"
    TCD = "tcd"


class Target(str, Enum):
    """Hardware that an engine is built for."""

    CPU = "cpu"
    CUDA = "cuda"
    SM75 = "sm75"
    SM80 = "sm80"
    SM86 = "sm86"
    SM89 = "sm89"
    SM120 = "sm120"
    SM121 = "sm121"

    @property
    def computes_fp8(self) -> bool:
        """Whether it can have fp8 products, which GPUs have from compute capability 8.9 on. A CPU emulates them."""
        return self not in (Target.SM75, Target.SM80, Target.SM86)

    @property
    def ahead_of_time(self) -> bool:
        """Whether it names a generation of GPUs rather than what the building machine has."""
        return self.value.startswith("sm")


class BackendName(str, Enum):
    """What builds and runs engines."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"

    def targets(self, given: Iterable[Target]) -> tuple[Target, ...]:
        """Returns which of ``given`` it builds for: TensorRT-RTX either ahead of time or for the machine it is on."""
        if self is BackendName.ONNXRUNTIME:
            return tuple(target for target in given if not target.ahead_of_time)
        if self is BackendName.OPENVINO:
            return tuple(target for target in given if target is Target.CPU)
        ahead = tuple(target for target in given if target.ahead_of_time)
        if self is BackendName.TENSORRT_RTX and ahead:
            return ahead
        return tuple(target for target in given if target is Target.CUDA)


DEFAULT_TARGETS = {
    BackendName.ONNXRUNTIME: (Target.CPU,),
    BackendName.OPENVINO: (Target.CPU,),
    BackendName.TENSORRT: (Target.CUDA,),
    BackendName.TENSORRT_RTX: (Target.SM89, Target.SM120),
}
"""What a backend builds for where a recipe does not say."""


def choices(kind: type[Enum]) -> str:
    """Returns the values of an enumeration, in words: ``a, b or c``."""
    *first, last = (str(member.value) for member in kind)
    return f"{', '.join(first)} or {last}" if first else last


def refusal(what: str, *, key: tuple[str, ...] = (), advice: str = "") -> PydanticCustomError:
    """Returns the error by which a validator refuses a value.

    Args:
        what: follows the key in the message: ``should be …``.
        key: where the value is, from the top, if it is not the one being validated.
        advice: what would be valid; empty for the field's own description.
    """
    # Pydantic fills {} in its template from the context, so the text goes in through the context.
    return PydanticCustomError("recipe", "{what}", {"what": what, "key": key, "advice": advice})


def _layout(value: Any) -> Any:
    if value == "merged":
        raise refusal(
            "is merged, one engine for all phases, which is no longer made: it took 1.4 to 2.5 times as long to build, "
            "rounded attention scores to 16 bits and could not be recorded as a CUDA graph",
            advice="Leave layout out: each phase then has an engine of its own. A bundle whose engine is merged has to "
            "be built again with 'hidiff-export build'.",
        )
    return value


EnginePerPhase = Annotated[Literal["per-phase"], BeforeValidator(_layout)]
"""How TensorRT engines hold the phases. Recipes could once say something else, and older ones say this."""


def _fraction(value: Any) -> Any:
    number = value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value)):
        number = float(match[1]) / 100
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise refusal("should be a fraction of the run", advice="Give a number from 0 to 1, or a percentage like 40%.")
    return float(number)


FRACTION_SCHEMA = [
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "string", "pattern": r"^\d+(\.\d+)? ?%$"},
]

Fraction = Annotated[float, BeforeValidator(_fraction), WithJsonSchema({"anyOf": FRACTION_SCHEMA})]
"""A part of the run's steps: 0 to 1, also written ``40%``."""


def _steps(value: Any) -> Any:
    parts = value if isinstance(value, (list, tuple)) else [value]
    counts: set[int] = set()
    for part in parts:
        if isinstance(part, str) and (match := re.fullmatch(r"(\d+) ?- ?(\d+)", part)):
            first, last = int(match[1]), int(match[2])
        else:
            first = last = part
        if isinstance(first, bool) or not isinstance(first, int) or not 1 <= first <= last <= MOST_STEPS:
            raise refusal("should be step counts")
        counts.update(range(first, last + 1))
    if not counts:
        raise refusal("should name at least one step count")
    return tuple(sorted(counts))


def ranges(steps: Iterable[int]) -> list[int | str]:
    """Returns rising step counts as numbers and ``first-last`` ranges."""
    runs: list[tuple[int, int]] = []
    for count in steps:
        if runs and count == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], count)
        else:
            runs.append((count, count))
    return [first if first == last else f"{first}-{last}" for first, last in runs]


def _written(steps: Iterable[int]) -> int | str | list[int | str]:
    """Step counts as recipes write them: a number, a range, or a list of both."""
    written = ranges(steps)
    return written if len(written) > 1 else written[0]


_STEP_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": MOST_STEPS},
        {"type": "string", "pattern": r"^\d+ ?- ?\d+$"},
    ]
}

Steps = Annotated[
    tuple[int, ...],
    BeforeValidator(_steps),
    PlainSerializer(_written),
    WithJsonSchema({"anyOf": [*_STEP_SCHEMA["anyOf"], {"type": "array", "items": _STEP_SCHEMA, "minItems": 1}]}),
]
"""Step counts, rising: a number, a range ``1-100``, or a list of both."""


def _timesteps(value: Any) -> Any:
    given = list(value) if isinstance(value, (list, tuple)) else []
    whole = all(type(timestep) is int and 0 <= timestep < MOST_STEPS for timestep in given)
    if not given or not whole or any(later >= earlier for earlier, later in pairwise(given)):
        raise refusal(
            "should be falling timesteps",
            advice=f"Give whole numbers from {MOST_STEPS - 1} down to 0, each below the one before: [999, 749, 499].",
        )
    return tuple(given)


Timesteps = Annotated[
    tuple[int, ...],
    BeforeValidator(_timesteps),
    WithJsonSchema(
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MOST_STEPS - 1}, "minItems": 1}
    ),
]
"""Timesteps of one run, falling."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) != len(value):
        raise refusal("names one thing twice", advice="Keep one of each.")
    if not value:
        raise refusal("should name at least one")
    return value


ONE_OR_A_LIST = BeforeValidator(_listed)
DISTINCT = AfterValidator(_distinct)


def _source(value: str) -> str:
    text = value.strip()
    try:
        random_seed(text)
    except ValueError:
        advice = "Give a whole number as the seed, for example random:0."
        raise refusal("should be random:SEED", advice=advice) from None
    if not text:
        raise refusal("is empty")
    if PurePath(text).suffix.lower() in _PICKLES:
        raise refusal(
            "is a pickle, which can run code when it is opened",
            advice="Give its .safetensors file or its diffusers folder. If you trust it, convert it with diffusers: "
            "from_single_file(FILE) of its pipeline's class, or of ControlNetModel, then save_pretrained(NEW_FOLDER).",
        )
    return text


Source = Annotated[StrictStr, AfterValidator(_source)]
"""Where weights come from: hub id, diffusers folder, ``.safetensors`` file or ``random:SEED``."""


def _size(value: Any) -> Any:
    sides = value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,5}) ?x ?(\d{1,5})", value)):
        sides = [int(match[1]), int(match[2])]
    pair = list(sides) if isinstance(sides, (list, tuple)) else []
    if len(pair) != 2 or not all(type(side) is int for side in pair):
        raise refusal("should be a size", advice="Give WIDTHxHEIGHT in pixels: 1216x832.")
    if not all(SMALLEST <= side <= LARGEST and side % MULTIPLE == 0 for side in pair):
        raise refusal(
            f"should have sides that are multiples of {MULTIPLE} from {SMALLEST} to {LARGEST}",
            advice="Give WIDTHxHEIGHT in pixels: 1216x832.",
        )
    return tuple(pair)


PictureSize = Annotated[
    tuple[int, int],
    BeforeValidator(_size),
    PlainSerializer(lambda size: f"{size[0]}x{size[1]}"),
    WithJsonSchema({"type": "string", "pattern": r"^\d+ ?x ?\d+$"}),
]
"""Width and height of a picture in pixels: ``1216x832``."""


def _bucket(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 3:
        return (*_size(value[:2]), value[2])
    match = re.fullmatch(r"(\d{1,5}x\d{1,5})x(\d{1,2})", value) if isinstance(value, str) else None
    if match is None or not 1 <= int(match[2]) <= MOST_PICTURES:
        raise refusal("should be a size and a batch", advice="Give WIDTHxHEIGHTxBATCH: 832x1216x4.")
    return (*_size(match[1]), int(match[2]))


BucketShape = Annotated[
    tuple[int, int, int],
    BeforeValidator(_bucket),
    PlainSerializer(lambda bucket: "x".join(map(str, bucket))),
    WithJsonSchema({"type": "string", "pattern": r"^\d+x\d+x\d+$"}),
]
"""Width and height of a picture in pixels, and pictures of a run: ``832x1216x4``."""

MOST_PICTURES = 64
Batch = Annotated[StrictInt, Field(ge=1, le=MOST_PICTURES)]
"""Pictures of one run."""

MOST_EXAMPLES = 12
ExamplePrompt = Annotated[StrictStr, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]
"""A prompt of a recipe's ``example_prompts``."""


def random_seed(source: str) -> int | None:
    """Returns the seed of a fabricated checkpoint; None where the weights are somebody's.

    Raises:
        ValueError: ``random`` without a whole number below 2**63.
    """
    kind, _, seed = source.partition(":")
    if kind != "random":
        return None
    if not (seed.isascii() and seed.isdigit() and int(seed) < _SEED_LIMIT):
        raise ValueError(source)
    return int(seed)


def _lora_path(value: str) -> str:
    text = value.strip()
    if PurePath(text).suffix.lower() != ".safetensors":
        pickled = PurePath(text).suffix.lower() in _PICKLES
        raise refusal(
            "is a pickle, which can run code when it is opened" if pickled else "should be a .safetensors file",
            advice="Give the path of a LoRA in .safetensors format.",
        )
    return text


LoraPath = Annotated[StrictStr, AfterValidator(_lora_path)]
"""Path of a ``.safetensors`` file."""
