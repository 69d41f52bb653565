"""What a job leaves: pictures, an index of them, dead letters, and what all of it was made with.

```
run.json              the bundle's hash and the settings, written first; at the end what came of it
pictures/<id>.png     each whole, and telling the row that it was made from
rows.parquet          the index, a row for each picture
rows/part-*.parquet   what was added to the index since, while a job runs or after one was cut off
dead-letters.jsonl    rows that failed, why, and what to do
```
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from hidiff_runtime.bulk.rows import DeadLetter
from hidiff_runtime.bulk.storage import Store
from hidiff_runtime.errors import InputError, StorageError
from hidiff_runtime.text_safety import json_text

Found = TypeVar("Found")

PICTURES = "pictures"
RUN, INDEX, PARTS, DEAD = "run.json", "rows.parquet", "rows", "dead-letters.jsonl"
FORMAT = 1
EACH_SECONDS, EACH_ROWS = 20.0, 1000
"""How often what is done is written into the index: a job that is cut off finds the rest in the pictures."""


@dataclass(frozen=True)
class ImageEntry:
    """A row of the index.

    Args:
        id: of the row.
        row: its number in the prompts.
        picture: its index in the bundle's batch.
        file: in the output.
        sha256: of the file.
        bytes: of the file.
        seed: of the run, as a signed number of 64 bits: the same stream as that of the unsigned one.
        seconds: that denoising and decoding took; None where the picture was found.
        parameters: all that it was made with, as JSON.
        fingerprint: of the row.
        bundle: the bundle's hash.
        parity: SHA-256 of the warm-up picture of the worker; None where the picture was found.
    """

    id: str
    row: int
    picture: int
    file: str
    sha256: str
    bytes: int
    seed: int
    seconds: float | None
    parameters: str
    fingerprint: str
    bundle: str
    parity: str | None


class Output:
    """Reads and writes the index and the dead letters at a store's place."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.index: dict[str, list[ImageEntry]] = {}
        self.dead: list[DeadLetter] = []
        self._fresh: list[ImageEntry] = []
        self._dead_changed = False
        self._bound: dict[str, Any] = {}
        self._written = time.monotonic()

    def begin(self, bundle: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Binds the place to a bundle's hash and the settings that pictures depend on, notes ``facts`` beside them, and
        reads what earlier jobs left.

        Raises:
            InputError: the place holds something else, or pictures of another bundle or other settings.
            StorageError: it cannot be read or written.
        """
        self.look(bundle, settings)
        self._bound = {"format": FORMAT, "bundle": bundle, "settings": settings, **facts}
        self._note({})

    def look(self, bundle: str, settings: Mapping[str, Any]) -> None:
        """Reads what earlier jobs left, and writes nothing; otherwise as `begin`."""
        content = self.store.read(RUN)
        if content is None:
            if not self.store.is_empty():
                raise InputError(
                    "The output holds something that is not from a bulk job.",
                    given=self.store.place.url,
                    advice="Choose an empty or new place.",
                )
            return
        _check_same(self.store.place.url, _object(RUN, content), bundle, settings)
        self._read()

    def add(self, pictures: Iterable[ImageEntry]) -> None:
        """Notes the pictures of a row."""
        made = list(pictures)
        self.index[made[0].id] = made
        self._fresh.extend(made)

    def keep(self, letters: Iterable[DeadLetter]) -> None:
        """Leaves these dead letters of all there are."""
        kept = list(letters)
        self._dead_changed |= kept != self.dead
        self.dead = kept

    def add_dead_letter(self, letter: DeadLetter) -> None:
        """Notes that a row failed; the index forgets pictures that were made of it when it was another."""
        self.dead.append(letter)
        self.index.pop(letter.id, None)
        self._dead_changed = True

    def flush(self, *, now: bool = False) -> None:
        """Writes what is new, if it is time or ``now``. Raises StorageError where it cannot."""
        due = len(self._fresh) >= EACH_ROWS or time.monotonic() - self._written >= EACH_SECONDS
        if not (now or due):
            return
        if self._fresh:
            self.store.write(f"{PARTS}/part-{uuid.uuid4().hex}.parquet", _table(self._fresh))
            self._fresh = []
        if self._dead_changed:
            letters = sorted(self.dead, key=lambda letter: letter.row)
            self.store.write(DEAD, "".join(f"{json_text(asdict(letter))}\n" for letter in letters).encode())
            self._dead_changed = False
        self._written = time.monotonic()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the whole index, then removes its parts, and notes what came of the job.

        Raises:
            StorageError: it cannot be written.
        """
        self.flush(now=True)
        rows = sorted(self.index.values(), key=lambda pictures: (pictures[0].row, pictures[0].id))
        self.store.write(INDEX, _table([picture for pictures in rows for picture in pictures]))
        for name in self._parts():
            self.store.delete(name)
        self._note({"summary": dict(summary)})

    def _note(self, facts: Mapping[str, Any]) -> None:
        self.store.write(RUN, f"{json_text({**self._bound, **facts}, indent=2)}\n".encode())

    def _read(self) -> None:
        rows: dict[tuple[str, str], dict[int, ImageEntry]] = {}
        for name in (INDEX, *self._parts()):
            content = self.store.read(name)
            for picture in [] if content is None else _pictures(name, content):
                rows.setdefault((picture.id, picture.fingerprint), {})[picture.picture] = picture
        for (row_id, _), found in rows.items():  # a row that was changed and made anew comes later
            self.index[row_id] = [found[number] for number in sorted(found)]
        self.dead = _letters(self.store.read(DEAD) or b"")

    def _parts(self) -> list[str]:
        """Returns the parts of the index; what else lies there is somebody else's, neither read nor removed."""
        found = sorted(self.store.sizes(PARTS))
        return [f"{PARTS}/{name}" for name in found if name.startswith("part-") and name.endswith(".parquet")]


def _table(pictures: list[ImageEntry]) -> bytes:
    """Returns the Parquet file of these rows."""
    import pyarrow
    from pyarrow import parquet

    types = {"row": "int64", "picture": "int32", "bytes": "int64", "seed": "int64", "seconds": "float64"}
    schema = pyarrow.schema(
        [(field.name, pyarrow.type_for_alias(types.get(field.name, "string"))) for field in fields(ImageEntry)]
    )
    content = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([asdict(picture) for picture in pictures], schema), content)
    return content.getvalue()


def _letters(content: bytes) -> list[DeadLetter]:
    """Returns the dead letters of a file, one a line feed; their text may hold other characters that end lines."""
    found = [_object(DEAD, line) for line in content.split(b"\n") if line.strip()]
    for values in found:
        if isinstance(values.get("given"), (int, float)):  # as earlier versions wrote numbers
            values["given"] = str(values["given"])
    try:
        return [_record(DeadLetter, values) for values in found]
    except TypeError as error:  # fields of another version
        raise _broken(DEAD, error) from error


def _pictures(name: str, content: bytes) -> list[ImageEntry]:
    import pyarrow
    from pyarrow import parquet

    try:
        return [_record(ImageEntry, row) for row in parquet.read_table(io.BytesIO(content)).to_pylist()]
    except (pyarrow.ArrowException, OSError, TypeError, ValueError, OverflowError) as error:
        raise _broken(name, error) from error


def _record(kind: type[Found], values: Mapping[str, Any]) -> Found:
    """Returns the record of these values. Raises TypeError where they are not its fields', or of other types."""
    made = kind(**values)
    for field in fields(kind):  # type: ignore[arg-type]  # a dataclass
        value = getattr(made, field.name)
        if not isinstance(value, _TYPES[str(field.type)]) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {type(value).__name__}, expected {field.type}")
    return made


def _object(name: str, content: bytes | str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _broken(name, error) from error
    if not isinstance(found, dict):
        raise _broken(name, "not an object")
    return found


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float | None": (float, int, type(None)),
    "str | None": (str, type(None)),
    "Mapping[str, Any]": (dict,),
}
"""Of a record's fields, by how they are written."""

_ADVICE = {
    RUN: "Choose another output: without it nobody knows which bundle and settings the pictures here are from.",
    DEAD: "Remove it: rows that failed are tried again.",
}


def _broken(name: str, reason: object) -> StorageError:
    return StorageError(
        "A file of an earlier job cannot be read.",
        given=f"{name}: {reason}",
        advice=_ADVICE.get(name, "Remove it: pictures that are whole are found again by what they say of themselves."),
    )


def _check_same(url: str, found: Mapping[str, Any], bundle: str, settings: Mapping[str, Any]) -> None:
    if found.get("format") != FORMAT:
        raise InputError(
            "The output is of another format.", given=f"{url}: {found.get('format')}", advice="Choose another place."
        )
    if found.get("bundle") != bundle:
        raise InputError(
            "The output holds pictures of another bundle.",
            given=f"{url}: bundle {str(found.get('bundle'))[:12]}, and this one is {bundle[:12]}",
            advice="Choose another output, or go on with the bundle that it was begun with.",
        )
    if found.get("settings") != settings:
        raise InputError(
            "The output holds pictures made with other settings.",
            given=f"{url}: {json.dumps(found.get('settings'))}, and now {json.dumps(settings)}",
            advice="Choose another output, or give the settings (--seed, --set) that it was begun with.",
        )
