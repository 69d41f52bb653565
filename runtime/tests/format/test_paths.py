"""Which paths can name a file inside a bundle."""

from __future__ import annotations

import pytest

from hidiff_runtime.format.paths import path_error


@pytest.mark.parametrize("path", ["unet/weights.safetensors", "a", "é/日本", "x" * 255, "/".join(["y" * 203] * 5)])
def test_a_path_inside_the_bundle(path: str) -> None:
    assert path_error(path) == ""


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("", "is empty"),
        ("a\0b", "control character"),
        ("a\\b", "must be written with '/'"),
        ("c:/a", "drive letter"),
        ("/etc/passwd", "must be relative"),
        ("a/../b", "must not have"),
        ("a//b", "must not have"),
        ("x" * 256, "longer than 255"),
        ("é" * 128, "longer than 255"),
        ("/".join(["y" * 205] * 5), "longer than 1024 bytes"),
        ("a\ud800", "half of a surrogate pair"),
    ],
)
def test_what_is_no_such_path_is_told(path: str, fault: str) -> None:
    assert fault in path_error(path)
