"""How the front tells the stream model, in another process, that a request was cancelled: a file appears.

Triton hands a cancellation to the model that the client asked, and not on to the models that this one asks.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from pathlib import Path

from hidiff_runtime.errors import StorageError

_MEMORY = Path("/dev/shm")  # where Triton's Python backend has to be able to write, even in a read-only container
_NAME = re.compile(r"[0-9a-f]{32}")


class Tokens:
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
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            found = self._folder.lstat()
        except OSError as error:
            raise StorageError("The folder for cancellations cannot be made.", given=error) from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise StorageError("The folder for cancellations is not this user's alone.", given=self._folder)

    @staticmethod
    def new() -> str:
        """The name of a token that nobody can guess; its file is not there yet."""
        return secrets.token_hex(16)

    def cancel(self, name: str) -> None:
        """Makes the file appear."""
        self._path(name).touch()

    def cancelled(self, name: str) -> bool:
        """Whether it has appeared."""
        return self._path(name).exists()

    def forget(self, name: str) -> None:
        """Takes the file away, if there is one."""
        self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Takes the folder away where it is empty."""
        try:
            self._folder.rmdir()
        except OSError:
            return  # other models still use it

    def _path(self, name: str) -> Path:
        """Where the token's file is; a client may have sent the name, and then it is no path to anything else."""
        return self._folder / (name if _NAME.fullmatch(name) else "no-token")
