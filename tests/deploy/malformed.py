"""Requests that are wrong: values, tensors, and whole HTTP requests; each by a name of its kind."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests.deploy.clients import MODEL, STREAM, png

PROMPT = "a lighthouse at dusk"
SIZE = 128
"""Pixels of the bundle's pictures."""


def values() -> dict[str, dict[str, Any]]:
    """Wrong values in right tensors, by input; the prompt is a good one where it is left out."""
    return {
        **_texts(),
        **_numbers(),
        **{f"image: {name}": {"image": value} for name, value in _files().items()},
        **{f"image as text: {name}": {"image": value} for name, value in _addresses().items()},
        **_together(),
    }


def _texts() -> dict[str, dict[str, Any]]:
    prompts: dict[str, str | bytes] = {
        "empty": "",
        "blank": " \n\t ",
        "a character too long": "a" * 2001,
        "a megabyte": "a" * 2**20,
        "of bytes that are not UTF-8": b"a \xff\xfe b",
        "cut inside a character": "dusk ☾".encode()[:-1],
        "half of a surrogate pair": b"a \xed\xa0\x80 b",
        "too long an encoding of a slash": b"a \xc0\xaf b",
        "with NUL": "a\0b",
        "with escape": "a \x1b[31m b",
        "with delete": "a \x7f b",
        "with a C1 control": "a \x85 b \x9b",
    }
    others: dict[str, dict[str, Any]] = {
        "negative prompt too long": {"negative_prompt": "a" * 2001},
        "negative prompt not UTF-8": {"negative_prompt": b"\x80"},
        "negative prompt with NUL": {"negative_prompt": "a\0"},
        "sampler unknown": {"sampler": "magic"},
        "sampler a path": {"sampler": "../../samplers/euler"},
        "sampler a file of the bundle": {"sampler": "../manifest.json"},
        "sampler not UTF-8": {"sampler": b"\xc3("},
        "sampler too long": {"sampler": "e" * 2**16},
        "sampler in capitals": {"sampler": "EULER"},
        "long_prompt unknown": {"long_prompt": "fold"},
        "long_prompt not UTF-8": {"long_prompt": b"\xff"},
        "output unknown": {"output": "gif"},
        "output in capitals": {"output": "PNG"},
        "output a path": {"output": "/tmp/picture.png"},
        "output not UTF-8": {"output": b"\xff"},
        "output very long": {"output": "p" * 2**16},
    }
    return {**{f"prompt {name}": {"prompt": value} for name, value in prompts.items()}, **others}


def _numbers() -> dict[str, dict[str, Any]]:
    wrong = {
        "steps": (0, -1, 2, 4, 151, 2**31, 2**63 - 1, -(2**63)),
        "guidance_scale": (float("nan"), float("inf"), float("-inf"), 1e39),
        "eta": (float("nan"), float("inf"), -0.5, 1.5, 0.5),  # the last is right, but not for this sampler
        "strength": (0.5, float("nan")),  # and no image
        "conditioning_scale": (0.5, float("nan"), float("inf"), 1e39),  # and no ControlNet
        "clip_skip": (-1, 99, 2**62),
        "previews": (-1, -(2**63)),
    }
    return {f"{name} {value}": {name: value} for name, each in wrong.items() for value in each}


def picture(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3)).astype(np.uint8))


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is of this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _files() -> dict[str, bytes]:
    """Files that are no pictures of the bundle's size."""
    image = picture()
    good, jpeg, webp = png(image), _saved(image, "JPEG"), _saved(image, "WEBP")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    clear = image.convert("RGBA")
    clear.putalpha(100)
    return {
        "one byte": b"\0",
        "noise": np.random.RandomState(1).bytes(5000),
        "PNG cut short": good[: len(good) // 2],
        "PNG, its signature alone": good[:8],
        "PNG with a flipped bit": bytes(flipped),
        "JPEG cut short": jpeg[: len(jpeg) // 2],
        "JPEG, its first bytes": jpeg[:4],
        "WebP cut short": webp[: len(webp) // 2],
        "too small": png(picture(size=(64, 64))),
        "too wide": png(picture(size=(SIZE + 1, SIZE))),
        "one pixel": png(picture(size=(1, 1))),
        "no pixel": _bomb(0, 0),
        "a bomb": _bomb(60000, 60000),
        "a bomb that Pillow takes": _bomb(9000, 9000),
        "more bytes than allowed": good + bytes(16 * 2**20),
        "GIF": _saved(image, "GIF"),
        "BMP": _saved(image, "BMP"),
        "TIFF": _saved(image, "TIFF"),
        "ICO": _saved(image.resize((64, 64)), "ICO"),
        "PPM": _saved(image, "PPM"),
        "PDF": _saved(image, "PDF"),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "HTML": b"<!doctype html><img src=x onerror=alert(1)>",
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "zip": b"PK\x03\x04" + bytes(60),
        "CMYK": _saved(image.convert("CMYK"), "JPEG"),
        "transparent": png(clear),
        "16 bits": png(Image.fromarray(np.zeros((SIZE, SIZE), np.uint16))),
        "palette": png(image.quantize(16)),
    }


def _addresses() -> dict[str, str]:
    """Texts where a picture's bytes or a data: URL is due."""
    good = base64.b64encode(png(picture())).decode()
    return {
        "a path": "/etc/passwd",
        "a relative path": "../../bundle/manifest.json",
        "a file URL": "file:///etc/passwd",
        "a web address": "http://127.0.0.1:1/picture.png",
        "base64 alone": good,
        "data without base64": "data:image/png,abc",
        "data without a comma": "data:image/png;base64",
        "data of bad base64": "data:image/png;base64,*" + good,
        "data of cut base64": "data:image/png;base64," + good[:-3],
        "data of nothing": "data:image/png;base64,",
        "data of an SVG": "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(),
        "data of a text": "data:text/plain;base64," + base64.b64encode(b"abc").decode(),
        "data too large": "data:image/png;base64," + "A" * (23 * 2**20),
    }


def _together() -> dict[str, dict[str, Any]]:
    """Values that are right alone."""
    good = png(picture())
    return {
        "mask alone": {"mask": good},
        "mask of another size": {"image": good, "mask": png(picture(size=(64, 64)))},
        "mask broken": {"image": good, "mask": good[:100]},
        "mask a path": {"image": good, "mask": "/etc/shadow"},
        "control image without a ControlNet": {"control_image": good},
        "control image broken": {"control_image": b"abc"},
        **{
            f"image and strength {value}": {"image": good, "strength": value}
            for value in (0.0, -1.0, 0.1, 1.01, float("nan"), float("inf"))
        },
    }


@dataclass(frozen=True)
class Tensor:
    """An input as it goes over the wire, whatever the model wants.

    Args:
        content: an array of numbers, or texts that are sent with their lengths; bytes go as they are.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: Any

    @property
    def raw(self) -> bytes:
        """Its bytes in Triton's encoding."""
        if isinstance(self.content, bytes):
            return self.content
        if self.datatype == "BYTES":
            return b"".join(struct.pack("<I", len(text)) + text for text in self.content)
        return np.array(self.content).astype(_DTYPES[self.datatype]).tobytes()


_DTYPES = {
    "BOOL": np.bool_, "UINT8": np.uint8, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip

_GOOD = Tensor("prompt", "BYTES", (1, 1), [PROMPT.encode()])


def tensors() -> dict[str, tuple[Tensor, ...]]:
    """Inputs of a wrong type, shape, length, name or number."""
    return {
        **{f"a wrong type: {tensor.name} {tensor.datatype}": _with(tensor) for tensor in _mistyped()},
        **_misshaped(),
        **_miscounted(),
        **_misread(),
    }


def _with(*more: Tensor) -> tuple[Tensor, ...]:
    """A good prompt, unless there is another, and these."""
    return more if any(tensor.name == "prompt" for tensor in more) else (_GOOD, *more)


def _mistyped() -> tuple[Tensor, ...]:
    return (
        Tensor("prompt", "INT64", (1, 1), [7]),
        Tensor("prompt", "UINT8", (1, 1), [97]),
        Tensor("seed", "INT32", (1, 1), [7]),
        Tensor("seed", "UINT64", (1, 1), [2**64 - 1]),
        Tensor("seed", "FP64", (1, 1), [7.5]),
        Tensor("seed", "BYTES", (1, 1), [b"7"]),
        Tensor("steps", "BOOL", (1, 1), [True]),
        Tensor("guidance_scale", "FP32", (1, 1), [7.5]),
        Tensor("guidance_scale", "FP16", (1, 1), [7.5]),
        Tensor("guidance_scale", "INT64", (1, 1), [7]),
        Tensor("resize", "INT8", (1, 1), [1]),
        Tensor("resize", "BYTES", (1, 1), [b"yes"]),
        Tensor("image", "UINT8", (1, 1), [0]),
        Tensor("previews", "INT32", (1, 1), [1]),
        Tensor("output", "UINT8", (1, 1), [0]),
        Tensor("seed", "COMPLEX128", (1, 1), bytes(16)),
        Tensor("seed", "", (1, 1), bytes(8)),
    )


def _misshaped() -> dict[str, tuple[Tensor, ...]]:
    text = PROMPT.encode()
    shapes = ((), (1,), (2, 2), (1, 2), (1, 1, 1), (0, 1), (1, 0))
    wrong = {
        f"prompt of shape {list(shape)}": (Tensor("prompt", "BYTES", shape, [text] * int(np.prod(shape))),)
        for shape in shapes
    }
    return {
        **wrong,
        "prompt of shape [-1, 1]": (Tensor("prompt", "BYTES", (-1, 1), [text]),),
        "prompt of shape [2**62, 4]": (Tensor("prompt", "BYTES", (2**62, 4), [text]),),
        "seed of shape [1]": _with(Tensor("seed", "INT64", (1,), [1])),
        "seed of shape [1, 2]": _with(Tensor("seed", "INT64", (1, 2), [1, 2])),
        "two prompts, one seed": (Tensor("prompt", "BYTES", (2, 1), [text] * 2), Tensor("seed", "INT64", (1, 1), [1])),
        "one prompt, two seeds": _with(Tensor("seed", "INT64", (2, 1), [1, 2])),
    }


def _miscounted() -> dict[str, tuple[Tensor, ...]]:
    text = PROMPT.encode()

    def rows(count: int, *more: Tensor) -> tuple[Tensor, ...]:
        return (Tensor("prompt", "BYTES", (count, 1), [text] * count), *more)

    return {
        "no input": (),
        "no prompt": (Tensor("seed", "INT64", (1, 1), [1]),),
        "an unknown input": _with(Tensor("style", "BYTES", (1, 1), [b"oil"])),
        "an output as input": _with(Tensor("parameters", "BYTES", (1, 1), [b"{}"])),
        "an input without a name": _with(Tensor("", "INT64", (1, 1), [1])),
        "an input with a path for a name": _with(Tensor("../seed", "INT64", (1, 1), [1])),
        "the prompt twice": (_GOOD, _GOOD),
        "the seed twice": _with(Tensor("seed", "INT64", (1, 1), [1]), Tensor("seed", "INT64", (1, 1), [2])),
        "nine rows": rows(9),
        "a thousand rows": rows(1000),
        "a second row that is wrong": rows(2, Tensor("steps", "INT64", (2, 1), [3, 4])),
        "rows of two outputs": rows(2, Tensor("output", "BYTES", (2, 1), [b"png", b"uint8"])),
        "a last row without a prompt": (Tensor("prompt", "BYTES", (3, 1), [text, text, b""]),),
    }


def _misread() -> dict[str, tuple[Tensor, ...]]:
    """Bytes that are not what the shape says."""
    return {
        "a text shorter than its length": (Tensor("prompt", "BYTES", (1, 1), struct.pack("<I", 100) + b"abc"),),
        "a text of four gigabytes": (Tensor("prompt", "BYTES", (1, 1), struct.pack("<I", 2**32 - 1) + b"abc"),),
        "a text with more behind it": (Tensor("prompt", "BYTES", (1, 1), struct.pack("<I", 3) + b"abcdef"),),
        "half a length": (Tensor("prompt", "BYTES", (1, 1), b"\1\0"),),
        "no bytes of a text": (Tensor("prompt", "BYTES", (1, 1), b""),),
        "too few bytes of a number": _with(Tensor("seed", "INT64", (1, 1), bytes(7))),
        "too many bytes of a number": _with(Tensor("seed", "INT64", (1, 1), bytes(9))),
        "no bytes of a number": _with(Tensor("seed", "INT64", (1, 1), b"")),
    }


@dataclass(frozen=True)
class Http:
    """A whole HTTP request.

    Args:
        path: below ``/v2/models/``.
    """

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"


def generations() -> dict[str, bytes]:
    """Bodies of Triton's generate, which takes plain JSON."""
    text = json.dumps(PROMPT)
    wrong = {
        "nothing": "",
        "cut short": f'{{"prompt": {text}',
        "no JSON": "prompt=a+lighthouse",
        "a list": f"[{text}]",
        "a text": text,
        "null": "null",
        "no prompt": "{}",
        "a prompt that is null": '{"prompt": null}',
        "a prompt that is a number": '{"prompt": 7}',
        "a prompt that is an object": '{"prompt": {"a": 1}}',
        "a prompt with a raw line end": '{"prompt": "a\nb"}',
        "a prompt with half a surrogate pair": '{"prompt": "a \\ud800 b"}',
        "a bad escape": '{"prompt": "a \\x41"}',
        "a seed beyond 64 bits": f'{{"prompt": {text}, "seed": {2**64}}}',
        "a seed beyond signed 64 bits": f'{{"prompt": {text}, "seed": {2**63}}}',
        "a seed with a point": f'{{"prompt": {text}, "seed": 1.5}}',
        "a seed that is text": f'{{"prompt": {text}, "seed": "1"}}',
        "a seed of a thousand digits": f'{{"prompt": {text}, "seed": {"9" * 1000}}}',
        "steps that are true": f'{{"prompt": {text}, "steps": true}}',
        "NaN": f'{{"prompt": {text}, "guidance_scale": NaN}}',
        "infinity": f'{{"prompt": {text}, "guidance_scale": 1e999}}',
        "a flag that is text": f'{{"prompt": {text}, "resize": "yes"}}',
        "a picture that is a list": f'{{"prompt": {text}, "image": [1, 2]}}',
        "nested deeply": '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}",
        "two objects": f'{{"prompt": {text}}}{{"prompt": {text}}}',
    }
    return {name: body.encode() for name, body in wrong.items()} | {
        "bytes that are not UTF-8": b'{"prompt": "\xff\xfe"}',
        "UTF-16": f'{{"prompt": {text}}}'.encode("utf-16"),
        "NUL": b"\0",
    }


def requests() -> dict[str, Http]:
    """Requests that are wrong before any tensor is."""
    good = _infer_json()
    binary = len(good)
    front = f"{MODEL}/infer"
    gzip = {"Content-Encoding": "gzip"}
    head = "Inference-Header-Content-Length"
    return {
        "no body": Http(front, b""),
        "a body that is no JSON": Http(front, b"{prompt}"),
        "a body cut short": Http(front, good[:-5]),
        "inputs that are text": Http(front, b'{"inputs": "prompt"}'),
        "an input without data": Http(front, b'{"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1, 1]}]}'),
        "more data than the shape says": Http(front, _infer_json(data=["a", "b"])),
        "less data than the shape says": Http(front, _infer_json(data=[])),
        "data of another type": Http(front, _infer_json(data=[7])),
        "a shape of texts": Http(front, _infer_json(shape=["1", "1"])),
        "a shape with a point": Http(front, _infer_json(shape=[1.5, 1])),
        "an unknown output": Http(front, _infer_json(outputs=[{"name": "depth"}])),
        "an output without a name": Http(front, _infer_json(outputs=[{}])),
        "an output of the stream": Http(front, _infer_json(outputs=[{"name": "event"}])),
        "an output in memory that is not shared": Http(front, _infer_json(outputs=[{"name": "image"} | _IN_SHARED])),
        "an input in memory that is not shared": Http(front, _infer_json(data=None, parameters=_SHARED)),
        "binary data that is not there": Http(front, _infer_json(data=None, parameters={"binary_data_size": 1000})),
        "binary data of negative size": Http(front, _infer_json(data=None, parameters={"binary_data_size": -1})),
        "a deadline that is text": Http(front, _infer_json(request={"timeout": "soon"})),
        "a deadline below zero": Http(front, _infer_json(request={"timeout": -1})),
        "a deadline with a point": Http(front, _infer_json(request={"timeout": 1.5})),
        "a deadline of a microsecond": Http(front, _infer_json(request={"timeout": 1})),
        "a priority below zero": Http(front, _infer_json(request={"priority": -1})),
        "a sequence without an end": Http(front, _infer_json(request={"sequence_id": -1})),
        "a header longer than the body": Http(front, good, {head: str(binary + 100)}),
        "a header that ends early": Http(front, good, {head: "5"}),
        "a header of negative length": Http(front, good, {head: "-1"}),
        "a header of no number": Http(front, good, {head: "abc"}),
        "a header of a huge number": Http(front, good, {head: "9" * 40}),
        "compressed, but not": Http(front, good, gzip),
        "compressed and cut short": Http(front, zlib.compress(good, wbits=31)[:40], gzip),
        "compressed in a way that is not known": Http(front, good, {"Content-Encoding": "br"}),
        "an unknown model": Http("nobody/infer", good),
        "a model whose name is a path": Http("..%2f..%2fetc%2fpasswd/infer", good),
        "a model whose name is long": Http("m" * 5000 + "/infer", good),
        "a model whose name is no text": Http("%ff%00/infer", good),
        "a version that is not there": Http(f"{MODEL}/versions/2/infer", good),
        "a version below zero": Http(f"{MODEL}/versions/-5/infer", good),
        "a version that is text": Http(f"{MODEL}/versions/latest/infer", good),
        "a version of many digits": Http(f"{MODEL}/versions/{'9' * 30}/infer", good),
        "the stream asked plainly": Http(f"{STREAM}/infer", good),
        "an unknown verb": Http(f"{MODEL}/draw", good),
        "GET": Http(front, b"", method="GET"),
        "DELETE": Http(front, good, method="DELETE"),
    }


_SHARED = {"shared_memory_region": "nobody", "shared_memory_byte_size": 64}
_IN_SHARED = {"parameters": _SHARED}


def _infer_json(
    *,
    data: list[Any] | None = [PROMPT],  # noqa: B006 - never changed
    shape: list[Any] = [1, 1],  # noqa: B006
    outputs: list[Any] | None = None,
    parameters: dict[str, Any] | None = None,
    request: dict[str, Any] | None = None,
) -> bytes:
    """A request as JSON; right where nothing is said."""
    tensor: dict[str, Any] = {"name": "prompt", "datatype": "BYTES", "shape": shape}
    if data is not None:
        tensor["data"] = data
    if parameters is not None:
        tensor["parameters"] = parameters
    body: dict[str, Any] = {"inputs": [tensor]}
    if outputs is not None:
        body["outputs"] = outputs
    if request is not None:
        body["parameters"] = request
    return json.dumps(body).encode()


def sent() -> dict[str, bytes]:
    """Bytes on a connection that are no whole HTTP request."""
    body = _infer_json()
    start = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: localhost\r\n"
    chunked = f"{start}Transfer-Encoding: chunked\r\n\r\n"
    return {
        "nothing": b"",
        "noise": np.random.RandomState(2).bytes(4000),
        "a line without an end": b"POST " + b"/" * 100_000,
        "a start of a request": start.encode(),
        "a body shorter than announced": f"{start}Content-Length: {len(body) + 50}\r\n\r\n".encode() + body,
        "a length of no number": f"{start}Content-Length: many\r\n\r\n".encode() + body,
        "a negative length": f"{start}Content-Length: -5\r\n\r\n".encode() + body,
        "a chunk of no length": f"{chunked}xyz\r\n".encode(),
        "a chunk cut short": f"{chunked}ffff\r\nabc".encode(),
        "a header line of a megabyte": f"{start}X-Long: {'a' * 2**20}\r\n\r\n".encode(),
        "a hundred thousand header lines": start.encode() + b"A: b\r\n" * 100_000 + b"\r\n",
        "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    }
