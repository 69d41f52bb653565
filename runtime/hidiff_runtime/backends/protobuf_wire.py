"""Fields of protocol buffers as they are written, for the little that is read of graphs without onnx."""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types."""


def wire_fields(message: bytes | memoryview) -> Iterator[tuple[int, int, int | None, int]]:
    """Yields each field's number, where it begins, where its bytes begin if it has such, and where it ends."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        content = None
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(message, at)
        elif wire == _BYTES:
            size, content = _varint(message, at)
            at = content + size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"byte {start} begins no field")
        if at > len(message):
            raise ValueError(f"the field at byte {start} ends behind the message")
        yield tag >> 3, start, content, at


def _varint(message: bytes | memoryview, at: int) -> tuple[int, int]:
    """Returns a number of 7 bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends in the middle of a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"the number before byte {at} has no end")


def wire_field(number: int, content: bytes) -> bytes:
    """Returns a field of bytes."""
    return _number(number << 3 | _BYTES) + _number(len(content)) + content


def wire_number(number: int, value: int) -> bytes:
    """Returns a field of a whole number of 0 or more."""
    return _number(number << 3 | _VARINT) + _number(value)


def whole_at(message: bytes | memoryview, at: int) -> int:
    """Returns the whole number of the field that begins at ``at``. Raises ValueError."""
    return _varint(message, _varint(message, at)[1])[0]


def _number(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])
