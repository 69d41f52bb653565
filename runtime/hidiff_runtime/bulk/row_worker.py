"""A worker of a job: opens and proves the bundle once, then makes the pictures of one row after another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from hidiff_runtime.bulk.output import PICTURES, ImageEntry
from hidiff_runtime.bulk.rows import DeadLetter, Row, picture_name
from hidiff_runtime.bulk.storage import Location, Store
from hidiff_runtime.errors import BundleError, EngineError, HidiffError, InputError, ParityError, StorageError
from hidiff_runtime.pipeline.image_metadata import HIDIFF, encoded
from hidiff_runtime.pipeline.image_processing import decode_picture
from hidiff_runtime.pipeline.pipeline import Result
from hidiff_runtime.pipeline.request_fields import BY_NAME
from hidiff_runtime.pipeline.request_values import DATA, Limits
from hidiff_runtime.serving.service import Service, generation_metadata
from hidiff_runtime.text_safety import json_text
from hidiff_runtime.version import __version__

LIMITS = Limits(prompt_characters=100_000, image_bytes=2**28, image_pixels=2**27, steps=10_000)
"""Whoever writes the prompts of a job runs it: these keep out what can only be a mistake."""

MOST_ATTEMPTS = 4
"""How often a row is begun: one that ends its worker each time is given up."""

DIED = "died"
"""The kind of a dead letter whose row ended its workers."""

BULK = "bulk"
"""The part of a picture's text that says which row it was made from."""


@dataclass(frozen=True)
class Work:
    """What every worker is told.

    Args:
        folder: of the bundle, on the worker's machine.
        opening: options of :func:`hidiff_runtime.open`.
        bundle: the hash that the bundle must have.
        batch: pictures of each row.
        output: where pictures go.
        inputs: what paths in rows begin at.
        version: of hidiff-runtime that asks.
    """

    folder: str
    opening: Mapping[str, Any]
    bundle: str
    batch: int
    output: Location
    inputs: Location
    version: str = __version__


_KINDS: dict[str, type[HidiffError]] = {
    kind.__name__: kind for kind in (ParityError, InputError, BundleError, EngineError, StorageError)
}


@dataclass(frozen=True)
class FatalError:
    """Why no row can be made: a `HidiffError` as plain values."""

    name: str
    summary: str
    given: str | None
    advice: str

    @classmethod
    def of(cls, error: HidiffError) -> FatalError:
        """Makes it of this error."""
        given = None if error.given is None else str(error.given)
        name = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), EngineError.__name__)
        return cls(name, error.summary, given, error.advice)

    def error(self) -> HidiffError:
        """Returns the error again, with its exit code."""
        return _KINDS[self.name](self.summary, given=self.given, advice=self.advice)


@dataclass(frozen=True)
class Outcome:
    """What came of a row: its pictures, a dead letter, or a fault that ends the job.

    Args:
        row: its number.
        attempts: how often it was begun; more than 1 where a worker ended in the middle.
        pictures: one for each of the batch.
        letter: why there are none.
        fault: why this worker can make none at all.
    """

    row: int
    attempts: int
    pictures: tuple[ImageEntry, ...] = ()
    letter: DeadLetter | None = None
    fault: FatalError | None = None

    def to_json(self) -> str:
        """Returns what `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """Returns an outcome that :meth:`to_json` wrote."""
        found = json.loads(text)
        found["pictures"] = tuple(ImageEntry(**picture) for picture in found["pictures"])
        found["letter"] = found["letter"] and DeadLetter(**found["letter"])
        found["fault"] = found["fault"] and FatalError(**found["fault"])
        return cls(**found)


class RowWorker:
    """Makes rows' pictures with one bundle.

    Args:
        begin: told of a row's number before it is made; returns how often it was begun, this time counted. It outlives
            the worker.
        end: ends the worker's process, so that another begins in its place.
    """

    def __init__(self, work: Work, begin: Callable[[int], int], end: Callable[[], NoReturn]) -> None:
        self.work = work
        self._begin = begin
        self._end = end
        self._service: Service | None = None

    def make(self, row: Row) -> Outcome:
        """Makes a row's pictures and stores them, unless they are there, made from this very row.

        Never raises what `HidiffError` is: rows and workers have their own failures, and a raised error would be
        tried again wherever the pool likes.
        """
        attempts = 0
        try:
            found = self._made_before(row)
            if found:
                return Outcome(row.number, attempts, found)
            attempts = self._begin(row.number)
            if attempts > MOST_ATTEMPTS:
                return Outcome(row.number, attempts, letter=self._died(row))
            service = self._open()
        except HidiffError as error:
            return Outcome(row.number, attempts, fault=FatalError.of(error))
        return self._made(service, row, attempts)

    def close(self) -> None:
        """Closes the bundle. Raises EngineError where the device failed; then it is closed too."""
        service, self._service = self._service, None
        if service is not None:
            service.close()

    def _made(self, service: Service, row: Row, attempts: int) -> Outcome:
        try:
            result = self._run(service, row)
        except InputError as error:
            return self._failed(row, attempts, error)
        except Exception:  # the machine may be at fault: it is proven anew, and the row tried once more
            try:
                result = self._run(self._opened_anew(), row)
            except Exception as error:  # it is not, so the row is; its dead letter tells
                return self._failed(row, attempts, error)
        try:
            return Outcome(row.number, attempts, self._stored(row, result))
        except HidiffError as error:
            return Outcome(row.number, attempts, fault=FatalError.of(error))

    def _failed(self, row: Row, attempts: int, error: Exception) -> Outcome:
        return Outcome(row.number, attempts, letter=DeadLetter.of(row, error, self.work.bundle))

    def _run(self, service: Service, row: Row) -> Result:
        return service.generate(service.request(request_values(row, self.work.inputs)))

    def _opened_anew(self) -> Service:
        """Returns the service, closed and opened. Where that fails, which it did not at first, the process ends: a GPU
        that failed may refuse everything to this one, and nothing to the next.
        """
        try:
            self.close()
            return self._open()
        except HidiffError:
            self._end()

    @cached_property
    def _store(self) -> Store:
        return Store(self.work.output)

    def _open(self) -> Service:
        """Returns the service, opened when it is first needed."""
        if self._service is None:
            if self.work.version != __version__:
                raise EngineError(
                    "A worker has another version of hidiff-runtime.",
                    given=f"{__version__}, asked by {self.work.version}",
                    advice="Install the same version on all machines.",
                )
            service = Service.open(self.work.folder, limits=LIMITS, **self.work.opening)
            if service.bundle_hash != self.work.bundle:
                service.close()
                raise BundleError(
                    "A worker has another bundle in that folder.",
                    given=f"{self.work.folder}: {service.bundle_hash[:12]} instead of {self.work.bundle[:12]}",
                    advice="Give a folder that all machines share, or copy the bundle to each.",
                )
            self._service = service
        return self._service

    def _files(self, row: Row) -> list[str]:
        name = picture_name(row.id)
        names = [name] if self.work.batch == 1 else [f"{name}.{index}" for index in range(self.work.batch)]
        return [f"{PICTURES}/{name}.png" for name in names]

    def _stored(self, row: Row, result: Result) -> tuple[ImageEntry, ...]:
        made = []
        for index, (file, image) in enumerate(zip(self._files(row), result.images, strict=True)):
            facts = generation_metadata(result, index)
            origin = {"id": row.id, "row": row.fingerprint(self.work.bundle), "pixels": _digest(image.tobytes())}
            image.info[HIDIFF] = json_text({**facts, BULK: origin})
            content = encoded(image)
            self._store.write(file, content)
            made.append(self._picture(row, index, file, content, facts, result.seconds))
        return tuple(made)

    def _made_before(self, row: Row) -> tuple[ImageEntry, ...]:
        """Returns the row's pictures if all are there, whole and made from this row; none otherwise."""
        found = []
        for index, file in enumerate(self._files(row)):
            content = self._store.read(file)
            facts = None if content is None else _facts(content, row.fingerprint(self.work.bundle))
            if content is None or facts is None:
                return ()
            found.append(self._picture(row, index, file, content, facts, None))
        return tuple(found)

    def _picture(
        self, row: Row, index: int, file: str, content: bytes, facts: Mapping[str, Any], seconds: float | None
    ) -> ImageEntry:
        seed = int(facts["seed"])
        return ImageEntry(
            id=row.id,
            row=row.number,
            picture=index,
            file=file,
            sha256=_digest(content),
            bytes=len(content),
            seed=seed - 2**64 if seed >= 2**63 else seed,
            seconds=seconds and round(seconds, 4),
            parameters=json_text(facts),
            fingerprint=row.fingerprint(self.work.bundle),
            bundle=self.work.bundle,
            parity=None if seconds is None or self._service is None else self._service.parity_hash,
        )

    def _died(self, row: Row) -> DeadLetter:
        error = EngineError(
            f"Workers ended {MOST_ATTEMPTS} times while they made this row.",
            advice="Look for a lack of memory and in Ray's logs; then give --retry-failed.",
        )
        return replace(DeadLetter.of(row, error, self.work.bundle), kind=DIED)


def request_values(row: Row, inputs: Location) -> dict[str, object]:
    """Returns a row's values as a request takes them, with its pictures read; their paths begin at ``inputs``.

    Raises:
        InputError: a picture is not there or cannot be read.
    """
    values: dict[str, object] = dict(row.values)
    for name, value in row.values.items():
        if BY_NAME[name].kind != "picture" or not isinstance(value, str) or value.startswith(DATA):
            continue
        place = inputs.joined(value)
        try:
            content = Store(place).read()
        except StorageError as error:
            raise InputError(f"The {name} cannot be read.", given=error.given, advice=error.advice) from error
        if content is None:
            raise InputError(f"The {name} is not there.", given=place.url, advice="Mend the path.")
        values[name] = content
    return values


def _facts(content: bytes, fingerprint: str) -> dict[str, Any] | None:
    """Returns what a whole picture says it was made with; None where it is not whole, or not of the row."""
    try:
        image = decode_picture(content, pixels=LIMITS.image_pixels, texts=True)
        facts: dict[str, Any] = json.loads(image.info[HIDIFF])
        origin = facts.pop(BULK)
        same = origin["row"] == fingerprint and origin["pixels"] == _digest(image.tobytes())
    except (InputError, KeyError, TypeError, AttributeError, ValueError):
        return None
    return facts if same else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
