"""Whether a service that failed fails again."""

from __future__ import annotations

import logging
import math
import threading
import time

from hidiff_runtime.serving.service import Service

log = logging.getLogger(__name__)

AGAIN = 10.0
"""Seconds after which a service that failed is tried out anew, when somebody asks whether it is ready."""


class Trial:
    """Tells a service that fails from requests that do.

    Attributes:
        failed: whether the service failed when it was tried out last, and has made no picture since.
    """

    def __init__(self, service: Service) -> None:
        self.failed = False
        self._service = service
        self._lock = threading.Lock()
        self._due = 0.0

    def is_due(self) -> bool:
        """Returns whether it is time to try again; whoever is told so does."""
        with self._lock:
            due = time.monotonic() >= self._due
            if due:
                self._due = math.inf  # until it has been tried
        return due

    def run(self) -> None:
        """Draws the warm-up picture, in the worker's thread."""
        try:
            self._service.try_out()
            self.failed = False
        except Exception as error:
            if not self.failed:
                log.error("The server is not ready any more: %s", error)
            self.failed = True
        finally:
            with self._lock:
                self._due = time.monotonic() + AGAIN
