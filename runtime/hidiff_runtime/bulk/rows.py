"""Rows of a bulk job: each has an id, a seed and the settings of one run, as plain values that travel as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

from hidiff_runtime.bulk.storage import Location, Store
from hidiff_runtime.errors import HidiffError, InputError
from hidiff_runtime.pipeline.request_fields import BY_NAME
from hidiff_runtime.pipeline.request_values import RANDOM
from hidiff_runtime.prompt_files.field_values import ID, Value, check_encodable, parse_value, plain_value, shown
from hidiff_runtime.prompt_files.formats import check_ending, read_rows
from hidiff_runtime.prompt_files.raw_rows import Columns, Raw
from hidiff_runtime.serving.public_errors import kind_of
from hidiff_runtime.text_safety import printable

LONGEST_NAME = 180
"""Bytes of a picture's name without its ending; most file systems take 255."""

_SHOWN = 200


@dataclass(frozen=True)
class Row:
    """One run that is asked for.

    Args:
        number: from 0.
        where: it stands, for messages.
        id: its own.
        values: by the names of `hidiff_runtime.pipeline.request_fields.FIELDS`, the seed always among them;
            pictures are a path, an ``s3://`` URL or a ``data:`` URL.
    """

    number: int
    where: str
    id: str
    values: Mapping[str, Value]

    def fingerprint(self, bundle: str) -> str:
        """Returns the SHA-256 of the values, and of the hash of the bundle that they are for."""
        content = json.dumps([bundle, self.id, self.values], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> str:
        """Returns what `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Row:
        """Returns a row that :meth:`to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class DeadLetter:
    """A row that could not be made.

    Args:
        id: of the row; its number where it has none of its own.
        row: its number.
        where: it stands.
        reason: what is wrong.
        given: what was found.
        advice: what to do.
        kind: ``input``, ``engine``, ``died`` or ``internal``.
        fingerprint: of the row, empty where it never was one.
        values: that were asked for, pictures shortened.
    """

    id: str
    row: int
    where: str
    reason: str
    given: str
    advice: str
    kind: str
    fingerprint: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Row, error: BaseException, bundle: str) -> DeadLetter:
        """Makes the dead letter of a row that failed with this error."""
        values = {name: shown(value) for name, value in row.values.items()}
        return cls(row.id, row.number, row.where, **_told(error), fingerprint=row.fingerprint(bundle), values=values)

    @classmethod
    def of_raw(cls, raw: Raw, error: InputError) -> DeadLetter:
        """Makes the dead letter of what was read and is no row."""
        values = {} if isinstance(raw.values, InputError) else raw.values
        shown_values = {name: shown(value) for name, value in values.items() if value is not None}
        given = values.get(ID)
        row_id = f"{raw.number:06}" if given in (None, "") else str(shown(given))
        return cls(row_id, raw.number, raw.where, **_told(error), values=shown_values)


def _told(error: BaseException) -> dict[str, str]:
    """Returns what a dead letter tells of an error."""
    if not isinstance(error, HidiffError):
        reason, advice = f"{type(error).__name__}: {error}"[:_SHOWN], "This is a fault of hidiff-runtime: report it."
        return {"reason": reason, "given": "", "advice": advice, "kind": kind_of(error)}
    given = "" if error.given is None else str(shown(error.given))
    return {"reason": error.summary, "given": given, "advice": error.advice, "kind": kind_of(error)}


def read_prompts(place: Location, ignored: Iterable[str] = ()) -> list[Raw]:
    """Returns the rows of a file, by its ending; ``ignored`` are columns that may be there and are no fields.

    Raises:
        InputError: there is no such file, it cannot be read, has no rows, or a table has a column that is no field.
        EngineError: a library for files of its ending is not installed.
        StorageError: the place cannot be read.
    """
    check_ending(place.url)
    content = Store(place).read()
    if content is None:
        raise InputError("The prompts cannot be read.", given=f"{place.url}: no such file", advice="Mend the name.")
    columns = Columns((ID, *BY_NAME), tuple(ignored), "Leave columns out with --ignore {name}.")
    return read_rows(place.url, content, columns)


def derived_seed(base: int, row_id: str) -> int:
    """Returns the seed of a row that has none: 32 bits of the SHA-256 of ``base``, a colon and the row's id.

    It depends on nothing else, so neither on the order of rows nor on which worker makes them.
    """
    return int.from_bytes(hashlib.sha256(f"{base}:{row_id}".encode()).digest()[:4], "big")


def picture_name(row_id: str) -> str:
    """Returns the name of a row's picture, without its ending: the id, percent-encoded where it is no plain file name.

    It holds no separator and does not begin with a dot. A name that would be too long ends in the id's SHA-256.
    """
    name = quote(row_id, safe=" ").replace("~", "%7E")
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(row_id.encode()).hexdigest()[:32]
    return f"{name[: LONGEST_NAME - 33]}~{digest}"  # no other name has a tilde


def find_rows(
    raws: Iterable[Raw], *, seed: int, defaults: Mapping[str, Value], ignored: Iterable[str] = ()
) -> tuple[list[Row], list[DeadLetter]]:
    """Returns the rows, and those that are none: without values, with ones of a wrong type, or with an id that is
    taken. Seed, defaults and ignored columns are the `hidiff_runtime.bulk.job.Job`'s.
    """
    rows: list[Row] = []
    refused: list[DeadLetter] = []
    taken: dict[str, str] = {}
    left_out = frozenset(ignored)
    for raw in raws:
        try:
            row = _row(raw, seed, defaults, left_out)
            _check_id(row, taken)
        except InputError as error:
            refused.append(DeadLetter.of_raw(raw, error))
        else:
            rows.append(row)
    return rows, refused


def _row(raw: Raw, seed: int, defaults: Mapping[str, Value], ignored: frozenset[str]) -> Row:
    values = dict(defaults)
    row_id = f"{raw.number:06}"
    for name, given in raw.given().items():
        if name in ignored:
            continue
        if name == ID:
            row_id = _id(given)
            continue
        if name not in BY_NAME:
            field = printable(name[:60])
            advice = f"There are {', '.join((ID, *BY_NAME))}; or --ignore {field}."
            raise InputError("There is no such field.", given=field, advice=advice)
        values[name] = parse_value(name, given) if raw.text else plain_value(name, given)
    if values.get("seed", RANDOM) == RANDOM:  # which asks for another each time, and a job has to be repeatable
        values["seed"] = derived_seed(seed, row_id)
    return Row(raw.number, raw.where, row_id, values)


def _check_id(row: Row, taken: dict[str, str]) -> None:
    """Notes the id's file name; refuses one that is taken, also on file systems that fold upper and lower case."""
    name = picture_name(row.id).casefold()
    if name in taken:
        raise InputError(
            "Another row has this id.",
            given=f"{row.id!r}, as {taken[name]}",
            advice="Give each row an id of its own; upper and lower case do not tell ids apart.",
        )
    taken[name] = row.where


def _id(given: object) -> str:
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    if not isinstance(given, (str, int)) or isinstance(given, bool) or given == "":
        raise InputError("An id must be text or a whole number.", given=shown(given), advice="Or leave it out.")
    check_encodable(ID, str(given))
    return str(given)
