"""What the front and the stream model, in another process, tell each other of a run by files of a private folder.

That it was cancelled, since Triton hands a cancellation to the model that the client asked, and not on to the models
that this one asks. And that the process which makes it lives, since Triton never ends what one model asked of another
whose process was killed.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hidiff_runtime.errors import StorageError

_MEMORY = Path("/dev/shm")  # where Triton's Python backend has to be able to write, even in a read-only container
_NAME = re.compile(r"[0-9a-f]{32}")


class RunTokens:
    """The tokens of one server's models, in a folder that nobody else can look into.

    Args:
        server: the server's process id, the parent of each model's process.
        parent: where the folder lies.

    Raises:
        StorageError: the folder cannot be made, or is another user's.
    """

    def __init__(self, server: int, parent: Path | None = None) -> None:
        home = parent or (_MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir()))
        self._folder = home / f"hidiff-{os.getuid()}-{server}"
        self._make()

    def _make(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            found = self._folder.lstat()
        except OSError as error:
            raise StorageError("The folder for cancellations cannot be made.", given=error) from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise StorageError("The folder for cancellations is not this user's alone.", given=self._folder)

    @staticmethod
    def new() -> str:
        """Returns the name of a token that nobody can guess; its file is not there yet."""
        return secrets.token_hex(16)

    @staticmethod
    def valid(name: object) -> bool:
        """Returns whether a value from outside can be the name of a token, and so is no path to anything else."""
        return isinstance(name, str) and _NAME.fullmatch(name) is not None

    def cancel(self, name: str) -> None:
        """Makes the file appear."""
        self._new(name, "cancel").close()

    def cancelled(self, name: str) -> bool:
        """Returns whether it has appeared."""
        return self._path(name).exists()

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Holds a run's lock while this process makes it. The kernel takes its lock away whatever ends the process."""
        path, early = self._path(name, "run"), self._path(name, "new")
        with self._new(name, "new") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            early.rename(path)  # is locked from the moment that it is there
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def abandoned(self, name: str) -> bool:
        """Returns whether a process that made the run has ended inside `running`."""
        try:
            with self._path(name, "run").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return os.fstat(file.fileno()).st_nlink > 0  # 0 where the run was left in the meantime
        except (FileNotFoundError, BlockingIOError):
            return False

    def forget(self, name: str) -> None:
        """Takes the files away that there are."""
        for kind in ("cancel", "run", "new"):
            self._path(name, kind).unlink(missing_ok=True)

    def close(self) -> None:
        """Takes the folder away where it is empty."""
        try:
            self._folder.rmdir()
        except OSError:
            return  # other models still use it

    def _new(self, name: str, kind: str) -> BinaryIO:
        """Returns a new file, open. Another model that ended may have taken the folder away: it is made again then."""
        while True:
            try:
                return self._path(name, kind).open("wb")
            except FileNotFoundError:
                self._make()

    def _path(self, name: str, kind: str = "cancel") -> Path:
        """Returns where a file of the token is."""
        if not self.valid(name):
            raise ValueError("no token")
        return self._folder / f"{name}.{kind}"
