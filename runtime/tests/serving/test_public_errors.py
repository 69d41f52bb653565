"""What clients are told: short, and nothing of the server's own."""

from __future__ import annotations

import pytest

from hidiff_runtime.errors import (
    BundleError,
    Cancelled,
    EngineError,
    Expired,
    HidiffError,
    InputError,
    ParityError,
    StorageError,
)
from hidiff_runtime.serving.public_errors import INTERNAL, LONGEST, kind_of, public_message


def test_a_refused_request_is_told_what_and_what_next() -> None:
    error = InputError("These are too many steps.", given=9, advice="Take 8.")
    assert public_message(error) == "These are too many steps. Given: 9. Take 8."


@pytest.mark.parametrize(
    "error",
    [
        BundleError("No such file: /srv/bundles/secret/manifest.json.", given="/srv/bundles", advice="Run /bin/x"),
        EngineError("Failed in '/opt/venv/lib/a.so' (phase strided)", given="/opt/x", advice="Run 'check /srv/b'"),
        InputError("It cannot be read.", given="C:\\models\\a.png and ~/b.png", advice="See /tmp/a."),
        StorageError("The disk is full at /var/cache/a."),
        RuntimeError("/root/secret.py line 3"),
        KeyError("/root/secret"),
    ],
)
def test_no_path_leaves_the_server(error: Exception) -> None:
    told = public_message(error)
    assert not any(part in told for part in ("/srv", "/opt", "/var", "/root", "/tmp", "/bin", "models", "b.png"))
    assert told


def test_what_is_no_path_stays() -> None:
    assert "'a\\x1b b'" in public_message(InputError("A control character.", given=repr("a\x1b b")))
    assert "1/2 and/or" in public_message(InputError("Give 1/2 and/or more."))


def test_messages_are_one_short_line() -> None:
    told = public_message(InputError("a\n" * 400))
    assert len(told) == LONGEST
    assert "\n" not in told


def test_messages_can_be_sent() -> None:
    assert (
        public_message(InputError("No such sampler.", given="a\ud800")).encode() == b"No such sampler. Given: a?. "[:-1]
    )


def test_what_nobody_foresaw_is_internal() -> None:
    assert public_message(ValueError("secret")) == INTERNAL


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("x"), "input"),
        (Expired("x"), "expired"),
        (Cancelled("x"), "cancelled"),
        (EngineError("x"), "engine"),
        (BundleError("x"), "engine"),
        (ParityError("x"), "engine"),
        (ValueError("x"), "internal"),
    ],
)
def test_kinds(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_a_deadline_is_told_as_one() -> None:
    assert public_message(Expired("The deadline passed.")) == "The deadline passed."
    assert public_message(Cancelled("x")) == "The request was cancelled."
    assert issubclass(Expired, HidiffError)
