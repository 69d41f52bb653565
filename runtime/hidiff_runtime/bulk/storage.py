"""Where a job reads and writes: a folder, or a bucket of S3 or of what speaks as S3 does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hidiff_runtime.errors import InputError, StorageError
from hidiff_runtime.optional_libraries import optional_library
from hidiff_runtime.pipeline.image_metadata import write_whole
from hidiff_runtime.text_safety import encodable

SCHEME = "s3://"
LOCK = ".lock"
INSTALL = "pip install 'hidiff-runtime[bulk]'"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class Location:
    """A folder or a prefix of a bucket, as text that travels to workers.

    Args:
        url: a path, or ``s3://bucket/prefix``.
        endpoint: of another server than Amazon's, such as ``http://minio:9000``; None for Amazon's, or what the
            usual environment variables name.
    """

    url: str
    endpoint: str | None = None

    @classmethod
    def of(cls, text: str, endpoint: str | None = None) -> Location:
        """Returns the place that a person wrote: a path is made absolute, the endpoint taken from the environment.

        Raises:
            InputError: it is another kind of URL, or names no bucket.
        """
        if encodable(text) != text:
            raise InputError(
                "A path or URL has bytes that are no text.", given=ascii(text), advice="Bulk jobs take names in UTF-8."
            )
        if not text.startswith(SCHEME):
            if "://" in text:
                raise InputError("Only s3:// URLs and paths are taken.", given=text, advice="Give s3://bucket/prefix.")
            return cls(str(Path(text).expanduser().absolute()))
        if not text.removeprefix(SCHEME).strip("/"):
            raise InputError("The URL names no bucket.", given=text, advice="Give s3://bucket/prefix.")
        named = endpoint or next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
        return cls(text.rstrip("/"), named)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder."""
        return not self.url.startswith(SCHEME)

    @property
    def parent(self) -> Location:
        """Where it lies."""
        if self.is_local:
            return Location(str(Path(self.url).parent))
        return Location(self.url.rpartition("/")[0], self.endpoint)

    def joined(self, name: str) -> Location:
        """Returns a place inside; ``name`` may itself be a whole path or URL."""
        if name.startswith(SCHEME):
            return Location(name, self.endpoint)
        if self.is_local or name.startswith("/"):
            return Location(str(Path(self.url if self.is_local else "/") / name))
        return Location(f"{self.url}/{name}", self.endpoint)


Place = Location
"""The name of the last release; it goes with the next one."""


class Store:
    """Reads and writes whole files at a place and below it. Each file is there whole or not at all.

    Raises:
        EngineError: pyarrow is not installed.
    """

    def __init__(self, place: Location) -> None:
        self.place = place
        optional_library("pyarrow", "Bulk jobs need pyarrow", INSTALL)
        from pyarrow import fs

        self._fs_module = fs
        if place.is_local:
            self._files: Any = fs.LocalFileSystem()
        else:
            self._files = fs.S3FileSystem(**_s3_options(place.endpoint))

    def read(self, name: str = "") -> bytes | None:
        """Returns a file's content; None where there is none. Without a name, the place itself is the file.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            with self._told("read", name), self._files.open_input_stream(self._path(name)) as file:
                content: bytes = file.read()
                return content
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, in the place of one that is there.

        Raises:
            StorageError: it cannot be written; nothing of it is kept.
        """
        with self._told("written", name):
            if self.place.is_local:
                path = Path(self._path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, content)
            else:
                with self._files.open_output_stream(self._path(name)) as file:
                    file.write(content)

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns the files in a folder by name, with their bytes; none where there is no folder.

        Raises:
            StorageError: it cannot be listed.
        """
        return {info.base_name: info.size for info in self._listed(folder) if info.is_file}

    def is_empty(self) -> bool:
        """Returns whether nothing is there but the lock.

        Raises:
            StorageError: it cannot be listed.
        """
        return all(info.base_name == LOCK for info in self._listed(""))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps another job on this machine out of a folder, which it makes. A bucket has no lock: what two jobs write
        there is the same, and so done twice, not spoilt.

        Raises:
            StorageError: another job holds it, or the folder cannot be made.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        if not self.place.is_local:
            yield
            return
        path = Path(self._path(LOCK))
        with self._told("written", ""):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StorageError(
                    "Another job writes there.", given=self.place.url, advice="Wait for it, or choose another output."
                ) from error
            yield

    def delete(self, name: str) -> None:
        """Removes a file.

        Raises:
            StorageError: it cannot be removed.
        """
        with self._told("removed", name):
            self._files.delete_file(self._path(name))

    def _listed(self, folder: str) -> list[Any]:
        with self._told("listed", folder):
            selector = self._fs_module.FileSelector(self._path(folder), allow_not_found=True)
            found: list[Any] = self._files.get_file_info(selector)
            return found

    def _path(self, name: str) -> str:
        root = self.place.url.removeprefix(SCHEME)
        return f"{root}/{name}" if name else root

    @contextmanager
    def _told(self, action: str, name: str) -> Iterator[None]:
        """Says what could not be done where; that a file is not there is the caller's to know."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # the latter for names that no file can have
            where = self.place.joined(name).url if name else self.place.url
            reason = error.strerror if isinstance(error, OSError) else ""
            raise StorageError(
                f"The files of the job cannot be {action}.",
                given=f"{where}: {reason or error}",
                advice="Look at the place, its permissions and credentials, and run the same command again.",
            ) from error


def _s3_options(endpoint: str | None) -> dict[str, Any]:
    if endpoint is None:
        return {}
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError(
            "The S3 endpoint must be a URL.", given=endpoint, advice="Give it as http://host:port or https://host."
        )
    return {"endpoint_override": parts.netloc, "scheme": parts.scheme}
